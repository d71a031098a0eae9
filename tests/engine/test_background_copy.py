"""An engine generates the same tokens while its weights are copied in the background."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import hybrid
from hybrid import InvalidArtifact
from hybrid.checking import check_model
from hybrid.cli.conversation import interrupts
from hybrid.weights import memory, packed_file
from profiler.corpus import TokenLists
from profiler.recorder import RecordingOptions, record


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


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of the packed model, one byte of whose first layer is damaged."""
    monkeypatch.setattr(packed_file, "KEEP_FROM_BYTES", 0)
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))
    with hybrid.load("stories"):
        (path,) = (tmp_path / "packed").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def answer(engine: hybrid.Engine, max_tokens: int = 3) -> str:
    return "".join(engine.generate("Once upon a time", max_tokens=max_tokens, temperature=0))


@pytest.mark.parametrize("mmap", [None, True])
def test_damaged_weights_end_even_a_short_answer_with_an_error(packed, mmap):
    with hybrid.load("stories", mmap=mmap) as engine:
        with pytest.raises(InvalidArtifact, match="damaged: their checksum differs; load the"):
            answer(engine)
        with pytest.raises(InvalidArtifact, match="damaged"):
            engine.wait_for_weights()
        with pytest.raises(InvalidArtifact, match="damaged"):
            engine.open_session().prefill([1])
    with hybrid.load("stories", mmap=mmap) as engine:  # packed again
        sound = answer(engine)
        engine.wait_for_weights()
    with hybrid.load("stories", mmap=mmap) as engine:
        assert answer(engine) == sound


def test_an_answer_that_is_cancelled_waits_for_nothing(packed, monkeypatch):
    go_on = threading.Event()
    check = memory._native.crc32
    monkeypatch.setattr(memory._native, "crc32", lambda *a: (go_on.wait(), check(*a))[1])
    with hybrid.load("stories", mmap=True) as engine:
        generation = engine.generate("Once upon a time", max_tokens=9, temperature=0)
        assert next(generation)
        generation.cancel()
        assert list(generation) == []
        go_on.set()


@pytest.fixture
def stalled(packed, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the check of the weights wait until the test is over, or for a minute if it fails."""
    go_on = threading.Event()
    check = memory._native.crc32
    monkeypatch.setattr(memory._native, "crc32", lambda *a: (go_on.wait(60), check(*a))[1])
    yield
    go_on.set()


def after_its_text(engine: hybrid.Engine) -> hybrid.Generation:
    """Return an answer that is complete and waits for nothing but the check."""
    generation = engine.generate("Once upon a time", max_tokens=3, temperature=0)
    while generation.finish_reason is None:
        next(generation)
    return generation


def test_cancelling_ends_the_wait_for_the_check(stalled):
    engine = hybrid.load("stories", mmap=True)
    generation = after_its_text(engine)
    assert generation.finish_reason == "length"
    timer = threading.Timer(0.01, generation.cancel)
    timer.start()
    assert list(generation) == []
    assert generation.finish_reason == "cancelled"  # nothing has confirmed its text
    assert list(generation) == []
    timer.join()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_in_a_conversation_ends_the_wait_for_the_check(stalled):
    generation = after_its_text(hybrid.load("stories", mmap=True))
    with interrupts(generation):
        timer = threading.Timer(0.01, signal.raise_signal, [signal.SIGINT])
        timer.start()
        assert list(generation) == []
    timer.join()
    assert generation.finish_reason == "cancelled"


def test_selfcheck_reports_damaged_weights(packed):
    *_, last = check_model("stories")
    assert (last.name, last.verdict) == ("weights", "failed")
    assert "are damaged: their checksum differs" in last.message
    assert {check.verdict for check in check_model("stories")} <= {"ok", "warning"}


def test_the_harness_gets_no_answer_of_damaged_weights(packed):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: the extra `eval`")
    from hybrid.evaluation.harness import HybridLM

    with pytest.raises(InvalidArtifact, match="damaged"):
        HybridLM("stories")


def test_nothing_that_damaged_weights_compute_is_recorded(packed, tmp_path):
    texts = [TokenLists("one", [[5, 6, 7]])]
    with (
        hybrid.load("stories") as engine,
        pytest.raises(InvalidArtifact, match="damaged"),
    ):
        record(engine, texts, tmp_path / "out", RecordingOptions("stories"), lambda *told: None)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_one_line_for_damaged_weights(packed, capsys):
    from hybrid.run import main as run

    assert run(["-m", "stories", "-p", "Once upon a time", "-n", "3", "--seed", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("hybrid.run: ")
    assert "are damaged: their checksum differs; load the model again" in lines[-1]
