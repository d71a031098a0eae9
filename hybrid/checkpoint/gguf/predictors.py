"""The predictors in GGUF files of PowerInfer and Kairox: which neurons will fire?

PowerInfer (github.com/SJTU-IPADS/PowerInfer): fc2 · relu(fc1 · x) >= powerinfer.sparse_threshold,
where x is the residual stream before the norm.

Kairox (github.com/Anhelor/kairox.cpp, src/llama-graph.cpp): sigmoid(ffn_pred_down · relu(
ffn_pred_up · h)) >= 0.5, each product with a bias if there is one. h is the normed input of the FFN
of the layer before, since its predictions are made one layer ahead; the first layer takes its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from hybrid.checkpoint.gguf.reader import GgufFile, TensorInfo
from hybrid.checkpoint.gguf.tensor import BlockTensor, open_tensor
from hybrid.errors import InvalidCheckpoint
from hybrid.kernels import PredictorInput
from hybrid.model.config import ModelConfig
from hybrid.model.stored_predictors import (
    FIRST,
    FIRST_BIAS,
    SECOND,
    SECOND_BIAS,
    StoredPredictors,
)

_NAME = re.compile(r"blk\.(\d{1,5})\.(fc1|fc2|ffn_pred_up|ffn_pred_down)\.(weight|bias)")
_ROLES = {
    ("fc1", "weight"): FIRST,
    ("fc2", "weight"): SECOND,
    ("ffn_pred_up", "weight"): FIRST,
    ("ffn_pred_up", "bias"): FIRST_BIAS,
    ("ffn_pred_down", "weight"): SECOND,
    ("ffn_pred_down", "bias"): SECOND_BIAS,
}
_MAX_RANK = 1 << 16
Stored = Mapping[tuple[str, int | None], tuple[GgufFile, TensorInfo]]


def predictor_role(name: str) -> tuple[str, int] | None:
    """Return the role and the layer of a predictor's tensor, or None for other tensors."""
    match = _NAME.fullmatch(name)
    role = match and _ROLES.get((match[2], match[3]))
    return None if not match or role is None else (role, int(match[1]))


def find_predictors(
    file: GgufFile, stored: Stored, config: ModelConfig, *, use_mmap: bool
) -> tuple[StoredPredictors, dict[tuple[str, int | None], BlockTensor]]:
    """Return a model's predictors and their tensors. Raises InvalidCheckpoint."""
    ranks = tuple(_rank(file, stored, config, layer) for layer in range(config.n_layers))
    extra = [layer for _, layer in stored if layer is not None and layer >= config.n_layers]
    if extra:
        raise InvalidCheckpoint(
            f"{file.path}: has a predictor of layer {extra[0]}, but {config.n_layers} layers"
        )
    biases = {key for key in stored if key[0] in (FIRST_BIAS, SECOND_BIAS)}
    if biases and len(biases) != 2 * config.n_layers:
        raise InvalidCheckpoint(f"{file.path}: some of its predictors have biases, others do not")
    threshold = 0.0
    if file.is_powerinfers:
        maker, source = "PowerInfer", PredictorInput.residual
        threshold = file.single("powerinfer.sparse_threshold", 0.0)
        if type(threshold) not in (int, float) or not math.isfinite(threshold):
            raise InvalidCheckpoint(
                f"{file.path}: powerinfer.sparse_threshold: expected a finite number, found "
                f"{threshold!r:.60}"
            )
    else:
        maker, source = "Kairox", PredictorInput.previous  # sigmoid(s) >= 0.5 means s >= 0
    tensors = {
        key: open_tensor(where, info, info.name, use_mmap=use_mmap)
        for key, (where, info) in stored.items()
    }
    return StoredPredictors(maker, ranks, source, float(threshold), bool(biases)), tensors


def _rank(file: GgufFile, stored: Stored, config: ModelConfig, layer: int) -> int:
    """Check the shapes of one layer's predictor and return its rank. Raises InvalidCheckpoint."""
    if (FIRST, layer) not in stored or (SECOND, layer) not in stored:
        raise InvalidCheckpoint(f"{file.path}: has predictors, but none for layer {layer}")
    rank = stored[FIRST, layer][1].shape[0]
    expected = {
        FIRST: (rank, config.hidden_size),
        SECOND: (config.n_neurons, rank),
        FIRST_BIAS: (rank,),
        SECOND_BIAS: (config.n_neurons,),
    }
    for role, shape in expected.items():
        if (role, layer) not in stored:
            continue
        info = stored[role, layer][1]
        if info.shape != shape or rank > _MAX_RANK:
            raise InvalidCheckpoint(
                f"{file.path}: tensor {info.name!r} has shape {info.shape}, expected {shape} with "
                f"a rank up to {_MAX_RANK:,}"
            )
    return rank
