"""The ranks of a model's predictors: those in its GGUF file, and the one that hybrid trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hybrid.checkpoint.gguf.reader import GgufFile, TensorInfo
from hybrid.engine.loading.prediction import predictor_path
from hybrid.inspecting.report import PredictorRanks
from hybrid.kernels import Format
from predictors.errors import PredictorError
from predictors.file import load_predictor_file

# The first matrix of a layer's predictor has one row for each rank.
_FIRST = {
    "PowerInfer's": re.compile(r"blk\.(\d{1,5})\.fc1\.weight"),
    "Kairox's": re.compile(r"blk\.(\d{1,5})\.ffn_pred_up\.weight"),
}


def stored_predictors(files: Sequence[GgufFile]) -> tuple[PredictorRanks, ...]:
    """Return the predictors in GGUF files."""
    tensors = [info for file in files for info in file.tensors.values()]
    found = [_ranks(source, pattern, tensors) for source, pattern in _FIRST.items()]
    return tuple(ranks for ranks in found if ranks is not None)


def _ranks(
    source: str, pattern: re.Pattern[str], tensors: Sequence[TensorInfo]
) -> PredictorRanks | None:
    found = {}
    for info in tensors:
        match = pattern.fullmatch(info.name)
        if match is not None and len(info.shape) == 2:
            found[int(match[1])] = info.shape[0]
    if not found:
        return None
    n_layers = max(found) + 1
    return PredictorRanks(f"{source} format", tuple(found.get(at, 0) for at in range(n_layers)))


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
