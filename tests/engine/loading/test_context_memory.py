"""A context that can never fit into memory is refused before anything is made for it."""

from __future__ import annotations

from typing import NoReturn

import pytest
from tiny_models import write_model

import hybrid
from hybrid.engine.loading import choices, executors, pipeline
from hybrid.model import program


def refuse(*args: object, **keywords: object) -> NoReturn:
    pytest.fail("was made for a context that does not fit")


@pytest.mark.parametrize("context", [10**9, 2**31 - 1])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_context_of_a_billion_is_refused_at_once(tmp_path, monkeypatch, context, device):
    """Its rope tables alone have 64 GB."""
    folder = write_model(tmp_path, vocab_size=4096, max_position_embeddings=context)
    monkeypatch.setattr(choices, "total_memory_bytes", lambda: 32 << 30)
    monkeypatch.setattr(pipeline, "pack", refuse)
    monkeypatch.setattr(program, "rope_tables", refuse)
    with pytest.raises(hybrid.OutOfMemory) as raised:
        hybrid.load(folder, context_size=context, device=device)
    assert f"a context of {context:,} tokens needs" in str(raised.value)
    assert "this machine has 34.4 GB of memory; choose a smaller context_size" in str(raised.value)
    monkeypatch.undo()
    with hybrid.load(folder) as engine:  # the default context is small
        assert engine.n_context == 4096


def test_keys_and_values_count_on_the_cpu(tmp_path, monkeypatch):
    """The tables of 1,000 positions have 64,000 bytes, keys and values 256,000."""
    folder = write_model(tmp_path, vocab_size=4096, max_position_embeddings=1000)
    monkeypatch.setattr(executors, "CpuExecutor", refuse)
    monkeypatch.setattr(choices, "total_memory_bytes", lambda: 319_999)
    with pytest.raises(hybrid.OutOfMemory, match="a context of 1,000 tokens"):
        hybrid.load(folder, context_size=1000)
    monkeypatch.undo()
    monkeypatch.setattr(choices, "total_memory_bytes", lambda: 320_000)
    with hybrid.load(folder, context_size=1000) as engine:
        assert engine.n_context == 1000
