"""The types that weights are written in: float32 values → the bytes of a file.

Q8_0 and Q4_0 are ggml's blocks of 32 values with one fp16 scale (github.com/ggml-org/ggml:
ggml-common.h). Their values are rounded as those of hybrid's q8 and q4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint.gguf.blocks import BLOCK_TYPES, BlockType
from hybrid.errors import NumericOverflow
from hybrid.kernels import Format
from hybrid.kernels.reference import bf16_bits, bf16_values
from hybrid.weights.formats import BLOCK, quantize_q4, quantize_q8
from hybrid.weights.matrix_scale import LARGEST_SHARE, RANGES, largest_of_blocks

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

NUMBERS = {kind.name: number for number, kind in BLOCK_TYPES.items()}
F32, F16, BF16, Q8_0, Q4_0 = (
    BLOCK_TYPES[NUMBERS[name]] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0")
)
TYPES = {kind.name.lower(): kind for kind in (BF16, F32, F16, Q8_0, Q4_0)}

# A block whose largest weight is smaller loses precision, since its fp16 numbers become subnormal.
# hybrid packs such a matrix with a scale of its own, which these files have no room for.
_LEAST = {
    F16.name: 2.0**-16,  # is rounded to 1/512, as in q8
    Q8_0.name: RANGES[Format.q8].least,
    Q4_0.name: RANGES[Format.q4].least,
}


def rounds(kind: BlockType, stored: str) -> bool:
    """Return whether values of the type named `stored` are rounded when they become `kind`."""
    return kind != F32 and stored != kind.name


def type_for(kind: BlockType, n_cols: int) -> BlockType:
    """Return the type for rows of `n_cols` values: F16 if they are no whole blocks."""
    return F16 if n_cols % kind.n_values else kind


def encode(kind: BlockType, values: Floats, name: str) -> Bytes:
    """Return rows (n, n_cols) as bytes (n, bytes of a row). `name` is the tensor's, for messages.

    Raises NumericOverflow if a value is not finite, or is too large for the type.
    """
    if not np.isfinite(values).all():
        raise NumericOverflow(f"tensor {name!r} has values that are not finite; it is broken")
    with np.errstate(all="ignore"):  # what is not finite is found below
        data, scales = _encoded(kind, values)
    if not np.isfinite(scales).all():
        raise NumericOverflow(
            f"tensor {name!r} has values up to {np.abs(values).max():.3g}, too large for "
            f"{kind.name}; choose --type bf16 or f32"
        )
    return data


def _encoded(kind: BlockType, values: Floats) -> tuple[Bytes, NDArray[np.floating]]:
    """Return the bytes, and the numbers of limited range in them."""
    if kind == F32:
        return values.astype("<f4", copy=False).view(np.uint8), np.zeros(0, np.float32)
    if kind == F16:
        halves = values.astype("<f2")
        return halves.view(np.uint8), halves
    if kind == BF16:
        bits = bf16_bits(values)
        return bits.astype("<u2", copy=False).view(np.uint8), bf16_values(bits)
    if kind == Q8_0:
        integers, scales = quantize_q8(values)
        blocks = integers.view(np.uint8).reshape(*scales.shape, BLOCK)
    else:
        nibbles, scales = quantize_q4(values)
        parts = nibbles.reshape(*scales.shape, 2, BLOCK // 2)
        blocks = parts[..., 0, :] | (parts[..., 1, :] << np.uint8(4))
    head = scales.astype("<f2", copy=False)[..., None].view(np.uint8)
    return np.concatenate([head, blocks], axis=-1).reshape(len(values), -1), scales


class SmallBlocks:
    """Counts the blocks of a matrix that a type cannot hold because their weights are too small."""

    def __init__(self, kind: BlockType, name: str) -> None:
        self._kind, self._name = kind, name
        self._n_lost = self._n = 0
        self._top = 0.0

    def add(self, values: Floats) -> None:
        """Count the blocks of some rows (n, n_cols)."""
        least = _LEAST.get(self._kind.name)
        if least is None:
            return
        largest = largest_of_blocks(values)
        self._n += np.count_nonzero(largest)
        self._n_lost += np.count_nonzero((largest > 0) & (largest < least))
        self._top = max(self._top, float(largest.max()))

    def refuse_if_many(self) -> None:
        """Raise NumericOverflow if most blocks are lost. A few are usual: neurons never active."""
        if self._n_lost > LARGEST_SHARE * self._n:
            raise NumericOverflow(
                f"tensor {self._name!r} has weights up to {self._top:.3g}, most of them too small "
                f"for {self._kind.name}; choose --type bf16 or f32"
            )
