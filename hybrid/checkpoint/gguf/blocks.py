"""GGUF's types of weights: how the bytes of a block become float32 values.

Layouts and arithmetic are those of ggml (github.com/ggml-org/ggml: ggml-common.h, ggml-quants.c).
Each function takes blocks as bytes (n, bytes of a block) and returns their values (n, values of a
block). A block's scale `d`, and the least value `m` where there is one, are fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class BlockType(NamedTuple):
    """A type of weights."""

    name: str
    n_values: int  # of a block
    n_bytes: int  # of a block
    values: Callable[[Bytes], Floats]

    @property
    def is_read(self) -> bool:
        """Whether hybrid knows the values of a block. Of all types it knows the size."""
        return self.values is not _unknown_values


def _unknown_values(data: Bytes) -> Floats:
    raise AssertionError("a tensor of this type is refused before its values are read")


def _fp16(data: Bytes) -> Floats:
    """Return the fp16 values (n, k) of bytes (n, 2 k)."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _nibbles(data: Bytes) -> NDArray[np.int16]:
    """Return the low halves of all bytes, then the high ones."""
    return np.concatenate([data & 15, data >> 4], axis=1).astype(np.int16)


def _bits(data: Bytes) -> NDArray[np.int16]:
    """Return the bits (n, 8 k) of bytes (n, k), the lowest of each byte first."""
    return np.unpackbits(data, axis=1, bitorder="little").astype(np.int16)


def _f32(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view("<f4").astype(np.float32, copy=False)


def _bf16(data: Bytes) -> Floats:
    bits = np.ascontiguousarray(data).view("<u2").astype(np.uint32) << 16
    return bits.view(np.float32)


def _q8_0(data: Bytes) -> Floats:
    return _fp16(data[:, :2]) * np.ascontiguousarray(data[:, 2:]).view(np.int8)


def _q4_0(data: Bytes) -> Floats:
    return _fp16(data[:, :2]) * (_nibbles(data[:, 2:]) - 8)


def _q4_1(data: Bytes) -> Floats:
    return _fp16(data[:, :2]) * _nibbles(data[:, 4:]) + _fp16(data[:, 2:4])


def _q5_0(data: Bytes) -> Floats:
    return _fp16(data[:, :2]) * (_nibbles(data[:, 6:]) + 16 * _bits(data[:, 2:6]) - 16)


def _q5_1(data: Bytes) -> Floats:
    values = _nibbles(data[:, 8:]) + 16 * _bits(data[:, 4:8])
    return _fp16(data[:, :2]) * values + _fp16(data[:, 2:4])


_IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _iq4_nl(data: Bytes) -> Floats:
    return _fp16(data[:, :2]) * _IQ4_VALUES[_nibbles(data[:, 2:])]


def _mxfp4(data: Bytes) -> Floats:
    """The scale is a power of two; values are twice those of the E2M1 format."""
    scale = np.ldexp(np.float32(1), data[:, :1].astype(np.int32) - 128)
    return scale.astype(np.float32) * _MXFP4_VALUES[_nibbles(data[:, 1:])]


# Types whose name ends in K have super-blocks of 256 values: parts with small scales of their own.


def _scaled(parts: Floats, scales: Floats) -> Floats:
    """Multiply parts (n, parts, values) by their scales (n, parts)."""
    return (parts * scales[:, :, None]).reshape(len(parts), -1)


def _six_bit_scales(data: Bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the eight scales and the eight minima of 12 bytes of a Q4_K or Q5_K block."""
    low, middle, high = data[:, :4], data[:, 4:8], data[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales, minima


def _halves(data: Bytes) -> NDArray[np.int16]:
    """Return parts (n, 8, 32): of each 32 bytes the low halves, then the high ones."""
    groups = data.reshape(len(data), 4, 1, 32)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(-1, 8, 32).astype(np.int16)


def _with_minima(data: Bytes, parts: NDArray[np.int16]) -> Floats:
    scales, minima = _six_bit_scales(data[:, 4:16])
    d, m = _fp16(data[:, :2]), _fp16(data[:, 2:4])
    values = (d * scales)[:, :, None] * parts - (m * minima)[:, :, None]
    return values.reshape(len(data), 256)


def _q4_k(data: Bytes) -> Floats:
    return _with_minima(data, _halves(data[:, 16:]))


def _q5_k(data: Bytes) -> Floats:
    # Bit p of byte l is the fifth bit of value l in part p.
    fifth = _bits(data[:, 16:48]).reshape(-1, 32, 8).transpose(0, 2, 1)
    return _with_minima(data, _halves(data[:, 48:]) + 16 * fifth)


def _q6_k(data: Bytes) -> Floats:
    low = data[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = data[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    parts = (low | ((high & 3) << 4)).astype(np.int16) - 32
    scales = np.ascontiguousarray(data[:, 192:208]).view(np.int8)
    return _scaled(parts.reshape(-1, 16, 16).astype(np.float32), _fp16(data[:, 208:]) * scales)


def _two_bits(data: Bytes) -> NDArray[np.int16]:
    """Return parts (n, 16, 16) of 64 bytes: of each 32 bytes the lowest two bits first."""
    groups = data.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (groups & 3).reshape(-1, 16, 16).astype(np.int16)


def _q2_k(data: Bytes) -> Floats:
    scales, d, m = data[:, :16], _fp16(data[:, 80:82]), _fp16(data[:, 82:84])
    parts = _two_bits(data[:, 16:80]).astype(np.float32)
    values = (d * (scales & 15))[:, :, None] * parts - (m * (scales >> 4))[:, :, None]
    return values.reshape(len(data), 256)


def _q3_k(data: Bytes) -> Floats:
    high = _bits(data[:, :32]).reshape(-1, 32, 8).transpose(0, 2, 1).reshape(-1, 16, 16)
    packed = data[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    upper = packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scales = (low | upper.reshape(-1, 16) << 4).astype(np.int16) - 32
    parts = _two_bits(data[:, 32:96]) + 4 * high - 4
    return _scaled(parts.astype(np.float32), _fp16(data[:, 108:]) * scales)


def _iq4_xs(data: Bytes) -> Floats:
    upper = np.ascontiguousarray(data[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([data[:, 4:8] & 15, data[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scales = (low | (upper & 3) << 4).astype(np.int16) - 32
    quants = data[:, 8:].reshape(-1, 8, 16)
    parts = _IQ4_VALUES[np.concatenate([quants & 15, quants >> 4], axis=2)]
    return _scaled(parts, _fp16(data[:, :2]) * scales)


BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _f32),
    1: BlockType("F16", 1, 2, _fp16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    30: BlockType("BF16", 1, 2, _bf16),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}

# Types whose values hybrid does not read, with the sizes of their blocks.
UNREAD_TYPES: dict[int, BlockType] = {
    number: BlockType(name, n_values, n_bytes, _unknown_values)
    for number, name, n_values, n_bytes in (
        (9, "Q8_1", 32, 36),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
    )
}
