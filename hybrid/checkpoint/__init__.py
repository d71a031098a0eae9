"""Opens a model's folder and reads its files as a config and named tensors.

This package reads and validates files that others wrote, and makes the weights of synthetic models.
`hybrid.weights` quantises and packs them.
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
    hashes: Path | None = None,
) -> Checkpoint:
    """Open a model's folder. Finds every tensor and checks its type and shape before it returns.

    `format` is the format that the weights will be packed to. A synthetic model is calibrated for
    it, which takes a minute the first time and is reported to `progress`. `use_mmap` and
    `hashes` are those of `hf.open_checkpoint`.

    Raises `ModelNotFound`, `InvalidCheckpoint` or `UnsupportedModel`.
    """
    if synthetic.is_synthetic(folder):
        return synthetic.open_synthetic(folder, format, progress)
    return hf.open_checkpoint(folder, use_mmap=use_mmap, hashes=hashes)
