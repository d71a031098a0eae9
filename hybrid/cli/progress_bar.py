"""A progress bar on the terminal for `hybrid.progress`. For front-ends.

Short work shows nothing and costs nothing, because tqdm is imported only after a task has taken a
while. If standard error is not a terminal, a long task writes one line when it proves to be long,
and one line when it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any, Protocol

from hybrid.progress import Progress

_DRAW_AFTER_S = 0.5  # a bar that only flashes up is useless
_WRITE_AFTER_S = 2.0  # longer than for a bar, because a line in a log stays
_REDRAW_S = 0.1
_WIDE = 72  # columns that a line with amounts, speed and remaining time needs


@contextlib.contextmanager
def progress_bar(stream: IO[str] | None = None) -> Iterator[Progress]:
    """Yield a Progress that draws a bar on `stream` (default: standard error) for a long task.

    At the end the bar is removed.
    """
    stream = stream or sys.stderr
    view: _View
    if _is_terminal(stream):
        view, patience_s = _Bar(stream), _DRAW_AFTER_S
    else:
        view, patience_s = _Lines(stream), _WRITE_AFTER_S
    watch = _Watch(view, patience_s)
    try:
        yield watch
    finally:
        watch.close()


class _View(Protocol):
    """Shows one task after the other. Any thread may call it, but only one at a time."""

    def begin(self, task: str, done: int, total: int) -> None: ...
    def go_on(self, done: int, total: int) -> None: ...
    def end(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class _Watch:
    """The Progress: shows a task in its view once it takes long, even if the task never reports."""

    def __init__(self, view: _View, patience_s: float) -> None:
        self._view = view
        self._patience_s = patience_s
        self._lock = threading.Lock()  # shared by the working thread and the timer's thread
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
    """One line on the terminal, drawn at most ten times a second."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self._line: Any = None  # a tqdm

    def begin(self, task: str, done: int, total: int) -> None:
        self.close()
        name, unit = _name_and_unit(task)
        self._line = _open_line(self._stream, name, unit, done, total)

    def go_on(self, done: int, total: int) -> None:
        if self._line is not None:
            self._line.total = max(total, 1)
            self._line.update(done - self._line.n)

    def end(self, seconds: float) -> None:
        if self._line is not None:  # the full line stays until the next task or the end
            self._line.refresh()

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None


def _open_line(stream: IO[str] | None, name: str, unit: str, done: int, total: int) -> Any:
    from tqdm import tqdm

    class Line(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread that redraws

        @property
        def format_dict(self) -> dict[str, Any]:
            """tqdm's own fields, and those that `bar_format` below adds."""
            fields: dict[str, Any] = super().format_dict
            rate = fields["rate"]
            if rate is None and fields["elapsed"] > 0:
                rate = (fields["n"] - fields["initial"]) / fields["elapsed"]
            fields["amounts"] = _amounts(fields["n"], fields["total"], unit)
            fields["speed"] = f"{_amount(rate, unit)}/s" if rate else ""
            return fields

    width = shutil.get_terminal_size().columns
    with contextlib.suppress(OSError, ValueError):
        width = os.get_terminal_size(stream.fileno()).columns if stream else width
    wide = "{amounts} {speed} {remaining}" if width >= _WIDE else ""
    return Line(
        desc=name,
        initial=done if total else 1,
        total=max(total, 1),
        file=stream,
        leave=False,
        ncols=width - 1,  # text in the last column would start a new line
        bar_format="{desc} {bar} {percentage:3.0f}% " + wide,
        mininterval=_REDRAW_S,
    )


class _Lines:
    """Two lines per long task, for logs and pipes."""

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
        # A closed pipe or a full disk must not end the work.
        with contextlib.suppress(OSError, ValueError):
            if self._stream:
                self._stream.write(line + "\n")
                self._stream.flush()


def _is_terminal(stream: IO[str] | None) -> bool:
    # Dumb terminals cannot move the cursor back to redraw a line.
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return stream is not None and stream.isatty() and not is_dumb


def _name_and_unit(task: str) -> tuple[str, str]:
    """Split "recording, tokens" into the task's name and its unit; the default unit is bytes."""
    name, _, unit = task.rpartition(", ")
    return (name, unit) if name else (task, "bytes")


def _amount(n: float, unit: str) -> str:
    if unit != "bytes":
        return f"{n:,.0f} {unit}"
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _amounts(done: float, total: float, unit: str) -> str:
    if unit != "bytes":
        return f"{done:,.0f}/{total:,.0f} {unit}"
    divisor, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / divisor:.1f}/{total / divisor:.1f} {name}"
