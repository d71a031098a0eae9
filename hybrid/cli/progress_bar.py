"""A bar on the terminal for the work that `hybrid.progress` tells of. For front-ends.

Short work shows nothing and costs nothing: rich is imported when a task has taken a while. Where
standard error is no terminal, a task that takes long is told in one line when that is known, and
in one when it has ended.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Protocol

from hybrid.progress import Progress

if TYPE_CHECKING:
    import rich.console
    import rich.progress

_DRAW_AFTER_S = 0.5  # a bar that only flashes up tells nobody anything
_WRITE_AFTER_S = 2.0  # in a log, a line stays
_WIDE = 72  # columns; in fewer, all that there is to tell would break into several lines


@contextlib.contextmanager
def progress_bar(console: rich.console.Console | None = None) -> Iterator[Progress]:
    """A Progress that draws a bar while a task takes long; at the end the bar is gone.

    Draws on `console`, else on standard error.
    """
    view: _View
    if console.is_terminal if console else _is_terminal(sys.stderr):
        view, patience_s = _Bar(console), _DRAW_AFTER_S
    else:
        view, patience_s = _Lines(console.file if console else sys.stderr), _WRITE_AFTER_S
    watch = _Watch(view, patience_s)
    try:
        yield watch
    finally:
        watch.close()


class _View(Protocol):
    """Shows one task after the other; from any thread, but one call at a time."""

    def begin(self, task: str, done: int, total: int) -> None: ...
    def go_on(self, done: int, total: int) -> None: ...
    def end(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class _Watch:
    """The Progress: hands a task to its view once it takes long, even if nothing is heard of it."""

    def __init__(self, view: _View, patience_s: float) -> None:
        self._view = view
        self._patience_s = patience_s
        self._lock = threading.Lock()  # between the thread that works and the timer's
        self._timer: threading.Timer | None = None
        self._task: str | None = None  # None between two tasks
        self._done = self._total = 0
        self._begun_s = 0.0
        self._is_shown = False

    def __call__(self, task: str, done: int, total: int) -> None:
        with self._lock:
            self._done, self._total = done, total
            if task != self._task:
                self._begin(task)
            elif self._is_shown:
                self._view.go_on(done, total)
            if done >= total:
                if self._is_shown:
                    self._view.end(time.monotonic() - self._begun_s)
                self._forget()

    def close(self) -> None:
        with self._lock:
            self._forget()
            self._view.close()

    def _begin(self, task: str) -> None:
        self._forget()
        self._task, self._begun_s = task, time.monotonic()
        if self._patience_s > 0:
            self._timer = threading.Timer(self._patience_s, self._wake, [task])
            self._timer.daemon = True
            self._timer.start()
        else:
            self._show()

    def _wake(self, task: str) -> None:
        with self._lock:
            if self._task == task and not self._is_shown:
                self._show()

    def _show(self) -> None:
        assert self._task is not None
        self._is_shown = True
        self._view.begin(self._task, self._done, self._total)

    def _forget(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._task = None
        self._is_shown = False


class _Bar:
    """One line on the terminal, drawn ten times a second by rich's own thread."""

    def __init__(self, console: rich.console.Console | None) -> None:
        self._console = console
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def begin(self, task: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        name, unit = _name_and_unit(task)
        self._task = self._bar.add_task(name, completed=done, total=total, unit=unit)

    def go_on(self, done: int, total: int) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def end(self, seconds: float) -> None:
        pass  # stays, full, until the next task or the end: nothing flickers

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = self._task = None

    def _start(self) -> rich.progress.Progress:
        from rich import progress
        from rich.console import Console

        def amounts(task: progress.Task) -> str:
            unit, total = task.fields["unit"], task.total or 0
            if unit != "bytes":
                return f"{task.completed:,.0f}/{total:,.0f} {unit}"
            divisor, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
            return f"{task.completed / divisor:.1f}/{total / divisor:.1f} {name}"

        def rate(task: progress.Task) -> str:
            unit = task.fields["unit"]
            return f"{_amount(task.speed, unit)}/s" if task.speed else ""

        console = self._console or Console(file=sys.stderr)
        columns: list[progress.ProgressColumn] = [
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=None),
            progress.TaskProgressColumn(),
        ]
        if console.width >= _WIDE:
            columns += [
                _column(amounts),
                _column(rate),
                progress.TimeRemainingColumn(),
            ]
        bar = progress.Progress(
            *columns,
            console=console,
            transient=True,
            expand=True,
            # Not replaced while the bar is there: the streams are the program's.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        bar.start()
        return bar


class _Lines:
    """For logs and pipes."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self._task = ""

    def begin(self, task: str, done: int, total: int) -> None:
        self._task, unit = _name_and_unit(task)
        done_so_far = _amount(done, unit) if unit == "bytes" else f"{done:,}"
        share = f"{done_so_far} of {_amount(total, unit)}"
        self._write(f"{self._task}: {share} done, this takes a while")

    def go_on(self, done: int, total: int) -> None:
        pass

    def end(self, seconds: float) -> None:
        self._write(f"{self._task}: done after {seconds:.0f} s")

    def close(self) -> None:
        pass

    def _write(self, line: str) -> None:
        # Nobody reads, or the disk of the log is full: no reason to end the work.
        with contextlib.suppress(OSError, ValueError):
            if self._stream:
                self._stream.write(line + "\n")
                self._stream.flush()


def _is_terminal(stream: IO[str] | None) -> bool:
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")  # cannot go back in a line
    return stream is not None and stream.isatty() and not is_dumb


def _name_and_unit(task: str) -> tuple[str, str]:
    """ "recording, tokens" → what is done, and what is counted: bytes where nothing is named."""
    name, _, unit = task.rpartition(", ")
    return (name, unit) if name else (task, "bytes")


def _amount(n: float, unit: str) -> str:
    if unit != "bytes":
        return f"{n:,.0f} {unit}"
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _column(text_of: Callable[[rich.progress.Task], str]) -> rich.progress.ProgressColumn:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Column(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: rich.progress.Task) -> Text:
            return Text(text_of(task), style="progress.download", no_wrap=True)

    return Column()
