"""A long context costs what is used of it: rope tables are filled only as far as sessions come."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_model

import hybrid
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.loading import choices
from hybrid.kernels import Format, Program
from hybrid.kernels.reference import rope_tables
from hybrid.model import program
from hybrid.weights.layout import packed_layout
from hybrid.weights.packing import pack_model

LONG = 20_000_000
IDS = np.random.default_rng(1).integers(0, 320, 150)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path, vocab_size=4096, max_position_embeddings=LONG)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_context_that_is_not_used_takes_no_memory(folder, monkeypatch):
    """Its tables have 1.28 GB, its keys and values 5.1 GB."""
    monkeypatch.setattr(choices, "total_memory_bytes", lambda: 1 << 40)
    with hybrid.load(folder) as engine, engine.open_session() as session:
        expected = session.prefill(IDS, all_logits=True)
    before = resident_bytes()
    with hybrid.load(folder, context_size=LONG) as engine, engine.open_session() as session:
        assert session.n_context == LONG
        logits = session.prefill(IDS, all_logits=True)
        assert resident_bytes() - before < 200e6
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("head_dim", [6, 16, 128])
def test_the_bits_of_a_position_do_not_depend_on_where_the_tables_begin(head_dim):
    whole = rope_tables(head_dim, 1e4, 3000)
    for first in (1, 3, 17, 1000, 2999):
        for table, part in zip(whole, rope_tables(head_dim, 1e4, 3000 - first, first), strict=True):
            np.testing.assert_array_equal(part, table[first:])
    # Beyond 2^24 fp32 holds not every integer: positions are rounded.
    first = 2**24 - 5
    cos, _ = rope_tables(2, 1e4, 40, first)
    near = np.cos(np.arange(first, first + 40, dtype=np.float64).astype(np.float32))
    np.testing.assert_array_equal(cos[:, 0], near)


def test_tables_are_filled_step_by_step_as_sessions_need_them(folder, monkeypatch):
    """In prefill, in decode and across several steps at once, with the logits of whole tables."""
    with hybrid.load(folder, context_size=600) as engine, engine.open_session() as session:
        expected = session.prefill(IDS, all_logits=True)
    filled = []

    def counted(head_dim: int, theta: float, n: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        filled.append((first, n))
        return rope_tables(head_dim, theta, n, first)

    monkeypatch.setattr(program, "_ROPE_STEP", 16)
    monkeypatch.setattr(program, "rope_tables", counted)
    with hybrid.load(folder, context_size=600) as engine:
        assert filled == [(0, 16)]
        with engine.open_session() as session:
            logits = [session.prefill(IDS[:16], all_logits=True)]
            assert len(filled) == 1
            for token in IDS[16:40]:
                session.decode(int(token))
                logits.append(session.logits.copy()[None])
            assert filled == [(0, 16), (16, 16), (32, 16)]
            logits.append(session.prefill(IDS[40:], all_logits=True))
            np.testing.assert_array_equal(np.concatenate(logits), expected)
            assert filled == [(first, 16) for first in range(0, 160, 16)]
            session.truncate(20)
            session.decode(5)
        with engine.open_session() as session:
            np.testing.assert_array_equal(session.prefill(IDS, all_logits=True), expected)
            rest = np.resize(IDS, 450)
            session.prefill(rest)
        assert filled[-1] == (592, 8)  # the context ends within a step
        assert len(filled) == 38


def test_threads_that_need_the_same_positions_at_once_get_equal_bits(folder, monkeypatch):
    with hybrid.load(folder, context_size=600) as engine, engine.open_session() as session:
        expected = session.prefill(IDS, all_logits=True)
    firsts, meet = [], threading.Barrier(4)

    def slow(head_dim: int, theta: float, n: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        firsts.append(first)
        tables = rope_tables(head_dim, theta, n, first)
        threading.Event().wait(0.001)  # so that the other threads come meanwhile
        return tables

    monkeypatch.setattr(program, "_ROPE_STEP", 8)
    monkeypatch.setattr(program, "rope_tables", slow)
    results: list[np.ndarray] = []
    with hybrid.load(folder, context_size=600, threads=1) as engine:

        def run() -> None:
            with engine.open_session() as session:
                meet.wait()
                logits = []
                for token in IDS:
                    session.decode(int(token))
                    logits.append(session.logits.copy())
                results.append(np.array(logits))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result, expected)
    assert firsts == list(range(0, 152, 8))  # each part once


def test_an_error_while_filling_leaves_the_session_as_it_was(folder, monkeypatch):
    monkeypatch.setattr(program, "_ROPE_STEP", 16)
    with hybrid.load(folder, context_size=600) as engine, engine.open_session() as session:
        session.prefill(IDS[:16])
        with monkeypatch.context() as patch:

            def interrupt(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(program, "rope_tables", interrupt)
            with pytest.raises(KeyboardInterrupt):
                session.prefill(IDS[16:])
            assert session.position == 16
        expected = engine.open_session().prefill(IDS, all_logits=True)
        logits = session.prefill(IDS[16:], all_logits=True)
        np.testing.assert_array_equal(logits, expected[16:])


def test_wrong_tables_are_refused():
    tables = np.zeros((8, 8), np.float32)
    shape = {"hidden_size": 96, "n_heads": 6, "n_kv_heads": 2, "head_dim": 16}
    common = {"format": Format.q8, "rms_norm_eps": 1e-5, "rope_cos": tables, "rope_sin": tables}
    with pytest.raises(ValueError, match="beyond the rope tables"):
        Program(**common, **shape, n_filled=9, fill_rope=lambda n: n)
    with pytest.raises(ValueError, match="need fill_rope"):
        Program(**common, **shape, n_filled=4)


def test_passes_that_run_segment_by_segment_fill_them_too(folder, monkeypatch):
    """As sessions on a GPU do."""
    monkeypatch.setattr(program, "_ROPE_STEP", 8)
    with open_checkpoint(folder) as checkpoint:
        layout = packed_layout(checkpoint.config, Format.q8)
        model = pack_model(checkpoint, layout)
        executors = [CpuExecutor(model, layout, n_threads=1, n_context=600) for _ in range(2)]
    expected, session = (executor.open_session() for executor in executors)
    for first in range(0, 32, 16):
        expected.prefill(IDS[first : first + 16])
        session.begin(IDS[first : first + 16], is_decode=False)
        session.run_segment(0)
        session.end()
        np.testing.assert_array_equal(session.logits, expected.logits)
