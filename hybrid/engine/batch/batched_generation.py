"""BatchedGeneration: an answer of a batching loop, as its consumer sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

from hybrid.engine.answer_view import AnswerView
from hybrid.engine.batch.stream import Stream


class BatchedGeneration(AnswerView):
    """The text of one answer as an iterator of pieces, for `for` and for `async for`.

    A piece never splits a character. The loop does not wait for the consumer: `text`, `tokens`,
    `logprobs`, `stats` and `finish_reason` may be ahead of the pieces that were read, and are as
    those of `Generation` otherwise. `stats` counts what all passes read and computed while this
    answer was decoded, for other answers too, and the time that they took. One thread or one task
    may iterate; any thread may cancel. Without a consumer, once nothing refers to this object, the
    answer is cancelled.
    """

    def __init__(self, stream: Stream, loop: object, notices: tuple[str, ...]) -> None:
        """`loop` is kept alive until this object is gone."""
        super().__init__(stream.answer)
        self._mailbox, self._loop, self._notices = stream.mailbox, loop, notices

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines that a user should see after the text: what had no effect, or was dropped."""
        return (*self._notices, *super().notices)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            piece = self._mailbox.get()
        except BaseException:  # such as a KeyboardInterrupt
            self.cancel()
            raise
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        try:
            piece = await self._mailbox.get_async()
        except BaseException:  # such as the task's CancelledError
            self.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """End the generation, and wait for that: at most as long as one pass takes."""
        self.cancel()
        with suppress(Exception):
            while self._mailbox.get() is not None:
                pass

    def __del__(self) -> None:
        if hasattr(self, "_mailbox"):
            self.cancel()
