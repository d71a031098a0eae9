"""The preview of a head estimates its logits as the oracle does, and chosen rows are computed in
full, on every instruction set.
"""

from __future__ import annotations

import numpy as np
import pytest
from numerics import quantize_tokens

from hybrid.kernels import Format, _native, reference
from hybrid.weights.packed_rows import pack_row_major
from hybrid.weights.preview import TILE, pack_preview, preview_bytes, round_preview

SIZES = [(16, 32), (7, 32), (20, 8), (33, 100), (61, 288), (530, 1536)]


def random(n_rows: int, n_cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return weights whose rows differ in length, and an x."""
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(0.1, 2.0, (n_rows, 1))
    w = (rng.standard_normal((n_rows, n_cols)) * lengths).astype(np.float32)
    return w, rng.standard_normal(n_cols).astype(np.float32)


@pytest.mark.parametrize(("n_rows", "n_cols"), SIZES)
def test_logits_match_the_oracle(isa, n_rows, n_cols):
    w, x = random(n_rows, n_cols)
    logits, maxima = _native.preview_logits(pack_preview(w), x)
    expected = reference.preview_logits(*round_preview(w), x)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert len(maxima) == -(-n_rows // TILE)
    for tile, largest in enumerate(maxima):
        assert largest == logits[tile * TILE : (tile + 1) * TILE].max()


def test_whole_numbers_are_exact_and_all_isas_agree(isa):
    """Two bits hold these weights exactly, and x is of whole numbers up to 127."""
    rng = np.random.default_rng(1)
    w = (rng.integers(0, 4, (40, 64)) - 1.5).astype(np.float32)
    w[:, :4] = [-1.5, -0.5, 0.5, 1.5]
    codes, scales = round_preview(w)
    np.testing.assert_array_equal((codes - 1.5) * scales[:, None], w)
    x = rng.integers(-127, 128, 64).astype(np.float32)
    x[0] = 127
    noise = reference.PREVIEW_VARIANCE / 2 * np.square(x).sum()
    logits, _ = _native.preview_logits(pack_preview(w), x)
    np.testing.assert_allclose(logits, w @ x - noise, rtol=1e-6)


def test_probabilities_are_right_on_average():
    """Two bits add noise to each logit, but not to the sum of the exponentials.

    The logits are also as large as they should be.
    """
    rng = np.random.default_rng(3)
    w = rng.standard_normal((40_000, 256)).astype(np.float32)
    x = rng.standard_normal(256).astype(np.float32) / 16
    logits, _ = _native.preview_logits(pack_preview(w), x)
    exact = w @ x
    noise = float(np.std(logits - exact))
    assert 0.3 < noise < 0.45
    assert abs(np.log(np.exp(logits).sum() / np.exp(exact).sum())) < 0.2 * noise**2 / 2
    assert 0.99 < np.polyfit(exact, logits, 1)[0] < 1.01


def test_zero_rows_and_x_give_zero_and_a_broken_x_gives_nan(isa):
    w, x = random(20, 64)
    w[3] = 0
    logits, _ = _native.preview_logits(pack_preview(w), x)
    assert logits[3] == 0
    assert np.count_nonzero(logits) == 19
    logits, maxima = _native.preview_logits(pack_preview(w), np.zeros_like(x))
    assert not logits.any()
    assert not maxima.any()
    for broken in (np.nan, np.inf):
        x[5] = broken
        logits, maxima = _native.preview_logits(pack_preview(w), x)
        assert np.isnan(logits).all()
        assert (maxima == np.inf).all()


@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("n", [0, 1, 3, 4, 37])
@pytest.mark.parametrize("n_cols", [36, 288])
def test_dots_of_chosen_rows_equal_gemm_to_the_last_bit(isa, format, n, n_cols):
    w, x = random(61, n_cols)
    rows = pack_row_major(format, w)
    quantized = quantize_tokens(format, x[None])
    everything = _native.gemm(rows, quantized, 0, 61)[0]
    chosen = np.sort(np.random.default_rng(2).permutation(61)[:n]).tolist()
    expected = np.zeros(61, np.float32)
    expected[chosen] = everything[chosen]
    np.testing.assert_array_equal(_native.gather_dots(rows, chosen, quantized[0]), expected)


def test_bad_arguments_are_refused():
    w, x = random(20, 64)
    preview = pack_preview(w)
    assert preview.n_bytes == preview_bytes(20, 64)
    with pytest.raises(ValueError, match="n_cols"):
        _native.preview_logits(preview, x[:32])
    with pytest.raises(ValueError, match="bytes of all tiles"):
        _native.Preview(n_rows=40, n_cols=64, tiles=_native.allocate_bytes(preview.n_bytes))
    with pytest.raises(ValueError, match="preview sizes"):
        _native.Preview(n_rows=20, n_cols=0, tiles=_native.allocate_bytes(64))
    rows = pack_row_major(Format.q8, w)
    with pytest.raises(ValueError, match="row range"):
        _native.gather_dots(rows, [20], quantize_tokens(Format.q8, x[None])[0])
