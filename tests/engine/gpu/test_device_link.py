"""The device link hands off between CPU and GPU correctly, and survives faults of either.

It runs over a stand-in for the CUDA driver (tests/stub_cuda).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from slow import slow_except

from hybrid.kernels import Activation, Format, Program, Session, ThreadPool
from hybrid.kernels._native import FLAG_BYTES, PREFILL_CHUNK, CudaDriver, DeviceLink, meet
from hybrid.kernels.reference import rope_tables, sparse_ffn
from hybrid.weights.packed_rows import pack_bundles, pack_matrix

SOURCE = Path(__file__).parents[2] / "stub_cuda" / "stub_cuda.cpp"
HIDDEN, N_NEURONS, N_HOT, N_GATE = 64, 192, 64, 128


def build(folder: Path, *defines: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the stand-in for the CUDA driver with")
    library = folder / f"libstub{len(defines)}.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", *defines]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("stub"))


class Stub:
    """The stand-in driver, with one stream."""

    def __init__(self, library: Path) -> None:
        self.driver = CudaDriver(str(library))
        self.calls = ctypes.CDLL(str(library))
        for name in ("stub_open_stream", "stub_record"):
            getattr(self.calls, name).restype = ctypes.c_void_p
        self.stream = self.calls.stub_open_stream()

    def close(self) -> None:
        self.lose(False)
        self.calls.stub_fail(-1, 0)
        self.calls.stub_jitter(0)
        self.calls.stub_close_stream(ctypes.c_void_p(self.stream))

    def copy(self, to: np.ndarray, source: np.ndarray) -> None:
        args = (ctypes.c_void_p(array.ctypes.data) for array in (to, source))
        self.calls.stub_copy(ctypes.c_void_p(self.stream), *args, ctypes.c_size_t(to.nbytes))

    def poison(self, array: np.ndarray) -> None:
        """Enqueue a fill with NaN (all bits set)."""
        self.calls.stub_fill(
            ctypes.c_void_p(self.stream),
            ctypes.c_void_p(array.ctypes.data),
            255,
            ctypes.c_size_t(array.nbytes),
        )

    def synchronize(self, seconds: float = 10) -> bool:
        return bool(
            self.calls.stub_synchronize(ctypes.c_void_p(self.stream), ctypes.c_double(seconds))
        )

    def lose(self, is_lost: bool) -> None:
        """Let all streams hang, as on a GPU that hangs, or continue."""
        self.calls.stub_lose(int(is_lost))


@pytest.fixture
def stub(library: Path) -> Iterator[Stub]:
    stub = Stub(library)
    yield stub
    stub.close()


class SplitFfn:
    """A program of an embedding and the CPU's part of two FFNs, and the stream's work around it."""

    def __init__(self, stub: Stub, mechanism: str, *, patience_s: float = 2.0, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.stub, self.by_host = stub, mechanism == "host-functions"
        gate, up, down = rng.standard_normal((3, N_NEURONS, HIDDEN), np.float32)
        self.h = rng.standard_normal(HIDDEN).astype(np.float32)
        self.gates = np.maximum(gate @ self.h, 0.0)  # as the GPU would send them
        self.gates[:N_HOT] = np.nan  # hot neurons: the CPU must not read their gates
        self.expected = self._cold(gate, up, down)
        cos, sin = rope_tables(32, 1e4, 8)
        format = Format.bf16
        self.pool = ThreadPool(2)
        program = Program(
            format=format,
            hidden_size=HIDDEN,
            n_heads=2,
            n_kv_heads=2,
            head_dim=32,
            rms_norm_eps=1e-5,
            rope_cos=cos,
            rope_sin=sin,
        )
        embedding = rng.standard_normal((8, HIDDEN), np.float32)
        program.embed(pack_matrix(format, embedding), 1.0)
        program.end_segment(sends_x=True)
        for layer in range(2):
            program.ffn(
                None,
                pack_matrix(format, gate),
                *pack_bundles(format, up, down),
                Activation.relu,
                0.0,
                1.0,
                layer,
                first_neuron=N_HOT,
                n_given=N_GATE,
            )
            program.end_segment(sends_x=False)
        self.session = Session(program, self.pool, 8)
        self.exchange = [
            np.zeros((PREFILL_CHUNK, width), np.float32)
            for width in (HIDDEN, HIDDEN, N_NEURONS, HIDDEN)
        ]
        memory = np.zeros(3 * FLAG_BYTES + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        x, h, gates, y = self.exchange
        self.flags = memory[begin:][: 3 * FLAG_BYTES]
        self.link = DeviceLink(
            flags=self.flags, n_slots=3, x=x, h=h, gates=gates, y=y, patience_s=patience_s
        )
        meet(self.session, self.link)
        self.y = np.zeros((2, HIDDEN), np.float32)  # the sums that the device received
        self.recording = None

    def _cold(self, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        """Return the oracle's cold sum: weights and h are rounded to bf16, given gates are not."""
        from hybrid.kernels.reference import bf16_bits, bf16_values

        gate, up, down, h = (bf16_values(bf16_bits(a)) for a in (gate, up, down, self.h))
        cold = slice(N_GATE, None)
        y, _ = sparse_ffn(gate[cold], up[cold], down[cold], h[None], Activation.relu, 0.0)
        given = slice(N_HOT, N_GATE)
        return y[0] + (self.gates[given] * (up[given] @ h)) @ down[given]

    def record(self) -> None:
        """Record the stream's work for one token: three hand-offs."""
        stub, (_, h, gates, y) = self.stub, self.exchange
        stream = ctypes.c_void_p(stub.stream)
        self.recording = stub.calls.stub_record(stream)
        self.link.enqueue_request(stub.driver, stub.stream, 0, self.by_host)
        self.link.enqueue_wait(stub.driver, stub.stream, 0, self.by_host)
        for slot in (1, 2):
            stub.copy(h[0], self.h)
            stub.copy(gates[0], self.gates)
            stub.poison(y[0])
            self.link.enqueue_request(stub.driver, stub.stream, slot, self.by_host)
            self.link.enqueue_wait(stub.driver, stub.stream, slot, self.by_host)
            stub.copy(self.y[slot - 1], y[0])
            stub.poison(h[0])
            stub.poison(gates[0])
        stub.calls.stub_end_record(stream)

    def replay(self) -> None:
        self.stub.calls.stub_replay(
            ctypes.c_void_p(self.stub.stream), ctypes.c_void_p(self.recording)
        )

    def token(self) -> bool:
        """Run one token. Returns whether the CPU served it without an error."""
        self.link.arm()
        self.replay()
        is_served = self.link.serve(self.session, 1)
        assert self.stub.synchronize()
        self.session.truncate(0)
        return is_served


MECHANISMS = ["memory-operations", "host-functions"]


@pytest.mark.parametrize("n_replays", slow_except([200, 10_000], 200))
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_replays_give_the_same_bits(stub, mechanism, n_replays):
    ffn = SplitFfn(stub, mechanism)
    ffn.record()
    assert ffn.token()
    np.testing.assert_allclose(ffn.y, np.stack([ffn.expected] * 2), rtol=0, atol=1e-2)
    first = ffn.y.copy()
    for replay in range(n_replays):
        stub.calls.stub_jitter(30 if replay % 20 == 0 else 0)
        ffn.y[:] = np.nan
        assert ffn.token()
        assert np.array_equal(ffn.y, first), f"replay {replay}"
    assert not ffn.flags.any()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_thread_that_dies_releases_the_stream(stub, mechanism):
    """No thread serves the link, so the watchdog answers with NaN."""
    ffn = SplitFfn(stub, mechanism, patience_s=0.2)
    ffn.record()
    assert ffn.token()
    ffn.link.arm()
    ffn.replay()
    assert stub.synchronize(5)
    assert ffn.link.error == 2
    assert np.isnan(ffn.y).all()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_an_answer_that_comes_too_late_changes_nothing(stub, mechanism):
    ffn = SplitFfn(stub, mechanism, patience_s=0.1)
    ffn.record()
    ffn.link.arm()
    ffn.replay()
    assert stub.synchronize(5)
    assert not ffn.link.serve(ffn.session, 1)
    assert ffn.link.error == 2
    assert np.isnan(ffn.y).all()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_device_that_hangs_is_given_up(stub, mechanism):
    ffn = SplitFfn(stub, mechanism, patience_s=0.2)
    ffn.record()
    assert ffn.token()
    stub.lose(True)
    started = time.monotonic()
    ffn.link.arm()
    ffn.replay()
    assert not ffn.link.serve(ffn.session, 1)
    assert ffn.link.error in (1, 2)
    assert time.monotonic() - started < 5
    assert not ffn.link.serve(ffn.session, 1), "a link that failed stays so"


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_abandoning_the_link_frees_a_stream_that_waits(stub, mechanism):
    ffn = SplitFfn(stub, mechanism, patience_s=60)
    ffn.record()
    ffn.replay()
    assert not stub.synchronize(0.2)
    ffn.link.abandon()
    assert stub.synchronize(5)
    assert np.isnan(ffn.y).all()


def test_a_link_that_is_freed_frees_its_stream(stub):
    ffn = SplitFfn(stub, "memory-operations", patience_s=60)
    ffn.record()
    ffn.replay()
    flags, y, exchange, recording = ffn.flags, ffn.y, ffn.exchange, ffn.recording
    del ffn
    assert stub.synchronize(5)
    assert np.isnan(y).all()
    assert flags.size
    assert exchange
    assert recording


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_error_of_the_driver_is_named(stub, mechanism, after):
    ffn = SplitFfn(stub, mechanism)
    stub.calls.stub_fail(after, 700)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        ffn.record()


def test_a_slow_answer_is_waited_for(stub):
    """The answer takes longer than a wait spins, and less than its patience."""
    ffn = SplitFfn(stub, "memory-operations", patience_s=5)
    ffn.record()
    served = []
    ffn.link.arm()
    ffn.replay()
    late = threading.Timer(0.1, lambda: served.append(ffn.link.serve(ffn.session, 1)))
    late.start()
    assert stub.synchronize(5)
    late.join()
    assert served == [True]
    np.testing.assert_allclose(ffn.y[0], ffn.expected, rtol=0, atol=1e-2)


def test_a_missing_driver_gives_one_line_of_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"no CUDA: there is no .*libnothing"):
        CudaDriver(str(tmp_path / "libnothing.so"))


@pytest.mark.slow
def test_a_driver_without_memory_operations_still_has_host_functions(tmp_path):
    stub = Stub(build(tmp_path, "-DSTUB_WITHOUT_MEMORY_OPERATIONS"))
    try:
        assert stub.driver.version == 12080
        assert not stub.driver.has_memory_operations
        with pytest.raises(ValueError, match="memory operations"):
            SplitFfn(stub, "memory-operations").record()
        ffn = SplitFfn(stub, "host-functions")
        ffn.record()
        assert ffn.token()
        np.testing.assert_allclose(ffn.y[1], ffn.expected, rtol=0, atol=1e-2)
    finally:
        stub.close()


def test_bad_arguments_are_refused(stub):
    ffn = SplitFfn(stub, "memory-operations")
    with pytest.raises(ValueError, match="no such slot"):
        ffn.link.request(3)
    with pytest.raises(ValueError, match="hand-offs"):
        ffn.session.decode(1)
    with pytest.raises(ValueError, match="in order"):
        ffn.session.run_segment(0)
    with pytest.raises(ValueError, match="beyond the vocabulary"):
        ffn.link.serve(ffn.session, 99)
