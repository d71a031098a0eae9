"""Predictor kernels name the oracle's neurons on every instruction set, and gate rows of all other
neurons are not read.
"""

from __future__ import annotations

import numpy as np
import pytest
from numerics import quantize_tokens

from hybrid.kernels import Activation, Format, Rows, _native, reference
from hybrid.weights.formats import partial_order
from hybrid.weights.packed_predictor import pack_predictor
from hybrid.weights.packed_rows import pack_bit_reversed, pack_bundles, pack_matrix
from predictors.predictors import WIDE_RANK, LowRank, round_blocks

EVERYTHING_FIRES = (Activation.fatrelu, -1e30)


def telltale_rows(format: Format, n_neurons: int, hidden: int) -> tuple[Rows, Rows, Rows]:
    """Return gate, up and down of an FFN whose output j is positive if neuron j was computed.

    Gate and up rows select the first element of x, which is positive; down is the identity.
    """
    assert n_neurons <= hidden
    first = np.zeros((n_neurons, hidden), np.float32)
    first[:, 0] = 1.0
    down = np.eye(n_neurons, hidden, dtype=np.float32)
    return pack_bit_reversed(format, first), *pack_bundles(format, first, down)


def predicted(
    format: Format,
    predictor: LowRank,
    margin: float,
    x: np.ndarray,
    n_neurons: int,
    first: int = 0,
    last: int | None = None,
) -> np.ndarray:
    """Return which neurons the kernel computed: (n_tokens, n_neurons) truth values."""
    x = x.copy()
    x[:, 0] = np.abs(x[:, 0]) + 1
    last = n_neurons if last is None else last
    rows = telltale_rows(format, n_neurons, x.shape[1])
    out, n_active, n_predicted = _native.sparse_ffn(
        *rows,
        quantize_tokens(format, x),
        first,
        last,
        *EVERYTHING_FIRES,
        False,
        pack_predictor(format, predictor, margin),
    )
    assert n_active == n_predicted
    order, unit = partial_order(format, x.shape[1])
    computed = (out[:, order] * unit)[:, :n_neurons] > 0
    assert computed.sum() == n_predicted
    return computed


def whole_lowrank(rng: np.random.Generator, rank: int, n_neurons: int, hidden: int) -> LowRank:
    """Return a predictor of whole numbers with z within int8, so that nothing is rounded."""
    a = np.zeros((rank, hidden), np.float32)
    a[np.arange(rank), rng.integers(0, hidden, rank)] = 1.0
    return LowRank(
        a,
        random_columns(rng, n_neurons, rank),
        np.array([[1.0, 16.0]], np.float32).repeat(n_neurons, 0),
        rng.integers(-9, 10, n_neurons).astype(np.float32) + np.float32(0.5),
    )


def random_columns(rng: np.random.Generator, n_neurons: int, rank: int) -> np.ndarray:
    """Return random integers over the whole range of `LowRank.b`."""
    columns = rng.integers(-8, 8, (n_neurons, rank)).astype(np.int8)
    columns[:, :WIDE_RANK] = rng.integers(-127, 128, (n_neurons, WIDE_RANK))
    return columns


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize(
    ("rank", "n_neurons", "hidden"),
    [(4, 7, 32), (16, 16, 64), (20, 61, 288), (28, 61, 288), (64, 250, 512)],
)
def test_lowrank_of_whole_numbers_is_exact(isa, format, rank, n_neurons, hidden, n_tokens):
    rng = np.random.default_rng(rank)
    x = rng.integers(-127, 128, (n_tokens, hidden)).astype(np.float32)
    # `predicted` adds 1 to the first column. Then 127 is the largest value of each block and of z.
    x[:, ::32] = 126
    x[:, 1::32] = 127
    predictor = whole_lowrank(rng, rank, n_neurons, hidden)
    predictor.a[0] = 0
    predictor.a[0, 1] = 1  # z holds 127, so its scale is 1
    actual = predicted(format, predictor, 0.0, x, n_neurons)
    seen = x.copy()
    seen[:, 0] += 1
    z = seen @ predictor.a.T
    columns = predictor.b.astype(np.float32)
    columns[:, WIDE_RANK:] *= 16
    expected = z @ columns.T + predictor.bias >= 0
    np.testing.assert_array_equal(actual, expected)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize(
    ("rank", "n_neurons", "hidden"), [(12, 33, 96), (12, 33, 100), (64, 200, 256)]
)
def test_lowrank_matches_the_oracle(isa, format, rank, n_neurons, hidden):
    """Scores so near zero that rounding may change their sign are left out."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, hidden)).astype(np.float32)
    x[:, 0] = np.abs(x[:, 0]) + 1
    predictor = LowRank(
        round_blocks(rng.standard_normal((rank, hidden)).astype(np.float32)),
        random_columns(rng, n_neurons, rank),
        rng.uniform(0.5, 2, (n_neurons, 2)).astype(np.float32) * np.array([1, 16], np.float32),
        rng.standard_normal(n_neurons).astype(np.float32) * 100,
    )
    shown = x.copy()
    shown[:, 0] -= 1
    actual = predicted(format, predictor, 3.0, shown, n_neurons)
    scores = predictor.scores(reference.round_activation(format, x)) + 3.0
    is_clear = np.abs(scores) > 0.02 * np.abs(scores).max()
    assert is_clear.mean() > 0.8
    np.testing.assert_array_equal(actual[is_clear], (scores >= 0)[is_clear])


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_pieces_name_the_same_neurons_as_the_whole(isa, format, n_tokens):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n_tokens, 128)).astype(np.float32)
    predictor = whole_lowrank(rng, 20, 100, 128)
    whole = predicted(format, predictor, 0.0, x, 100)
    parts = np.zeros_like(whole)
    for first, last in ((0, 8), (8, 24), (24, 24), (24, 80), (80, 100)):
        part = predicted(format, predictor, 0.0, x, 100, first, last)
        assert not part[:, :first].any()
        assert not part[:, last:].any()
        parts |= part
    np.testing.assert_array_equal(parts, whole)
    assert whole.any()


def test_gate_rows_of_the_others_are_not_read(isa, format):
    """Gate rows that are not named are NaN. NaN fires, so a read of one would show."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((1, 256)).astype(np.float32)
    bias = np.where(np.arange(96) % 3 == 0, 1e9, -1e9).astype(np.float32)
    predictor = LowRank(
        np.ones((4, 256), np.float32), np.ones((96, 4), np.int8), np.ones((96, 2), np.float32), bias
    )
    gate = rng.standard_normal((96, 256)).astype(np.float32)
    gate[bias < 0] = np.nan
    up, down = rng.standard_normal((2, 96, 256)).astype(np.float32)
    out, n_active, n_predicted = _native.sparse_ffn(
        pack_bit_reversed(format, gate),
        *pack_bundles(format, up, down),
        quantize_tokens(format, x),
        0,
        96,
        Activation.relu,
        0.0,
        False,
        pack_predictor(format, predictor, 0.0),
    )
    assert n_predicted == 32
    assert 0 < n_active < 32
    assert np.isfinite(out).all()


def test_an_input_that_is_nan_gives_nan(isa, format):
    x = np.full((1, 64), np.nan, np.float32)
    predictor = LowRank(
        np.ones((4, 64), np.float32),
        np.ones((20, 4), np.int8),
        np.ones((20, 2), np.float32),
        np.full(20, -1.0, np.float32),
    )
    rows = telltale_rows(format, 20, 64)
    native = pack_predictor(format, predictor, 0.0)
    out, n_active, _ = _native.sparse_ffn(
        *rows, quantize_tokens(format, x), 0, 20, Activation.relu, 0.0, False, native
    )
    assert n_active == 20
    assert np.isnan(out).any()


@pytest.mark.parametrize("what", ["tiles", "rank", "format", "neurons"])
def test_predictors_that_do_not_fit_are_refused(what):
    tiles = np.zeros(2 * (64 + 192), np.uint8)
    rank, format, n_neurons = 4, Format.q8, 20
    if what == "tiles":
        tiles = tiles[:-4]
    elif what == "rank":
        rank = 6
    elif what == "format":
        format = Format.bf16
    else:
        n_neurons = 40
    first = pack_matrix(Format.q4, np.zeros((rank, 64), np.float32))
    with pytest.raises(ValueError, match=r"tiles|matrix"):
        _native.Predictor(format=format, n_neurons=n_neurons, tiles=tiles, first_matrix=first)
