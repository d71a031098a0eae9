"""Weight formats round as specified, and packed bytes lie as documented."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.kernels import Format, _native, reference
from hybrid.weights.formats import (
    column_order,
    has_blocks,
    pack_rows,
    partial_order,
    quantize_q4,
    quantize_q8,
    round_weights,
    row_bytes,
)


def test_q8_errs_by_half_a_step_at_most():
    w = np.random.default_rng(0).standard_normal((50, 320)).astype(np.float32)
    q, scales = quantize_q8(w)
    assert np.abs(q.astype(int)).max() <= 127
    error = np.abs(round_weights(Format.q8, w) - w).reshape(*scales.shape, 32)
    assert (error <= scales.astype(np.float32)[..., None] * 0.5001).all()


@pytest.mark.parametrize("n_cols", [1, 8, 36, 100, 288])
def test_zeros_fill_up_the_last_block(format, n_cols):
    """A row of any length rounds as the same row with zeros behind it."""
    w = np.random.default_rng(6).standard_normal((5, n_cols)).astype(np.float32)
    padded = np.pad(w, ((0, 0), (0, 320 - n_cols)))
    rounded = round_weights(format, padded)
    np.testing.assert_array_equal(round_weights(format, w), rounded[:, :n_cols])
    assert not rounded[:, n_cols:].any()
    width = row_bytes(format, n_cols)
    for own, wide, n_bytes in zip(
        pack_rows(format, w), pack_rows(format, padded), width, strict=True
    ):
        assert own.shape == (5, n_bytes)
        if not has_blocks(format):
            np.testing.assert_array_equal(own, wide[:, :n_bytes])


def test_q8_rounding_is_idempotent():
    """Weights that came from q8 do not change if packed again, so importing them is lossless."""
    w = round_weights(
        Format.q8, np.random.default_rng(1).standard_normal((20, 96)).astype(np.float32)
    )
    np.testing.assert_array_equal(round_weights(Format.q8, w), w)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-7, 6e4, 1e-12])
def test_q8_keeps_constant_blocks(value):
    w = np.full((1, 32), value, np.float32)
    rounded = round_weights(Format.q8, w)
    assert np.isfinite(rounded).all()
    np.testing.assert_allclose(rounded, w, rtol=5e-4, atol=4e-6)


def test_bf16_of_bf16_weights_is_exact():
    w = reference.bf16_values(np.arange(0, 0x7F80, dtype=np.uint16)).reshape(-1, 32)
    np.testing.assert_array_equal(round_weights(Format.bf16, w), w)


def test_f16_of_fp16_weights_is_exact():
    w = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32).reshape(-1, 32)
    np.testing.assert_array_equal(round_weights(Format.f16, w), w)


@given(st.integers(0, 2**32 - 1))
def test_bf16_rounds_to_nearest_even(bits):
    x = np.array([bits], np.uint32).view(np.float32)
    rounded = reference.bf16_values(reference.bf16_bits(x))
    if np.isnan(x[0]):
        assert np.isnan(rounded[0])
        return
    low, high = (
        np.uint32(bits & 0xFFFF0000),
        np.uint32(min((bits & 0xFFFF0000) + 0x10000, 2**32 - 1)),
    )
    below, above = (np.array([b], np.uint32).view(np.float32)[0] for b in (low, high))
    remainder = bits & 0xFFFF
    goes_up = remainder > 0x8000 or (remainder == 0x8000 and (bits >> 16) & 1)
    assert rounded[0] == (above if goes_up else below) or np.isinf(rounded[0])


def test_q4_keeps_weights_that_have_four_bits():
    """Blocks as Q4_0 makes them, with the extreme value at -8, do not change."""
    rng = np.random.default_rng(3)
    integers = rng.integers(-7, 8, (20, 3, 32))
    integers[..., 5] = -8
    scales = rng.uniform(0.001, 0.1, (20, 3, 1)).astype(np.float16).astype(np.float32)
    w = (integers * scales * rng.choice([-1, 1], (20, 3, 1))).astype(np.float32).reshape(20, 96)
    np.testing.assert_array_equal(round_weights(Format.q4, w), w)


def test_q4_is_better_than_the_plain_rule():
    w = np.random.default_rng(4).standard_normal((200, 256)).astype(np.float32)
    blocks = w.reshape(-1, 32)
    extreme = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(1)][:, None]
    scales = (extreme / -8).astype(np.float16).astype(np.float32)
    plain = np.clip(np.rint(blocks / scales), -8, 7) * scales
    error = np.square(round_weights(Format.q4, w) - w).sum()
    assert error < 0.93 * np.square(plain - blocks).sum()


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-7, 1e-12])
def test_q4_keeps_constant_blocks(value):
    rounded = round_weights(Format.q4, np.full((1, 32), value, np.float32))
    np.testing.assert_allclose(rounded, value, rtol=2e-3, atol=4e-6)


def test_packed_q4_bytes_lie_as_documented():
    """Byte j of a group holds the nibbles of positions j and 128 + j of the q8 order."""
    w = np.random.default_rng(5).standard_normal((3, 288)).astype(np.float32)
    nibbles, scales = quantize_q4(w)
    values, packed_scales = pack_rows(Format.q4, w)
    assert (values.shape[1], packed_scales.shape[1]) == row_bytes(Format.q4, 288)
    for col in range(288):
        group, position = divmod(int(column_order(Format.q4, 288)[col]), 256)
        byte = values[:, group * 128 + position % 128]
        np.testing.assert_array_equal(byte >> 4 if position >= 128 else byte & 15, nibbles[:, col])
    np.testing.assert_array_equal(packed_scales.view(np.float16)[:, :9], scales)


@pytest.mark.parametrize("n_cols", [32, 96, 256, 288, 1536])
def test_packed_bytes_lie_as_documented(n_cols):
    """Byte 32 k + 4 b + c of a group of eight blocks is element 4 k + c of block b, plus 128."""
    w = np.random.default_rng(2).standard_normal((3, n_cols)).astype(np.float32)
    q, scales = quantize_q8(w)
    values, packed_scales = pack_rows(Format.q8, w)
    assert (values.shape[1], packed_scales.shape[1]) == row_bytes(Format.q8, n_cols)
    for col in range(n_cols):
        group, block, element = col // 256, col % 256 // 32, col % 32
        at = group * 256 + element // 4 * 32 + block * 4 + element % 4
        np.testing.assert_array_equal(values[:, at].astype(int) - 128, q[:, col])
        assert column_order(Format.q8, n_cols)[col] == at
    np.testing.assert_array_equal(packed_scales.view(np.float16)[:, : n_cols // 32], scales)


def test_partial_order_is_a_permutation(format):
    padded = _native.padded_cols(format, 512)
    order, unit = partial_order(format, padded)
    assert sorted(order) == list(range(padded))
    units = {Format.bf16: {0}, Format.f16: {0}, Format.q8: {0, -8}, Format.q4: {0, -4, -8, -12}}
    assert set(np.log2(unit)) == units[format]


def test_column_order_is_a_permutation(format):
    padded = _native.padded_cols(format, 1536)
    assert sorted(column_order(format, padded)) == list(range(padded))
