"""The closing line names the share of bandwidth only if requested, and with ample memory."""

from __future__ import annotations

import re

import pytest

import hybrid
from hybrid import run
from hybrid.cli.closing_line import ClosingLine
from hybrid.engine.speculation import DraftLength
from hybrid.placement import hardware


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch):
    """Return an engine whose weights seem to exceed the cache, with a small measurement."""
    monkeypatch.setattr(hardware, "STREAM_BYTES", 8 << 20)
    monkeypatch.setattr(hybrid.Engine, "fits_in_cache", False)
    with hybrid.load("stories", threads=1) as engine:
        yield engine


def describe(engine: hybrid.Engine, closing_line: ClosingLine) -> str:
    generation = engine.generate("Once", max_tokens=3, seed=1)
    list(generation)
    return closing_line(engine, generation)


def test_nothing_is_measured_unless_requested(engine, monkeypatch):
    monkeypatch.setattr(hybrid.Engine, "measure_stream_gbs", None)  # calling it would fail
    line = describe(engine, ClosingLine())
    assert "GB/s" in line
    assert "bandwidth" not in line


def test_the_bandwidth_is_measured_once(engine, monkeypatch):
    measure, calls = hybrid.Engine.measure_stream_gbs, []
    monkeypatch.setattr(
        hybrid.Engine, "measure_stream_gbs", lambda self: calls.append(1) or measure(self)
    )
    closing_line = ClosingLine(measures_bandwidth=True)
    for _ in range(2):
        assert re.search(r"GB/s \(\d+% of bandwidth\) \| ", describe(engine, closing_line))
    assert len(calls) == 1


def test_speculation_is_described_and_no_bandwidth_is_claimed(engine, monkeypatch):
    monkeypatch.setattr(DraftLength, "choose", lambda self, length, room: min(3, room))
    generation = engine.generate("One day. One day. One", max_tokens=30, speculate="ngram", seed=1)
    list(generation)
    line, stats = ClosingLine()(engine, generation), generation.stats
    a_pass = (stats.decode_steps + stats.accepted_tokens) / stats.decode_steps
    assert f"| speculated: {a_pass:.1f} tokens a pass, " in line
    assert "GB/s" not in line
    assert stats.decode_gbs is None


def test_with_little_memory_the_share_is_left_out(engine, monkeypatch):
    available = hardware.STREAM_BYTES + hardware.STREAM_RESERVE_BYTES - 1
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: available)
    closing_line = ClosingLine(measures_bandwidth=True)
    for _ in range(2):
        assert "bandwidth" not in describe(engine, closing_line)
    with pytest.raises(hybrid.OutOfMemory, match="free memory"):
        engine.measure_stream_gbs()


@pytest.mark.parametrize("options", [["-p", "Once"], ["-p", "Once", "-i"]])
def test_only_a_verbose_run_measures(monkeypatch, capsys, options):
    monkeypatch.setattr(hybrid.Engine, "fits_in_cache", False)
    monkeypatch.setattr(hybrid.Engine, "measure_stream_gbs", lambda self: 1000.0)
    for is_verbose in (False, True):
        lines = iter(["/stats"])
        monkeypatch.setattr("builtins.input", lambda prompt, lines=lines: next(lines, "/quit"))
        assert run.main([*options, "-n", "3", *(["-v"] if is_verbose else [])]) == 0
        assert ("% of bandwidth" in capsys.readouterr().err) == is_verbose


def test_an_answer_of_a_batching_loop_has_the_same_line():
    with hybrid.load("stories", threads=1) as engine:
        alone = engine.generate("Once", max_tokens=9, seed=1)
        list(alone)
        with hybrid.BatchLoop(engine) as loop:
            batched = loop.submit("Once", max_tokens=9, seed=1)
            list(batched)
        figures = re.compile(r"[\d.,]+ (tok/s|GB/s|MB)")
        lines = [figures.sub("N", ClosingLine()(engine, answer)) for answer in (alone, batched)]
        assert lines[0] == lines[1]
