"""An FFN that is split over both devices is bit-equal to the oracle for any split.

The data are integers, for which every order of summation gives the same fp32.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from hybrid.kernels import (  # noqa: E402
    Activation,
    Format,
    Program,
    Session,
    ThreadPool,
    _native,
    reference,
)
from hybrid.kernels._native import FLAG_BYTES, PREFILL_CHUNK, DeviceLink, meet  # noqa: E402
from hybrid.kernels.gpu.torch_kernels import (  # noqa: E402
    DeviceMatrix,
    Gating,
    Neurons,
    TorchKernels,
    empty_vectors,
)
from hybrid.weights.formats import GPU_FORMATS, column_order, pack_rows  # noqa: E402
from hybrid.weights.packed_rows import pack_bit_reversed, pack_bundles, pack_matrix  # noqa: E402
from hybrid.weights.unpacked import unpack_rows  # noqa: E402

HIDDEN, N_NEURONS, N_TOKENS = 96, 200, 3


def integers(format: Format, rng: np.random.Generator, n: int, largest: int) -> np.ndarray:
    """(n, HIDDEN) small integers. Each block of 32 ends in a value that makes its scale 1."""
    values = rng.integers(-1, 2, (n, HIDDEN)).astype(np.float32)
    values[rng.random(values.shape) < 0.8] = 0.0
    if format is not Format.bf16:
        values[:, 31::32] = largest
    return values


class Case:
    """Integer weights and activations of one FFN, with the oracle's result."""

    def __init__(self, format: Format, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        largest = -8 if format is Format.q4 else 127
        self.format = format
        self.gate, self.up, self.down = (
            integers(format, rng, N_NEURONS, largest) for _ in range(3)
        )
        # The largest values set the scales, but must not add to the dot products. So where the gate
        # and up rows hold theirs, the activations are 0, and the other way round.
        self.h = rng.integers(-2, 3, (N_TOKENS, HIDDEN)).astype(np.float32)
        self.h[:, 31::32] = 0.0
        self.gate[:, 30::32] = self.up[:, 30::32] = 0.0
        self.h[:, 30::32] = 127.0
        y, self.active = reference.sparse_ffn(
            self.gate, self.up, self.down, self.h, Activation.relu, 0.0
        )
        assert np.abs(y).max() < 2**24
        assert 0.1 < self.active.mean() < 0.9
        self.y = y

    def device_matrix(self, w: np.ndarray, n: int) -> DeviceMatrix:
        """Return the first n rows of `w` as the device holds them."""
        rows = unpack_rows(self.format, *pack_rows(self.format, w), HIDDEN)
        values = torch.from_numpy(rows.values)
        if self.format is Format.bf16:
            values = values.view(torch.bfloat16)
        scales = None if rows.scales is None else torch.from_numpy(rows.scales)
        return DeviceMatrix(self.format, values, scales).rows(0, n)

    def hot(self, n_gate: int, n_hot: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the GPU's gates and its sum over the hot neurons."""
        kernels, relu = TorchKernels(), Activation.relu
        x = empty_vectors(self.format, N_TOKENS, HIDDEN, torch.device("cpu"))
        kernels.quantize(torch.from_numpy(self.h), x)
        gates = torch.zeros(N_TOKENS, N_NEURONS)
        kernels.gates(
            self.device_matrix(self.gate, n_gate), x, Gating(relu, 0.0), gates[:, :n_gate]
        )
        values, partials = torch.zeros(N_TOKENS, n_hot), torch.zeros(1, N_TOKENS, HIDDEN)
        hot = gates[:, :n_hot]
        counts = torch.zeros(1, dtype=torch.int64)
        neurons = Neurons(hot, values, counts)
        kernels.up(self.device_matrix(self.up, n_hot), x, relu, False, neurons)
        assert counts[0] == self.active[:, :n_hot].sum()
        kernels.down(self.device_matrix(self.down, n_hot), values, False, partials)
        return gates.numpy(), partials[0].numpy()

    def cold(
        self, gates: np.ndarray, n_gate: int, n_hot: int, *, n_tokens: int, is_dense: bool
    ) -> np.ndarray:
        """Return the CPU's sum over the cold neurons, by the native program."""
        cos, sin = reference.rope_tables(32, 1e4, 64)
        program = Program(
            format=self.format,
            hidden_size=HIDDEN,
            n_heads=3,
            n_kv_heads=3,
            head_dim=32,
            rms_norm_eps=1e-5,
            rope_cos=cos,
            rope_sin=sin,
        )
        program.embed(pack_matrix(self.format, np.zeros((4, HIDDEN), np.float32)), 1.0)
        program.end_segment(sends_x=True)
        pack = pack_bit_reversed if is_dense else pack_matrix  # either layout of gate rows
        program.ffn(
            None,
            pack(self.format, self.gate),
            *pack_bundles(self.format, self.up, self.down),
            Activation.relu,
            0.0,
            1.0,
            0,
            first_neuron=n_hot,
            n_given=n_gate,
        )
        session = Session(program, ThreadPool(2), 8, is_dense)
        x, h, y = (np.full((PREFILL_CHUNK, HIDDEN), np.nan, np.float32) for _ in range(3))
        given = np.full((PREFILL_CHUNK, N_NEURONS), np.nan, np.float32)
        h[:n_tokens], given[:n_tokens, n_hot:n_gate] = self.h[:n_tokens], gates[:, n_hot:n_gate]
        memory = np.zeros(2 * FLAG_BYTES + 64, np.uint8)
        flags = memory[-memory.ctypes.data % 64 :][: 2 * FLAG_BYTES]
        link = DeviceLink(flags=flags, n_slots=2, x=x, h=h, gates=given, y=y)
        meet(session, link)
        session.begin(np.zeros(n_tokens, np.int64), is_decode=n_tokens == 1)
        session.run_segment(0)
        session.run_segment(1)
        session.end()
        counted = self.active[:n_tokens, n_hot:].sum()
        assert session.active_counts == [counted]
        return y[:n_tokens].copy()  # a freed link fills the exchanged arrays with NaN


@pytest.mark.parametrize("n_tokens", [1, N_TOKENS])
@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize(
    ("n_gate", "n_hot"), [(0, 0), (64, 0), (200, 0), (64, 64), (128, 64), (200, 128), (192, 192)]
)
def test_hot_and_cold_add_up_to_the_oracle(isa, format, n_gate, n_hot, is_dense, n_tokens):
    case = Case(format, seed=n_gate + n_hot)
    gates, hot = case.hot(n_gate, n_hot)
    cold = case.cold(gates[:n_tokens], n_gate, n_hot, n_tokens=n_tokens, is_dense=is_dense)
    np.testing.assert_array_equal(hot[:n_tokens] + cold, case.y[:n_tokens])


@example(seed=625, buckets=(0, 2))  # pairs of other tokens between two of one token
@given(seed=st.integers(0, 10_000), buckets=st.tuples(st.integers(0, 3), st.integers(0, 3)))
@example(seed=65, buckets=(0, 3))  # a piece has given gates and others, few of which fire
@example(seed=1158, buckets=(0, 3))
def test_any_split_adds_up_to_the_oracle(seed, buckets):
    """Weights, hot sets and formats are random."""
    n_hot, n_gate = sorted(64 * bucket for bucket in buckets)
    case = Case(GPU_FORMATS[seed % 3], seed)
    gates, hot = case.hot(n_gate, n_hot)
    cold = case.cold(gates, n_gate, n_hot, n_tokens=N_TOKENS, is_dense=False)
    np.testing.assert_array_equal(hot + cold, case.y)


def test_both_devices_quantise_to_the_same_bits(format):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5, 256)) * np.logspace(-4, 4, 256)).astype(np.float32)
    x[0, :32] = 0.0
    x[1, :] = np.rint(x[1, :])
    own = empty_vectors(format, 5, 256, torch.device("cpu"))
    TorchKernels().quantize(torch.from_numpy(x), own)
    np.testing.assert_array_equal(own.dequantize().numpy(), reference.round_activation(format, x))
    if format is not Format.bf16:  # the CPU's kernel agrees too; its int8 are interleaved
        for row, values in zip(x, own.values.numpy(), strict=True):
            native = _native.quantize(format, row)[:256].view(np.int8)
            np.testing.assert_array_equal(native[column_order(format, 256)], values)


def test_everything_on_the_gpu_equals_the_oracle(format):
    case = Case(format)
    np.testing.assert_array_equal(case.hot(N_NEURONS, N_NEURONS)[1], case.y)


def test_a_gate_that_is_nan_gives_nan(format):
    case = Case(format)
    gates, _ = case.hot(128, 64)
    gates[0, 70] = np.nan
    case.active[0, 70] = True
    assert np.isnan(case.cold(gates[:1], 128, 64, n_tokens=1, is_dense=False)).all()
