"""Opens a model's folder and reads its files as a config and named tensors.

This package reads and validates files that others wrote, and makes the weights of synthetic models.
`hybrid.weights` quantises and packs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hybrid.checkpoint import hf
from hybrid.checkpoint.gguf import is_gguf, open_gguf
from hybrid.checkpoint.hf import Checkpoint
from hybrid.checkpoint.synthetic import folder as synthetic
from hybrid.checkpoint.tensor import Tensor
from hybrid.errors import InvalidOption
from hybrid.kernels import Format
from hybrid.progress import Progress, ignore_progress
from hybrid.weights.formats import DEFAULT_FORMAT

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]


def open_checkpoint(
    folder: Path,
    format: Format | Literal["auto"] | None = None,
    progress: Progress = ignore_progress,
    *,
    use_mmap: bool = True,
    hashes: Path | None = None,
    activation: str | None = None,
) -> Checkpoint:
    """Open a model's folder, or its GGUF file. Finds and checks every tensor before it returns.

    `format` is the format that the weights will be packed to: "auto" takes the one that suits the
    file, and `Checkpoint.format` says which. A synthetic model is calibrated for it, which takes a
    minute the first time and is reported to `progress`. `use_mmap` and
    `hashes` are those of `hf.open_checkpoint`. `activation` is that of a GGUF file, which does not
    record it.

    Raises `ModelNotFound`, `InvalidCheckpoint`, `UnsupportedModel` or `InvalidOption`.
    """
    if is_gguf(folder):
        return open_gguf(folder, format, use_mmap=use_mmap, activation=activation, hashes=hashes)
    if format == "auto":
        format = DEFAULT_FORMAT
    if activation is not None:
        raise InvalidOption(f"activation: it is for GGUF files; {folder} has a config.json")
    if synthetic.is_synthetic(folder):
        return synthetic.open_synthetic(folder, format, progress)
    return hf.open_checkpoint(folder, format, use_mmap=use_mmap, hashes=hashes)
