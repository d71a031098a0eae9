"""The ranks of a model's predictors: those in its GGUF file, and the one that hybrid trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybrid.checkpoint.gguf.predictors import predictor_role
from hybrid.checkpoint.gguf.reader import GgufFile
from hybrid.engine.loading.prediction import predictor_path
from hybrid.inspecting.report import PredictorRanks
from hybrid.kernels import Format
from hybrid.model.stored_predictors import FIRST
from predictors.errors import PredictorError
from predictors.file import load_predictor_file


def stored_predictors(files: Sequence[GgufFile]) -> tuple[PredictorRanks, ...]:
    """Return the predictors in GGUF files, if there are any."""
    found = {}
    for file in files:
        for info in file.tensors.values():
            role = predictor_role(info.name)
            if role is not None and role[0] == FIRST:
                found[role[1]] = info.shape[0]  # one row for each rank
    if not found:
        return ()
    maker = "PowerInfer's" if files[0].is_powerinfers else "Kairox's"
    ranks = tuple(found.get(layer, 0) for layer in range(max(found) + 1))
    return (PredictorRanks(f"{maker} format", ranks),)


def trained_predictors(home: Path, model_hash: str) -> tuple[PredictorRanks, ...]:
    """Return the predictors of `hybrid.setup`; those that are broken are left out."""
    found = []
    for format in Format.__members__:
        path = predictor_path(home, model_hash, format)
        if not path.is_file():
            continue
        try:
            file = load_predictor_file(path)
        except PredictorError:
            continue
        for recall, choices in file.choices.items():
            source = f"hybrid's, {format}, recall {recall:g}, in {path}"
            found.append(PredictorRanks(source, tuple(choice.rank for choice in choices)))
    return tuple(found)
