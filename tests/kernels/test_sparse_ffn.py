"""The gate-first sparse FFN matches the oracle, in parts and in any order of neurons.

It does not read the up and down rows of inactive neurons.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numerics import assert_close, quantize_tokens

from hybrid.kernels import Activation, Format, Rows, _native, reference
from hybrid.weights.formats import partial_order, round_weights
from hybrid.weights.packed_rows import pack_bundles, pack_matrix


class Ffn:
    """One random layer, packed, with its oracle's result for `n_tokens` tokens."""

    def __init__(
        self, format: Format, hidden: int, n_neurons: int, n_tokens: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        self.format, self.n_neurons = format, n_neurons
        self.matrices = rng.standard_normal((3, n_neurons, hidden), np.float32)
        self.x = rng.standard_normal((n_tokens, hidden), np.float32)
        self.x_hat = reference.round_activation(format, self.x)
        self.x_quantized = quantize_tokens(format, self.x)
        self.gate_hat, self.up_hat, self.down_hat = (
            round_weights(format, matrix) for matrix in self.matrices
        )
        gates = np.sort(np.abs(self.x_hat @ self.gate_hat.T).ravel())
        # The threshold lies in the widest gap of the middle half, so that no neuron is borderline.
        middle = gates[gates.size // 4 : max(gates.size * 3 // 4, gates.size // 4 + 2)]
        gap = int(np.argmax(np.diff(middle))) if middle.size > 1 else 0
        self.threshold = float(np.mean(middle[gap : gap + 2]))
        self.margin = float(np.diff(middle)[gap]) if middle.size > 1 else 0.0
        self.smallest_gate = float(gates[0])

    def pack(self, order: np.ndarray | slice = slice(None)) -> tuple[Rows, Rows, Rows]:
        gate, up, down = self.matrices[:, order]
        return pack_matrix(self.format, gate), *pack_bundles(self.format, up, down)

    def run(
        self,
        activation: Activation,
        rows: tuple[Rows, Rows, Rows] | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> tuple[np.ndarray, int]:
        """Return the output in natural column order.

        Also returns the number of active (neuron, token) pairs.
        """
        last = self.n_neurons if last is None else last
        gate, up, down = rows or self.pack()
        out, n_active, _ = _native.sparse_ffn(
            gate, up, down, self.x_quantized, first, last, activation, self.threshold
        )
        order, unit = partial_order(self.format, self.x.shape[1])
        return out[:, order] * unit, n_active

    def oracle(self, activation: Activation) -> tuple[np.ndarray, np.ndarray]:
        return reference.sparse_ffn(
            self.gate_hat, self.up_hat, self.down_hat, self.x_hat, activation, self.threshold
        )

    def scale(self) -> np.ndarray:
        """Return the sum of absolute terms, for the tolerance."""
        gate = np.abs(self.x_hat) @ np.abs(self.gate_hat).T
        up = np.abs(self.x_hat) @ np.abs(self.up_hat).T
        return (gate * up) @ np.abs(self.down_hat)


ACTIVATIONS = [Activation.relu, Activation.fatrelu, Activation.silu]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@given(
    hidden=st.integers(2, 352),
    n_neurons=st.integers(2, 37),
    n_tokens=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_matches_the_oracle(isa, format, activation, hidden, n_neurons, n_tokens, seed):
    ffn = Ffn(format, hidden, n_neurons, n_tokens, seed)
    assume(ffn.margin > 1e-3 and ffn.smallest_gate > 1e-4)
    actual, n_active = ffn.run(activation)
    expected, active = ffn.oracle(activation)
    assert n_active == active.sum()
    assert_close(actual, expected, scale=ffn.scale())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_disjoint_ranges_sum_to_the_whole(isa, format, activation):
    ffn = Ffn(format, 288, 61, 3, seed=5)
    rows = ffn.pack()
    whole, n_active = ffn.run(activation, rows)
    cuts = [0, 1, 7, 32, 60, 61]
    parts = [ffn.run(activation, rows, *cut) for cut in itertools.pairwise(cuts)]
    assert sum(part[1] for part in parts) == n_active
    assert_close(sum(part[0] for part in parts), whole, scale=ffn.scale())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_matrix_scales_multiply_gates_up_and_down(isa, format, activation, n_tokens):
    """The gate's scale counts before the activation, which has a threshold or bends."""
    ffn = Ffn(format, 96, 37, n_tokens, seed=3)
    scales = {Format.bf16: (2.0**-20, 2.0**30, 2.0**-50), Format.f16: (0.25, 0.5, 0.125)}
    if format is Format.f16:  # small values lose bits; without them, all scales divide exactly
        ffn.matrices = round_weights(format, ffn.matrices.reshape(-1, 96)).reshape(3, 37, 96)
    expected, n_active = ffn.run(activation)
    # Packed with other scales, the rows stand for the same matrices.
    own = scales.get(format, (4.0, 0.5, 8.0))
    ffn.matrices /= np.array(own, np.float32)[:, None, None]
    gate, up, down = (rows.scaled(s) for rows, s in zip(ffn.pack(), own, strict=True))
    actual, n = ffn.run(activation, (gate, up, down))
    assert n == n_active
    np.testing.assert_array_equal(actual, expected)


def test_no_neurons_give_zero(isa, format):
    out, n_active = Ffn(format, 64, 8, 2, seed=6).run(Activation.relu, first=3, last=3)
    assert n_active == 0
    assert not out.any()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_neuron_order_does_not_matter(isa, format, activation):
    ffn = Ffn(format, 96, 50, 2, seed=7)
    order = np.random.default_rng(8).permutation(50)
    straight, permuted = ffn.run(activation), ffn.run(activation, ffn.pack(order))
    assert straight[1] == permuted[1]
    assert_close(permuted[0], straight[0], scale=ffn.scale())


def test_whole_numbers_give_equal_bits_in_any_order(isa):
    rng = np.random.default_rng(9)
    ffn = Ffn(Format.bf16, 96, 40, 2, seed=9)
    ffn.matrices = rng.integers(-2, 3, (3, 40, 96)).astype(np.float32)
    ffn.x_quantized = quantize_tokens(Format.bf16, rng.integers(-2, 3, (2, 96)).astype(np.float32))
    straight, _ = ffn.run(Activation.relu)
    for _ in range(3):
        permuted, _ = ffn.run(Activation.relu, ffn.pack(rng.permutation(40)))
        np.testing.assert_array_equal(permuted, straight)


@pytest.mark.parametrize(
    "active",
    [
        [(5, 0), (9, 1), (300, 0), (301, 0)],
        [(5, 0), (300, 0), (9, 1), (599, 0), (599, 2)],
        [(5, 0), (9, 1), (10, 2), (300, 0), (10, 1), (301, 1), (302, 1)],
        [(neuron, neuron % 3) for neuron in range(0, 600, 97)],
    ],
    ids=len,
)
def test_few_active_neurons_of_several_tokens_keep_to_their_tokens(isa, format, active):
    """Gates are computed in blocks of 256 rows, so a token's pairs come in several runs."""
    rng = np.random.default_rng(11)
    ffn = Ffn(format, 96, 600, 3, seed=11)
    gate = np.zeros((600, 96), np.float32)
    for neuron, token in active:
        gate[neuron, token] = 1.0
    x = np.zeros((3, 96), np.float32)
    x[:, 32:] = rng.integers(-2, 3, (3, 64))
    x[[0, 1, 2], [0, 1, 2]] = 2.0
    ffn.matrices[0], ffn.gate_hat = gate, round_weights(format, gate)
    ffn.x_quantized, ffn.x_hat = quantize_tokens(format, x), reference.round_activation(format, x)
    actual, n_active = ffn.run(Activation.relu)
    expected, is_active = ffn.oracle(Activation.relu)
    assert n_active == is_active.sum() == len(active)
    assert_close(actual, expected, scale=ffn.scale())


@pytest.mark.parametrize("activation", [Activation.relu, Activation.fatrelu], ids=lambda a: a.name)
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_rows_of_inactive_neurons_are_not_read(isa, format, activation, n_tokens):
    """Up and down rows of neurons that no token activates are NaN, so a read of one would show."""
    ffn = Ffn(format, 256, 120, n_tokens, seed=10)
    clean, n_active = ffn.run(activation)
    _, active = ffn.oracle(activation)
    dead = np.flatnonzero(~active.any(0))
    assert 0 < dead.size < 120
    ffn.matrices[1:, dead] = np.nan  # as bf16 values, or as q8 scales
    poisoned = ffn.pack()
    actual, n_poisoned = ffn.run(activation, poisoned)
    assert n_poisoned == n_active
    np.testing.assert_array_equal(actual, clean)
    # If all neurons are active (SiLU), the NaN does show.
    assert np.isnan(ffn.run(Activation.silu, poisoned)[0]).any()


def test_fatrelu_fires_at_its_threshold_and_relu_above_zero(isa):
    """A neuron is active if x >= T (FATReLU) or x > 0 (ReLU). They differ at equality."""
    hidden = 32
    gate = np.zeros((3, hidden), np.float32)
    gate[0, 0], gate[1, 0], gate[2, 0] = 0.5, 0.0, -1.0
    ones = np.ones((3, hidden), np.float32)
    x = np.zeros((1, hidden), np.float32)
    x[0, 0] = 1.0
    rows = pack_matrix(Format.bf16, gate), *pack_bundles(Format.bf16, ones, ones)
    tokens = quantize_tokens(Format.bf16, x)

    def count(activation: Activation, threshold: float) -> int:
        return _native.sparse_ffn(*rows, tokens, 0, 3, activation, threshold)[1]

    assert count(Activation.relu, 0.0) == 1
    assert count(Activation.fatrelu, 0.5) == 1
    assert count(Activation.fatrelu, 0.5000001) == 0
    assert count(Activation.silu, 0.0) == 3
