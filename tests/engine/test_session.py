"""Native sessions match the oracle of their format, with equal bits however the work is divided."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from slow import slow_except
from tiny_executors import VARIANTS, open_executor
from tiny_models import ODD_SHAPES, write_model

from hybrid.checkpoint import open_checkpoint
from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.kernels import Format, Program, Session, ThreadPool, _native
from hybrid.weights.packed_rows import pack_matrix

IDS = np.random.default_rng(1).integers(0, 320, 150).astype(np.int32)
CHUNK = _native.PREFILL_CHUNK


def decode_all(executor: CpuExecutor, ids: np.ndarray) -> np.ndarray:
    session = executor.open_session()
    logits = []
    for token in ids:
        session.decode(int(token))
        logits.append(session.logits.copy())
    return np.array(logits)


def assert_close_to_oracle(actual: np.ndarray, expected: np.ndarray, format: Format) -> None:
    """Assert that (sequences, vocab) logits, one row per sequence, are close.

    Sums in another order now and then move an activation across a rounding step. This shows in the
    logits of that sequence. In other sequences only the order of sums differs. In f16 the steps are
    those of the KV cache alone: they are small, and most sequences cross one.
    """
    error = np.abs(actual - expected).max(-1) / expected.std()
    if format is Format.f16:
        assert error.max() < 1e-3
    else:
        assert error.max() < 0.1
        assert np.mean(error < 2e-5) > 0.5


@pytest.mark.parametrize(
    "variant", slow_except(VARIANTS, "minicpm", "odd sizes", "llama", *ODD_SHAPES)
)
def test_logits_match_the_format_oracle(tmp_path, isa, format, variant):
    folder = write_model(tmp_path, **VARIANTS[variant])
    executor = open_executor(folder, format)
    actual, expected = [], []
    with open_checkpoint(folder) as checkpoint:
        weights = read_weights(checkpoint, format)
        for ids in IDS.reshape(-1, 3):
            reference = ReferenceSession(weights, checkpoint.config, format)
            expected.append(reference.prefill(ids)[-1])
            session = executor.open_session()
            session.prefill(ids)
            actual.append(session.logits.copy())
    assert_close_to_oracle(np.array(actual), np.array(expected), format)


@pytest.mark.parametrize("n", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 150])
def test_prefill_equals_decode_bit_by_bit(tmp_path, isa, format, n):
    executor = open_executor(write_model(tmp_path), format)
    session = executor.open_session()
    prefilled = session.prefill(IDS[:n], all_logits=True)
    decoded = decode_all(executor, IDS[:n])
    np.testing.assert_array_equal(prefilled, decoded)
    np.testing.assert_array_equal(session.logits, decoded[-1])
    assert session.position == n


def test_prefill_equals_decode_where_few_neurons_of_many_fire(tmp_path, isa, format):
    """A piece has several blocks of gates here, and a token fires a neuron or none in each."""
    folder = write_model(tmp_path, intermediate_size=3 * 256 * 16, hidden_act_param=2.9)
    executor = open_executor(folder, format)
    session = executor.open_session()
    for first in range(0, 60, 3):
        session.truncate(0)
        ids = IDS[first : first + 3]
        prefilled = session.prefill(ids, all_logits=True)
        np.testing.assert_array_equal(prefilled, decode_all(executor, ids))
    fraction = sum(session.active_counts) / (60 * 2 * 3 * 256 * 16)
    assert 0.0005 < fraction < 0.01


def test_threads_do_not_change_a_bit(tmp_path, isa, format):
    folder = write_model(tmp_path)
    results = []
    for n_threads in (1, 2, 3, 8):
        executor = open_executor(folder, format, n_threads)
        session = executor.open_session()
        prefilled = session.prefill(IDS, all_logits=True)
        results.append((prefilled, decode_all(executor, IDS[:40]), session.active_counts))
    for prefilled, decoded, active in results[1:]:
        np.testing.assert_array_equal(prefilled, results[0][0])
        np.testing.assert_array_equal(decoded, results[0][1])
        assert active == results[0][2]


@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_padding_keeps_every_bit(tmp_path, isa, format, shape):
    """Threads, prefill and decode give equal bits where rows and vectors are padded."""
    folder = write_model(tmp_path, **shape)
    results = []
    for n_threads in (1, 3):
        executor = open_executor(folder, format, n_threads)
        results.append(executor.open_session().prefill(IDS[:70], all_logits=True))
        results.append(decode_all(executor, IDS[:70]))
    for logits in results[1:]:
        np.testing.assert_array_equal(logits, results[0])


def test_the_order_of_neurons_does_not_change_the_logits(tmp_path, format):
    folder = write_model(tmp_path)
    rng = np.random.default_rng(2)
    straight = open_executor(folder, format)
    permuted = open_executor(folder, format, orders=[rng.permutation(200) for _ in range(2)])
    actual, expected = [], []
    for ids in IDS.reshape(-1, 3):
        for executor, logits in ((straight, expected), (permuted, actual)):
            session = executor.open_session()
            session.prefill(ids)
            logits.append(session.logits.copy())
    assert_close_to_oracle(np.array(actual), np.array(expected), format)


def test_active_counts_match_the_oracle(tmp_path, format):
    folder = write_model(tmp_path)
    with open_checkpoint(folder) as checkpoint:
        reference = ReferenceSession(read_weights(checkpoint, format), checkpoint.config, format)
        reference.prefill(IDS)
    session = open_executor(folder, format).open_session()
    session.prefill(IDS)
    expected = [int(active.sum()) for active in reference.active]
    assert session.active_counts == pytest.approx(expected, rel=2e-3)
    session.reset_counts()
    assert session.active_counts == [0, 0]


def test_truncate_returns_to_an_earlier_position(tmp_path):
    executor = open_executor(write_model(tmp_path), Format.q8)
    session = executor.open_session()
    session.prefill(IDS[:70])
    session.truncate(20)
    session.prefill(IDS[100:130])
    fresh = executor.open_session()
    fresh.prefill(np.concatenate([IDS[:20], IDS[100:130]]))
    np.testing.assert_array_equal(session.logits, fresh.logits)
    with pytest.raises(ValueError, match="beyond"):
        session.truncate(51)


def test_long_context_spans_match_the_oracle(tmp_path):
    """The text covers several attention spans and reaches the last position of the context."""
    folder = write_model(tmp_path, hidden_act="silu", hidden_act_param=None)
    ids = np.random.default_rng(3).integers(0, 320, 600).astype(np.int32)
    with open_checkpoint(folder) as checkpoint:
        weights = read_weights(checkpoint, Format.bf16)
        expected = ReferenceSession(weights, checkpoint.config, Format.bf16).prefill(ids)
    executor = open_executor(folder, Format.bf16)
    session = executor.open_session()
    actual = session.prefill(ids, all_logits=True)
    assert np.median(np.abs(actual - expected)) < 5e-3 * expected.std()
    with pytest.raises(ValueError, match="full"):
        session.decode(5)
    resumed = executor.open_session()
    resumed.prefill(ids[:590])
    for token in ids[590:]:
        resumed.decode(int(token))
    np.testing.assert_array_equal(resumed.logits, actual[-1])


def test_sessions_on_several_threads_do_not_disturb_each_other(tmp_path):
    executor = open_executor(write_model(tmp_path), Format.q8, n_threads=3)
    sequences = [np.roll(IDS, shift) for shift in range(4)]
    expected = [decode_all(executor, ids) for ids in sequences]
    results: list[np.ndarray | None] = [None] * 4

    def work(index: int) -> None:
        results[index] = decode_all(executor, sequences[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_a_session_outlives_its_executor(tmp_path):
    executor = open_executor(write_model(tmp_path), Format.q8)
    expected = decode_all(executor, IDS[:5])
    session = executor.open_session()
    del executor
    for token, logits in zip(IDS[:5], expected, strict=True):
        session.decode(int(token))
        np.testing.assert_array_equal(session.logits, logits)


def test_bad_tokens_are_refused(tmp_path):
    session = open_executor(write_model(tmp_path), Format.q8).open_session()
    for token in (-1, 320):
        with pytest.raises(ValueError, match="vocabulary"):
            session.decode(token)
        with pytest.raises(ValueError, match="vocabulary"):
            session.prefill(np.array([1, token], np.int32))
    with pytest.raises(ValueError, match="n > 0"):
        session.prefill(np.array([], np.int32))
    assert session.position == 0


def test_opening_and_closing_leaks_no_memory_and_no_threads(tmp_path):
    psutil = pytest.importorskip("psutil")
    folder, process = write_model(tmp_path), psutil.Process()

    def cycle() -> None:
        session = open_executor(folder, Format.q8, n_threads=3).open_session()
        session.prefill(IDS)

    for _ in range(5):
        cycle()
    threads, rss = process.num_threads(), process.memory_info().rss
    for _ in range(50):
        cycle()
    assert process.num_threads() == threads
    assert process.memory_info().rss < rss + 8e6


def test_two_threads_cannot_use_one_session(tmp_path):
    executor = open_executor(write_model(tmp_path), Format.q8, n_context=64)
    for _ in range(20):
        session = executor.open_session()
        refused: list[str] = []

        def work(session=session, refused=refused) -> None:
            for _ in range(40):
                try:
                    session.decode(1)
                except ValueError as error:
                    refused.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.position <= 64
        assert all("another thread" in text or "full" in text for text in refused)


def test_tokens_are_never_truncated_to_fit(tmp_path):
    session = open_executor(write_model(tmp_path), Format.q8).open_session()
    with pytest.raises(ValueError, match="vocabulary"):
        session.prefill(np.array([2**32 + 5, 1]))
    with pytest.raises(TypeError):
        session.prefill(np.array([1.9, 2.2]))


def test_a_program_is_complete_and_sealed_once_a_session_is_open(tmp_path):
    executor = open_executor(write_model(tmp_path), Format.q8)
    executor.open_session()
    rows = pack_matrix(Format.q8, np.zeros((320, 96), np.float32))
    with pytest.raises(ValueError, match="sealed"):
        executor.program.embed(rows, 1.0)
    tables = np.zeros((8, 8), np.float32)
    sizes = {"hidden_size": 96, "n_heads": 6, "n_kv_heads": 2, "head_dim": 16}
    empty = Program(format=Format.q8, rms_norm_eps=1e-5, rope_cos=tables, rope_sin=tables, **sizes)
    with pytest.raises(ValueError, match="needs an embedding"):
        Session(empty, executor.pool, 8)
    for layer in (-1, 10**6):
        with pytest.raises(ValueError, match="layer"):
            empty.attend(pack_matrix(Format.q8, np.zeros((96, 96), np.float32)), 1.0, layer)
    with pytest.raises(ValueError, match="positive"):
        ThreadPool(0)
