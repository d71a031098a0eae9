"""A pass over tokens of several sessions gives each of them the bits that it gets alone."""

from __future__ import annotations

import numpy as np
import pytest
from predictor_files import write_predictor
from slow import slow_except
from tiny_executors import VARIANTS, open_executor
from tiny_models import write_model

import hybrid
from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.kernels import KvFormat
from hybrid.kernels._native import PREFILL_CHUNK, Batch

N_VOCAB = 320


def run_mixes(executor, n_passes: int, seed: int, n_sessions: int = 6) -> None:
    """Sessions join, leave, and take one token or several; each pass is compared."""
    rng = np.random.default_rng(seed)
    batch = Batch(executor.program, executor.pool, executor.n_context)
    pairs = []
    for _ in range(n_passes):
        while len(pairs) < n_sessions and (not pairs or rng.random() < 0.5):
            pairs.append((executor.open_session(), executor.open_session()))
        if len(pairs) > 1 and rng.random() < 0.2:
            pairs.pop(int(rng.integers(len(pairs))))
        members = [pairs[i] for i in rng.permutation(len(pairs))[: rng.integers(1, len(pairs) + 1)]]
        tokens, wants = [], []
        for _ in members:
            n = 1 if rng.random() < 0.7 else int(rng.integers(1, PREFILL_CHUNK // len(members)))
            tokens.append(rng.integers(0, N_VOCAB, n).astype(np.int64))
            wants.append(n == 1 or rng.random() < 0.5)
        batch.run([together for together, _ in members], tokens, wants)
        for (together, alone), ids, wanted in zip(members, tokens, wants, strict=True):
            if len(ids) == 1:
                alone.decode(int(ids[0]))
            else:
                alone.prefill(ids)
            assert together.position == alone.position
            if wanted:
                np.testing.assert_array_equal(together.logits, alone.logits)


@pytest.mark.parametrize("variant", slow_except(VARIANTS, "minicpm", "odd sizes", "llama"))
def test_every_session_gets_its_own_bits(tmp_path, isa, format, variant):
    vocab = {} if variant == "odd sizes" else {"vocab_size": N_VOCAB}
    executor = open_executor(write_model(tmp_path, **VARIANTS[variant] | vocab), format)
    run_mixes(executor, n_passes=12, seed=1)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_any_number_of_threads_gives_these_bits(tmp_path, format, n_threads):
    run_mixes(open_executor(write_model(tmp_path), format, n_threads), n_passes=12, seed=2)


def test_what_several_sessions_need_counts_once(tmp_path, format):
    executor = open_executor(write_model(tmp_path), format)
    batch = Batch(executor.program, executor.pool, executor.n_context)
    sessions = [executor.open_session() for _ in range(3)]
    batch.run(sessions, [[5], [6], [7]], [True] * 3)
    together, alone = batch.decode_bytes, []
    for token, session in zip((5, 6, 7), sessions, strict=True):
        session.truncate(0)
        session.reset_counts()
        session.decode(token)
        alone.append(session.decode_bytes)
    for stage in ("qkv", "output", "gate"):
        assert together[stage] == alone[0][stage]
    assert together["attend"] == sum(each["attend"] for each in alone)
    most = sum(each["up_down"] for each in alone)
    assert max(each["up_down"] for each in alone) <= together["up_down"] <= most
    assert batch.active_counts == list(
        np.sum([session.active_counts for session in sessions], axis=0)
    )


def test_mistakes_are_refused_before_anything_runs(tmp_path, format):
    executor = open_executor(write_model(tmp_path), format)
    other = open_executor(write_model(tmp_path / "other"), format)
    batch = Batch(executor.program, executor.pool, executor.n_context)
    one, two = executor.open_session(), executor.open_session()
    for sessions, tokens, wants, problem in [
        ([], [], [], "1 or more"),
        ([one], [[1], [2]], [True], "the same length"),
        ([one], [[]], [True], "at least one token"),
        ([one, one], [[1], [2]], [True, True], "in use"),
        ([one, two], [[1], [N_VOCAB]], [True, True], "beyond the vocabulary"),
        ([one, other.open_session()], [[1], [2]], [True, True], "another program"),
        ([one, two], [[1] * PREFILL_CHUNK, [2]], [True, True], "PREFILL_CHUNK"),
        ([executor.open_session()], [[1]], [True, False], "the same length"),
    ]:
        with pytest.raises(ValueError, match=problem):
            batch.run(sessions, tokens, wants)
        assert one.position == two.position == 0
    small = Batch(executor.program, executor.pool, 8)
    with pytest.raises(ValueError, match="larger than the batch's"):
        small.run([one], [[1]], [True])
    one.decode(1)  # no mistake has left it in use
    assert KvFormat.fp16 is one.kv


@pytest.mark.parametrize("quant", ["q4", "bf16"])
def test_a_predictor_and_a_preview_keep_the_bits(tmp_path, quant):
    with hybrid.load("stories", quant=quant) as engine:
        kinds = ("lowrank", "lowrank", "exact") * 2
        path = write_predictor(tmp_path / "p", engine, kinds=kinds, margin=1.0)
    with hybrid.load("stories", quant=quant, predictor=path, preview_head=True) as engine:
        executor = engine._executor
        assert isinstance(executor, CpuExecutor)
        run_mixes(executor, n_passes=25, seed=3)
