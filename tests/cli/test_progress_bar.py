"""Front-ends show progress only for work that takes long. No test waits for the clock."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hybrid.cli import progress_bar as module
from hybrid.cli.progress_bar import progress_bar

GB = 10**9


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat all work as long enough to be shown."""
    monkeypatch.setattr(module, "_DRAW_AFTER_S", 0)
    monkeypatch.setattr(module, "_WRITE_AFTER_S", 0)
    monkeypatch.setattr(module, "_REDRAW_S", 0)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat no work as long enough to be shown."""
    monkeypatch.setattr(module, "_DRAW_AFTER_S", 10**6)
    monkeypatch.setattr(module, "_WRITE_AFTER_S", 10**6)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 80 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def lines(terminal: Terminal) -> list[str]:
    """Return everything that was drawn. Each drawing begins at the start of the line."""
    return terminal.getvalue().split("\r")


def is_gone(terminal: Terminal) -> bool:
    """Return whether an empty line was drawn last, with the cursor back at its start."""
    return terminal.getvalue().endswith("\r") and not lines(terminal)[-2].strip()


@pytest.mark.usefixtures("at_once")
def test_a_bar_shows_task_share_and_bytes_and_disappears_at_the_end(terminal: Terminal) -> None:
    with progress_bar(terminal) as progress:
        progress("downloading [bold]x", 3 * GB, 4 * GB)
    drawn = terminal.getvalue()
    assert "downloading [bold]x" in drawn
    assert " 75%" in drawn
    assert "3.0/4.0 GB" in drawn
    assert is_gone(terminal)


@pytest.mark.usefixtures("at_once")
def test_one_task_follows_another_on_the_same_line(terminal: Terminal) -> None:
    with progress_bar(terminal) as progress:
        for done in range(3):
            progress("first", done, 2)
        terminal.truncate(0)
        progress("second", 1, 2)
    assert "second" in terminal.getvalue()
    assert "first" not in terminal.getvalue()
    assert " 50%" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("width", [40, 60, 71, 72, 100])
def test_a_bar_is_one_line_on_any_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with progress_bar(terminal) as progress:
        progress("downloading MiniCPM-S-1B-sft", GB, 3 * GB)
        progress("downloading MiniCPM-S-1B-sft", 2 * GB, 3 * GB)
    for line in lines(terminal):
        assert len(line) < width
        assert not line.strip() or "67%" in line or "33%" in line


@pytest.mark.usefixtures("at_once")
def test_work_of_no_bytes_and_finished_work_are_accepted(terminal: Terminal) -> None:
    with progress_bar(terminal) as progress:
        progress("nothing", 0, 0)
        progress("whole", 5, 5)
        progress("whole", 5, 5)
    assert "100%" in terminal.getvalue()


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_short_work_shows_nothing(kind: type[io.StringIO]) -> None:
    stream = kind()
    with progress_bar(stream) as progress:
        for done in range(101):
            progress("packing", done, 100)
    assert stream.getvalue() == ""


@pytest.mark.usefixtures("at_once")
def test_without_a_terminal_a_task_is_two_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar() as progress:
        for done in range(101):
            progress("packing to q4", done * 10**7, GB)
        progress("reading", 5 * 10**6, 10**7)
        progress("reading", 10**7, 10**7)
        progress("broken off", 0, GB)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.sub(r"after \d+ s", "after n s", err).splitlines() == [
        "packing to q4: 0.0 MB of 1.00 GB done, this takes a while",
        "packing to q4: done after n s",
        "reading: 5.0 MB of 10.0 MB done, this takes a while",
        "reading: done after n s",
        "broken off: 0.0 MB of 1.00 GB done, this takes a while",
    ]


def fail(terminal: Terminal, error: type[BaseException]) -> None:
    with progress_bar(terminal) as progress:
        progress("packing", 1, 2)
        raise error


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_ends_the_bar_and_passes_through(
    terminal: Terminal, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        fail(terminal, error)
    assert is_gone(terminal)


@pytest.mark.usefixtures("never")
def test_an_error_leaves_no_timer_behind(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(terminal, KeyboardInterrupt)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(60)  # cancelled, so it ends at once
            assert not thread.is_alive()


def test_a_task_that_is_silent_for_long_is_still_shown() -> None:
    class View:
        shown = threading.Event()

        def begin(self, task: str, done: int, total: int) -> None:
            assert (task, done, total) == ("hashing", 0, 9)
            self.shown.set()

        def go_on(self, done: int, total: int) -> None: ...
        def end(self, seconds: float) -> None: ...
        def close(self) -> None: ...

    watch = module._Watch(View(), 0.001)
    watch("hashing", 0, 9)
    assert View.shown.wait(60)
    watch.close()


@pytest.mark.usefixtures("at_once")
def test_work_that_is_not_in_bytes_is_shown_in_its_unit(terminal: Terminal) -> None:
    log = io.StringIO()
    for shown in (terminal, log):
        with progress_bar(shown) as progress:
            progress("recording, tokens", 1500, 6000)
            progress("recording, tokens", 3000, 12000)  # an estimate may change
    assert "3,000/12,000 tokens" in terminal.getvalue()
    assert "25%" in terminal.getvalue()
    assert "MB" not in terminal.getvalue()
    assert log.getvalue() == "recording: 1,500 of 6,000 tokens done, this takes a while\n"


@pytest.mark.usefixtures("at_once")
def test_a_log_that_cannot_be_written_does_not_end_the_work() -> None:
    file = io.StringIO()
    with progress_bar(file) as progress:
        file.close()
        progress("packing", 1, 2)
        progress("packing", 2, 2)


@pytest.mark.usefixtures("at_once")
def test_a_terminal_that_cannot_redraw_a_line_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar() as progress:
        progress("packing", 1, 2)
    assert capsys.readouterr().err == "packing: 0.0 MB of 0.0 MB done, this takes a while\n"


def test_tqdm_is_not_imported_for_short_work(tmp_path: Path) -> None:
    script = (
        "import sys; from hybrid.cli.progress_bar import progress_bar\n"
        "with progress_bar() as progress: progress('packing', 0, 2); progress('packing', 2, 2)\n"
        "sys.exit('tqdm' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0
