"""Progress: how work that takes a while tells its caller how far it is.

The library never prints: it calls what it was given, and front-ends draw the bar.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then, from one thread at a time."""

    def __call__(self, task: str, done: int, total: int) -> None:
        """`task` says what is being done, such as "packing to q4"; `done` of `total` bytes are.
        Work that is not counted in bytes names its unit behind a comma: "recording, tokens".
        `total` may be an estimate that changes.

        The first call of a task has `done` 0 or what an earlier run left, the last one has
        `done == total`.
        """


def ignore_progress(task: str, done: int, total: int) -> None:
    """The Progress of a caller that does not ask for any."""
