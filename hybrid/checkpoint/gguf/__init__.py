"""GGUF: llama.cpp's format for models. A file, or several, become a config and named tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from hybrid.checkpoint.foreign import is_gguf
from hybrid.checkpoint.gguf.activation import choose_activation
from hybrid.checkpoint.gguf.architecture import architecture_of, config_of
from hybrid.checkpoint.gguf.predictors import find_predictors
from hybrid.checkpoint.gguf.stored_types import type_notices, usual_format
from hybrid.checkpoint.gguf.weights import GgufWeights, open_files, refuse_neuron_order
from hybrid.checkpoint.hf import Checkpoint
from hybrid.checkpoint.identity import ModelIdentity, SourceFile
from hybrid.checkpoint.roles import find_tensors
from hybrid.errors import InvalidCheckpoint
from hybrid.kernels import Format
from hybrid.model.families import parse_config
from hybrid.notices import Notices

__all__ = ["is_gguf", "open_gguf"]


def open_gguf(
    path: Path,
    format: Format | Literal["auto"] | None,
    *,
    use_mmap: bool,
    activation: str | None,
    hashes: Path | None,
) -> Checkpoint:
    """Open a model. Finds every tensor and checks its type and shape before it returns.

    `format` is what the weights will be packed to: "auto" chooses by the type of most of them.
    `activation` is the user's choice, and `hashes` the folder in which the hashes of weight files
    are remembered. Raises InvalidCheckpoint,
    UnsupportedModel and InvalidOption.
    """
    notices = Notices()
    # Recorded before the files are read, so that old weights never get a newer file's state.
    present = {entry: SourceFile.of(entry) for entry in path.parent.glob("*.gguf")}
    present[path] = SourceFile.of(path)
    files = open_files(path)
    notices.add(
        *(
            f"{plan.name} is not used: hybrid plans for this machine itself (hybrid plan)"
            for plan in sorted(path.parent.glob("*.gpuidx"))
        )
    )
    refuse_neuron_order(files[0])
    architecture_of(files[0])  # refused before an activation is
    chosen = choose_activation(files[0], activation)
    if chosen.notice:
        notices.add(chosen.notice)
    tensors = {name: info for file in files for name, info in file.tensors.items()}
    content = config_of(replace(files[0], tensors=tensors), chosen.name, chosen.threshold)
    config = parse_config(content, path, notices)
    weights = GgufWeights(files, content, use_mmap=use_mmap)
    notices.add(*weights.notices)
    config, found, unused = find_tensors(path, config, weights, notices)
    predictors = None
    if weights.predictors:
        predictors, tensors_of = find_predictors(
            files[0], weights.predictors, config, use_mmap=use_mmap
        )
        found |= tensors_of
    packed = usual_format(weights.n_weights) if format == "auto" else format
    if packed is not None:
        notices.add(*type_notices(weights, config, packed, is_chosen=format != "auto"))
    if missing := [part for part in weights.paths if part not in present]:
        raise InvalidCheckpoint(f"{missing[0]}: was added while it was read; load the model again")
    sources = tuple(present[part] for part in weights.paths)
    return Checkpoint(
        path,
        config,
        found,
        identity=ModelIdentity(path.parent, config, sources, hashes),
        format=packed,
        notices=tuple(notices),
        unused_tensors=unused,
        predictors=predictors,
        gguf=files[0],
    )
