"""Progress: how long work reports to its caller how far it is.

The library never prints. It calls the function that the caller passed, and front-ends draw a bar.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that the library calls from time to time, from one thread at a time."""

    def __call__(self, task: str, done: int, total: int) -> None:
        """Report that `done` of `total` bytes of a task, such as "packing to q4", are done.

        A task that does not count bytes names its unit after a comma: "recording, tokens".
        `total` may be an estimate that changes.

        In the first call of a task `done` is 0, or what an earlier run left. In the last call
        `done == total`.
        """


def ignore_progress(task: str, done: int, total: int) -> None:
    """The Progress of a caller that wants no reports."""
