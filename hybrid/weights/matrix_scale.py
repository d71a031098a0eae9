"""The scale of a whole matrix: a power of two that brings its weights into a format's range.

q8 and q4 have fp16 scales of blocks. Weights below 1e-3 or so make these scales subnormal, which
loses precision, and much smaller ones make them zero. The same holds for fp16 weights below 6e-5,
and those above 65504 are infinite. Such a matrix is packed divided by its matrix scale. The kernels
multiply dot products by it, which is exact. Ordinary matrices have the scale 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import InvalidCheckpoint
from hybrid.kernels import Format
from hybrid.model.weights import sampled_rows
from hybrid.weights.formats import BLOCK, whole_blocks

# Of a matrix with more rows, about so many evenly spread ones are looked at for small blocks.
SAMPLED_ROWS = 1024
# A matrix gets a scale if more than this share of its blocks would lose precision without one. A
# few such blocks are usual: the rows of neurons that never fire, or of tokens that were never seen.
USUAL_SHARE = 1 / 256
# It is refused if more than this share of its blocks loses precision with the best scale.
LARGEST_SHARE = 1 / 2
_LARGEST_EXPONENT = 126  # 2**126 and 2**-126 are normal fp32 numbers


class WeightRange(NamedTuple):
    """Which weights a format holds without a matrix scale."""

    least: float  # a block whose largest weight is smaller loses precision
    most: float  # the largest weight
    top: int  # a matrix with a scale has its largest packed weight just below 2**top


RANGES = {
    # Far from subnormal numbers, which some instruction sets take for zero.
    Format.bf16: WeightRange(2.0**-96, 255 * 2.0**120, 0),
    # A block's largest weight is then a normal number. What is smaller has its absolute precision.
    # fp16 weights of any size are packed to the bit: they never get a scale above 1.
    Format.f16: WeightRange(2.0**-14, 65504.0, 15),
    # A block's scale of 2**-16 is rounded to 1/512 of it, as finely as the block's int8 values.
    Format.q8: WeightRange(127 * 2.0**-16, 127 * 65504.0, 22),
    # The same for the scales of q4: 1/128, where the nibbles are rounded to 1/16.
    Format.q4: WeightRange(8 * 2.0**-18, 7 * 65504.0, 18),
}


class Magnitudes(NamedTuple):
    """How large the weights of a matrix are."""

    top: float  # the largest of all
    of_blocks: NDArray[np.float32]  # the largest of each block in the sampled rows


def find_matrix_scale(format: Format, w: NDArray[np.float32], name: str) -> float:
    """Return the scale of the matrix w (rows, n), whose blocks lie along n.

    Raises InvalidCheckpoint, naming the matrix, if weights are not finite, or if they differ so
    much in size that the format cannot hold them with any scale.
    """
    of_blocks = largest_of_blocks(w[sampled_rows(len(w), SAMPLED_ROWS)])
    return scale_for(format, Magnitudes(check_finite(w, name), of_blocks), name)


def scale_for(format: Format, magnitudes: Magnitudes, name: str) -> float:
    """Return the scale of a matrix with such magnitudes. Raises InvalidCheckpoint."""
    least, most, exponent = RANGES[format]
    top, nonzero = magnitudes.top, magnitudes.of_blocks[magnitudes.of_blocks > 0]
    if top <= most and is_usual(format, magnitudes.of_blocks):
        return 1.0
    power = min(max(math.frexp(top)[1] - exponent, -_LARGEST_EXPONENT), _LARGEST_EXPONENT)
    still_lost = np.count_nonzero(nonzero < math.ldexp(least, power))
    if still_lost > LARGEST_SHARE * nonzero.size:
        raise InvalidCheckpoint(
            f"{name} holds weights up to {top:g}, but most of its blocks of {BLOCK} weights are so "
            f"much smaller that {format.name} cannot hold them"
            + ("" if format is Format.bf16 else "; load it with quant bf16")
        )
    if top <= most and still_lost >= np.count_nonzero(nonzero < least):
        return 1.0
    return math.ldexp(1.0, power)


def is_usual(format: Format, of_blocks: NDArray[np.float32]) -> bool:
    """Return whether few of the blocks are too small for the format."""
    nonzero = of_blocks[of_blocks > 0]
    return bool(np.count_nonzero(nonzero < RANGES[format].least) <= USUAL_SHARE * nonzero.size)


def largest_of_blocks(w: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the largest magnitude of each block of w (rows, n). The last may be shorter."""
    largest = np.abs(w)
    padding = whole_blocks(w.shape[1]) - w.shape[1]
    if padding:
        largest = np.pad(largest, [(0, 0), (0, padding)])
    for _ in range(int(math.log2(BLOCK))):
        largest = np.maximum(largest[:, 0::2], largest[:, 1::2])
    return largest


def check_finite(w: NDArray[np.float32], name: str) -> float:
    """Return the largest magnitude in w. Raises InvalidCheckpoint for NaN and infinity."""
    largest = max(float(w.max()), -float(w.min()))  # NaN if any weight is NaN
    if not math.isfinite(largest):
        raise InvalidCheckpoint(f"{name} holds values that are not finite; its weights are broken")
    return largest
