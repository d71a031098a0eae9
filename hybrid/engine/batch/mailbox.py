"""Mailbox: pieces of text on their way from the loop's thread to one consumer.

The consumer waits on a thread of its own or in an event loop of asyncio.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from hybrid.errors import EngineClosed

if TYPE_CHECKING:
    import asyncio


class Mailbox:
    """Pieces in order, and then the end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._process_id = os.getpid()
        self._pieces: deque[str] = deque()
        self._is_over = False
        self._error: Exception | None = None
        self._wake: Callable[[], object] | None = None  # wakes the consumer's event loop

    def put(self, piece: str) -> bool:
        """Hand a piece to the consumer. Returns False if its event loop was closed."""
        with self._changed:
            self._pieces.append(piece)
            try:
                self._notify()
            except RuntimeError:
                return False
            return True

    def end(self, error: Exception | None = None) -> None:
        """Say that no piece follows. The consumer gets the error after the pieces."""
        with self._changed, suppress(RuntimeError):
            self._is_over, self._error = True, error
            self._notify()

    def get(self) -> str | None:
        """Wait for the next piece. Returns None at the end. Raises what ended the pieces."""
        self._check_process()
        with self._changed:
            self._changed.wait_for(self._is_ready)
            return self._take()

    async def get_async(self) -> str | None:
        """Do what `get` does, in an event loop."""
        import asyncio  # whoever awaits this has imported it

        self._check_process()
        while True:
            with self._changed:
                if self._is_ready():
                    return self._take()
                loop = asyncio.get_running_loop()
                waiter: asyncio.Future[None] = loop.create_future()
                self._wake = partial(loop.call_soon_threadsafe, _resolve, waiter)
            await waiter

    def _is_ready(self) -> bool:
        return bool(self._pieces) or self._is_over

    def _take(self) -> str | None:
        if self._pieces:
            return self._pieces.popleft()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return None

    def _notify(self) -> None:
        """Raises RuntimeError if the consumer's event loop was closed."""
        self._changed.notify_all()
        wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def _check_process(self) -> None:
        if os.getpid() != self._process_id:
            raise EngineClosed(
                "the answer is generated in the process that this one was forked from; load the "
                "model in the child"
            )


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():  # it is done if its task was cancelled
        waiter.set_result(None)
