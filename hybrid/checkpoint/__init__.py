"""Bytes on disk to named tensors: opening a model's folder, its config and its weights.

Owns reading and validating what others wrote. Quantising and packing is `hybrid.weights`' job.
"""

from __future__ import annotations

from hybrid.checkpoint.hf import Checkpoint, open_checkpoint
from hybrid.checkpoint.tensor import Tensor

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]
