"""An engine generates the same tokens while its weights are copied in the background."""

from __future__ import annotations

import threading

import pytest

import hybrid
from hybrid.weights import memory, packed_file


def test_tokens_are_the_same_before_during_and_after(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_file, "KEEP_FROM_BYTES", 0)
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))

    def story(engine: hybrid.Engine) -> str:
        generation = engine.generate("Once upon a time", max_tokens=20, temperature=0)
        # The iteration ends only when all weights have been checked, the last piece comes before.
        return "".join(next(generation) for _ in range(12))

    with hybrid.load("stories") as packed:
        expected = story(packed)
    go_on = threading.Event()
    move = memory._native.move_into_memory

    def move_when_told(mapped, first, n_bytes, file):
        go_on.wait()
        move(mapped, first, n_bytes, file)

    monkeypatch.setattr(memory._native, "move_into_memory", move_when_told)
    with hybrid.load("stories") as engine:
        if not engine.stats.is_copying:
            pytest.skip("this system reads the file instead of mapping it")
        assert engine.stats.is_mapped
        assert story(engine) == expected
        go_on.set()
        engine.wait_for_weights()
        assert not engine.stats.is_copying
        assert not engine.stats.is_mapped
        assert story(engine) == expected
