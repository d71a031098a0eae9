"""Activation counts as PowerInfer keeps them: activation/activation_<layer>.pt, a tensor each.

A tensor has one number per neuron: how often it fired on some texts
(github.com/SJTU-IPADS/PowerInfer).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint.torch_bin import TorchBin
from hybrid.errors import InvalidArtifact, InvalidCheckpoint
from hybrid.model.config import ModelConfig

_NAME = re.compile(r"activation_(\d{1,5})\.pt")


def read_counts(folder: Path, config: ModelConfig) -> NDArray[np.float64]:
    """Return the counts of all layers (n_layers, n_neurons). Raises InvalidArtifact."""
    found = {
        int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))
    }
    if sorted(found) != list(range(config.n_layers)):
        raise InvalidArtifact(
            f"{folder}: expected activation_0.pt to activation_{config.n_layers - 1}.pt, found "
            f"{len(found)} such files"
        )
    counts = np.stack([_layer(found[layer], config) for layer in range(config.n_layers)])
    if not counts.max() > 0:
        raise InvalidArtifact(f"{folder}: all its counts are 0")
    return counts


def _layer(path: Path, config: ModelConfig) -> NDArray[np.float64]:
    try:
        counts = TorchBin(path).numbers()
    except InvalidCheckpoint as error:
        raise InvalidArtifact(str(error)) from error
    if counts.shape != (config.n_neurons,):
        raise InvalidArtifact(
            f"{path}: has counts of shape {counts.shape}, expected ({config.n_neurons},)"
        )
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise InvalidArtifact(f"{path}: a count is negative or not finite")
    return counts
