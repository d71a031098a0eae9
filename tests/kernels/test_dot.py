"""Dot products of packed rows with quantised vectors match the oracle in every format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_close, quantize_tokens

from hybrid.kernels import Format, Rows, _native, reference
from hybrid.weights.formats import round_weights
from hybrid.weights.packed_rows import pack_bundles, pack_matrix


@given(
    n_rows=st.integers(1, 23),
    n_cols=st.integers(1, 640),
    n_tokens=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gemm_matches_the_oracle(isa, format, n_rows, n_cols, n_tokens, seed, data):
    first = data.draw(st.integers(0, n_rows))
    last = data.draw(st.integers(first, n_rows))
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n_rows, n_cols), np.float32)
    x = rng.standard_normal((n_tokens, n_cols), np.float32) * 3
    actual = _native.gemm(pack_matrix(format, w), quantize_tokens(format, x), first, last)
    w_hat = round_weights(format, w)[first:last]
    x_hat = reference.round_activation(format, x)
    assert_close(actual, x_hat @ w_hat.T, scale=np.abs(x_hat) @ np.abs(w_hat).T)


@pytest.mark.parametrize("n_cols", [32, 256, 1536, 4096])
def test_a_result_does_not_depend_on_its_neighbours(isa, format, n_cols):
    """Rows and tokens are computed in tiles. The tiles must not change the bits."""
    rng = np.random.default_rng(1)
    rows = pack_matrix(format, rng.standard_normal((11, n_cols), np.float32))
    x = quantize_tokens(format, rng.standard_normal((7, n_cols), np.float32))
    together = _native.gemm(rows, x, 0, 11)
    for row in range(11):
        for token in range(7):
            alone = _native.gemm(rows, x[token : token + 1], row, row + 1)
            assert alone[0, 0] == together[token, row]


@pytest.mark.parametrize("n_cols", [1, 8, 36, 100, 288, 300])
def test_padding_does_not_change_a_bit(isa, format, n_cols):
    """Rows of any length give the dot products of the same rows with zeros behind them."""
    rng = np.random.default_rng(7)
    w, x = rng.standard_normal((9, n_cols), np.float32), rng.standard_normal((3, n_cols))
    results = []
    for padding in (0, -n_cols % 32):
        wide, long = (np.pad(v, ((0, 0), (0, padding))).astype(np.float32) for v in (w, x))
        results.append(_native.gemm(pack_matrix(format, wide), quantize_tokens(format, long), 0, 9))
    np.testing.assert_array_equal(*results)


def test_integers_are_exact(isa, format):
    """For whole numbers with scale 1, every order of sums must give the same fp32."""
    rng = np.random.default_rng(2)
    w = rng.integers(-3, 4, (9, 352)).astype(np.float32)
    x = rng.integers(-3, 4, (5, 352)).astype(np.float32)
    w[:, ::32], x[:, ::32] = -8 if format is Format.q4 else 127, -127
    actual = _native.gemm(pack_matrix(format, w), quantize_tokens(format, x), 0, 9)
    np.testing.assert_array_equal(actual, x @ w.T)


def test_extreme_int8_values_do_not_saturate(isa):
    w = np.full((4, 256), 127, np.float32) * np.where(np.arange(256) % 2, -1, 1).astype(np.float32)
    for x in (w[:1], -w[:1], np.abs(w[:1])):
        actual = _native.gemm(pack_matrix(Format.q8, w), quantize_tokens(Format.q8, x), 0, 4)
        np.testing.assert_array_equal(actual, x @ w.T)


def test_bundled_rows_equal_row_major_rows(isa, format):
    rng = np.random.default_rng(3)
    up, down = rng.standard_normal((2, 13, 96), np.float32)
    x = quantize_tokens(format, rng.standard_normal((3, 96), np.float32))
    for bundled, w in zip(pack_bundles(format, up, down), (up, down), strict=True):
        np.testing.assert_array_equal(
            _native.gemm(bundled, x, 0, 13), _native.gemm(pack_matrix(format, w), x, 0, 13)
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_gives_no_finite_result(isa, format, bad):
    """Broken activations must not become plausible numbers."""
    x = np.ones((1, 64), np.float32)
    x[0, 40] = bad
    rows = pack_matrix(format, np.ones((1, 64), np.float32))
    assert not np.isfinite(_native.gemm(rows, quantize_tokens(format, x), 0, 1)).any()


def test_bad_arguments_are_refused(format):
    rows = pack_matrix(format, np.ones((4, 64), np.float32))
    x = quantize_tokens(format, np.ones((1, 64), np.float32))
    for first, last in ((-1, 4), (0, 5), (3, 2)):
        with pytest.raises(ValueError, match="row range"):
            _native.gemm(rows, x, first, last)
    with pytest.raises(ValueError, match="quantised vectors"):
        _native.gemm(rows, x[:, :-1].copy(), 0, 4)


def test_rows_beyond_their_array_are_refused(format):
    memory = np.zeros(4096, np.uint8)
    good = {"format": format, "memory": memory, "n_rows": 2, "n_cols": 32}
    row_major = good | {"row_stride": 272, "scales_offset": 256}
    Rows(**good)
    Rows(**row_major)
    for start, change in (
        (good, {"n_rows": 65}),
        (good, {"n_rows": 0}),
        (good, {"n_cols": 2**31 - 1}),
        (good, {"offset": 4090}),
        (good, {"offset": -64}),
        (good, {"offset": 1}),
        (row_major, {"n_rows": 100}),
        (row_major, {"n_rows": 3, "row_stride": 2**62}),
        (row_major, {"row_stride": 8}),
        (row_major, {"offset": 4000}),
        (row_major, {"scales_offset": -2}),
    ):
        with pytest.raises(ValueError, match=r"range|beyond|aligned"):
            Rows(**start | change)


def test_interleaved_rows_may_be_of_any_number(isa, format):
    """The last tile may not be full, and ranges may begin and end within tiles."""
    rng = np.random.default_rng(6)
    x = quantize_tokens(format, rng.standard_normal((2, 288), np.float32))
    w = rng.standard_normal((11, 288), np.float32)
    whole = _native.gemm(pack_matrix(format, w), x, 0, 11)
    for n_rows in range(1, 12):
        rows = pack_matrix(format, w[:n_rows])
        for first in range(n_rows):
            np.testing.assert_array_equal(
                _native.gemm(rows, x, first, n_rows), whole[:, first:n_rows]
            )
