"""Ctrl-C in a process that is one of our commands: no traceback, exit code 130.

Modules take half a second to import, and an interrupt may come at any moment of it. Python then
prints a traceback, or a C extension replaces the exception by another one. So while a command is
imported, and after it has ended, Ctrl-C ends the process at once. While it runs, Ctrl-C raises
KeyboardInterrupt, so that it can clean up.

A program that imports hybrid keeps its own signal handlers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PACKAGES = ("hybrid", "predictors", "profiler")
INTERRUPTED = 130  # the exit code


def is_our_command() -> bool:
    """Return whether this process is `python -m` of one of our modules."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name if spec is not None else ""
    if spec is None and sys.argv[:1] == ["-m"]:  # Python is still importing the module's package
        arguments = sys.orig_argv
        name = arguments[arguments.index("-m") + 1] if "-m" in arguments[:-1] else ""
    return name.partition(".")[0] in PACKAGES


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process at once. Does nothing if SIGINT is ignored or handled already."""
    if _is_handled_by(signal.default_int_handler):
        signal.signal(signal.SIGINT, _end)


@contextmanager
def raising_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the body, if `end_on_interrupt` was called before."""
    if not _is_handled_by(_end):
        yield
        return
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def _is_handled_by(handler: object) -> bool:
    # Only the main thread may set a handler.
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGINT) is handler


def _end(signal_number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
