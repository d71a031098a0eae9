"""Kernels match the oracle: quantise, dequantise, pack, norm, sum partials, round to fp16."""

from __future__ import annotations

import numpy as np
import pytest
from numerics import assert_close, quantize_tokens

from hybrid.kernels import Format, KvFormat, ThreadPool, _native, reference
from hybrid.weights.formats import (
    column_order,
    has_blocks,
    interleave,
    pack_rows,
    partial_order,
    round_weights,
)
from hybrid.weights.packed_rows import pack_matrix, pack_row_major


@pytest.mark.parametrize("n", [8, 32, 36, 96, 100, 256, 320, 1536])
def test_quantize_matches_the_oracle_bit_by_bit(isa, format, n):
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32) * 5
    x[:32] = 0.0
    out = _native.quantize(format, x)
    padded = _native.padded_cols(format, n)
    if format is Format.bf16:
        values = reference.bf16_values(out.view(np.uint16))
    elif format is Format.f16:
        values = out.view(np.float32)
    else:
        q, rest = out[:padded].view(np.int8), out[padded:]
        scales = rest[: padded // 8].view(np.float32)
        corrections = rest[padded // 8 :].view(np.int32)
        natural = q[column_order(format, padded)].reshape(-1, 32)
        values = (natural * scales[:, None]).ravel()
        np.testing.assert_array_equal(corrections, -128 * natural.astype(np.int32).sum(1))
    np.testing.assert_array_equal(values[:n], reference.round_activation(format, x))
    assert not values[n:].any()


def test_a_block_of_tiny_values_stays_finite(isa):
    out = _native.quantize(Format.q8, np.full(32, 1e-40, np.float32))
    assert np.isfinite(out[256:288].view(np.float32)).all()


@pytest.mark.parametrize("n_cols", [8, 32, 36, 96, 100, 256, 544])
def test_dequantize_gives_the_rounded_weights(isa, format, n_cols):
    w = np.random.default_rng(0).standard_normal((5, n_cols)).astype(np.float32)
    rows, rounded = pack_matrix(format, w), round_weights(format, w)
    for row in range(5):
        np.testing.assert_array_equal(_native.dequantize(rows, row), rounded[row])
        np.testing.assert_array_equal(_native.dequantize(rows, row, 2.0), rounded[row] * 2)


@pytest.mark.parametrize("n", [8, 32, 36, 96, 256, 288, 301, 1536])
@pytest.mark.parametrize("n_pieces", [1, 2, 16])
def test_add_partials_adds_the_second_half_to_the_first(isa, format, n, n_pieces):
    rng = np.random.default_rng(n)
    padded = _native.padded_cols(format, n)
    partials = rng.standard_normal((n_pieces, padded)).astype(np.float32)
    x = rng.standard_normal(n).astype(np.float32)
    total = partials
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    order, unit = partial_order(format, n)
    expected = x + np.float32(0.3) * (total[0, order] * unit)
    actual = _native.add_partials(format, partials, 0.3, x)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [8, 32, 36, 96, 100, 1536])
def test_rms_norm_matches_the_oracle(isa, n):
    rng = np.random.default_rng(n)
    x, weight = rng.standard_normal((2, n)).astype(np.float32)
    actual = _native.rms_norm(x, weight, 1e-5, 0.25)
    expected = reference.rms_norm(x, weight, 1e-5) * np.float32(0.25)
    assert_close(actual, expected, scale=np.abs(expected) + 1e-6)


def test_to_fp16_rounds_as_numpy_does(isa):
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e6, -1e6, 6e-8, 2.9e-8, 3.1e-8, 6.1e-5]
    spread = rng.standard_normal(1000) * np.exp(rng.uniform(-20, 12, 1000))
    x = np.concatenate([special, [np.inf, -np.inf], spread]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(_native.to_fp16(x), expected.view(np.uint16))
    assert np.isnan(_native.to_fp16(np.array([np.nan], np.float32)).view(np.float16)).all()


@pytest.mark.parametrize("kv", KvFormat, ids=lambda kv: kv.name)
@pytest.mark.parametrize("n", [1, 16, 30, 128])
def test_to_kv_rounds_as_the_oracle_and_finds_the_largest(isa, kv, n):
    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * np.exp(rng.uniform(-20, 20, n))).astype(np.float32)
    x[n // 2] = -3e7
    bits, largest = _native.to_kv(kv, x)
    values = bits.view(np.float16) if kv is KvFormat.fp16 else reference.bf16_values(bits)
    np.testing.assert_array_equal(values.astype(np.float32), reference.round_kv(kv, x))
    assert largest == np.abs(x).max()
    x[0] = np.nan
    assert np.isnan(_native.to_kv(kv, x)[1])


@pytest.mark.parametrize("matrix_scale", [2.0**-60, 2.0**40])
def test_a_matrix_scale_multiplies_every_weight(isa, format, matrix_scale):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((9, 288), np.float32), rng.standard_normal((3, 288), np.float32)
    rows, quantized = pack_matrix(format, w), quantize_tokens(format, x)
    scaled = rows.scaled(matrix_scale)
    assert (rows.matrix_scale, scaled.matrix_scale) == (1.0, matrix_scale)
    for row in range(9):
        expected = _native.dequantize(rows, row, 3.0) * np.float32(matrix_scale)
        np.testing.assert_array_equal(_native.dequantize(scaled, row, 3.0), expected)
    expected = _native.gemm(rows, quantized, 0, 9) * np.float32(matrix_scale)
    np.testing.assert_array_equal(_native.gemm(scaled, quantized, 0, 9), expected)
    row_major = pack_row_major(format, w)
    dots = _native.gather_dots(row_major, [1, 4, 5, 7, 8], quantized[0])
    np.testing.assert_array_equal(
        _native.gather_dots(row_major.scaled(matrix_scale), [1, 4, 5, 7, 8], quantized[0]),
        dots * np.float32(matrix_scale),
    )


@pytest.mark.parametrize("n_cols", [8, 36, 96])
def test_packed_padding_is_zero(format, n_cols):
    """A padded column must add nothing in any kernel."""
    w = np.random.default_rng(0).standard_normal((3, n_cols)).astype(np.float32)
    values, scales = pack_rows(format, w)
    pad = np.setdiff1d(np.arange(_native.padded_cols(format, n_cols)), column_order(format, n_cols))
    if not has_blocks(format):
        assert not values.view(np.uint16)[:, pad].any()
        return
    assert not scales.view(np.float16)[:, -(-n_cols // 32) :].any()
    if format is Format.q8:
        assert (values[:, pad] == 128).all()
    else:
        positions = np.concatenate([values & 15, values >> 4], 1)  # of the only group
        assert (positions[:, pad] == 8).all()


@pytest.mark.parametrize("n_cols", [8, 32, 36, 96, 100, 288, 1536])
def test_packed_bytes_equal_the_oracles(isa, format, n_cols):
    rng = np.random.default_rng(n_cols)
    w = rng.standard_normal((40, n_cols), np.float32) * rng.uniform(1e-8, 2, (40, 1))
    w = w.astype(np.float32)
    w[0], w[1], w[2, :32], w[3] = 0, -1, np.arange(-16, 16)[:n_cols], 1e-12
    values, scales = pack_rows(format, w)
    actual_values = np.full_like(values, 7)
    actual_scales = np.full_like(scales, 7) if scales.size else None
    _native.pack_rows(format, w, actual_values, actual_scales)
    np.testing.assert_array_equal(actual_values, values)
    if actual_scales is not None:
        np.testing.assert_array_equal(actual_scales, scales)


@pytest.mark.parametrize("n_cols", [8, 32, 100, 288, 1536])
def test_interleaved_bytes_equal_the_oracles(isa, format, n_cols):
    w = np.random.default_rng(n_cols).standard_normal((7, n_cols), np.float32)
    padded = np.concatenate([w, np.zeros((1, n_cols), np.float32)])
    expected = interleave(format, *pack_rows(format, padded))
    actual = np.full_like(expected, 7)
    _native.pack_interleaved(format, w, actual)
    np.testing.assert_array_equal(actual, expected)


def test_interleaved_bytes_lie_as_documented():
    """A tile of four rows holds, group by group, the scales of its rows and then their values."""
    w = np.random.default_rng(8).standard_normal((8, 512), np.float32)
    values, scales = pack_rows(Format.q4, w)
    tiles = interleave(Format.q4, values, scales)
    for row in range(8):
        for group in range(2):
            start = row // 4 * 4 * (256 + 32) + group * 4 * (128 + 16)
            at = start + row % 4 * 16
            np.testing.assert_array_equal(
                tiles[at : at + 16], scales[row, 16 * group : 16 * (group + 1)]
            )
            at = start + 64 + row % 4 * 128
            np.testing.assert_array_equal(
                tiles[at : at + 128], values[row, 128 * group : 128 * (group + 1)]
            )


def test_reading_memory_sums_it(isa):
    pool = ThreadPool(2)
    assert pool.read(np.ones(1 << 20, np.float32)) == 1 << 20
    assert pool.read(np.arange(256, dtype=np.float32)) == 255 * 128
    with pytest.raises(ValueError, match="128 floats"):
        pool.read(np.ones(100, np.float32))
