"""Bytes on disk to named tensors: opening a model's folder, its config and its weights.

Owns reading and validating what others wrote, and making up what synthetic models have instead.
Quantising and packing is `hybrid.weights`' job.
"""

from __future__ import annotations

from pathlib import Path

from hybrid.checkpoint import hf
from hybrid.checkpoint.hf import Checkpoint
from hybrid.checkpoint.synthetic import folder as synthetic
from hybrid.checkpoint.tensor import Tensor
from hybrid.kernels import Format
from hybrid.progress import Progress, ignore_progress

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]


def open_checkpoint(
    folder: Path,
    format: Format | None = None,
    progress: Progress = ignore_progress,
    *,
    use_mmap: bool = True,
) -> Checkpoint:
    """Open a model's folder; every tensor is found, and its type and shape checked, before return.

    `format` is what the weights will be packed to, which a synthetic model is calibrated for: the
    first time this takes a minute, told to `progress`. `use_mmap` is that of `hf.open_checkpoint`.

    Raises `ModelNotFound`, `InvalidCheckpoint` or `UnsupportedModel`.
    """
    if synthetic.is_synthetic(folder):
        return synthetic.open_synthetic(folder, format, progress)
    return hf.open_checkpoint(folder, use_mmap=use_mmap)
