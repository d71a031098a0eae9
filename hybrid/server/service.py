"""Service: the model behind a server, from its loading to the last answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from hybrid import BatchLoop, Engine
from hybrid.server.api_error import ApiError, unavailable
from hybrid.server.form_check import FormChecker
from hybrid.server.settings import ServerSettings

_Result = TypeVar("_Result")
MAX_PREPARING = 128
N_PREPARING = 4  # requests that are read at once: texts are encoded there, not in the event loop


class Model(NamedTuple):
    """A loaded model, and the loop that answers requests for it."""

    engine: Engine
    loop: BatchLoop


class Service:
    """Owns the batching loop. It is loading until `open`, and shutting down from `drain` on."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings, self.started = settings, int(time.time())
        self._model: Model | None = None
        self._is_draining = False
        self._n_preparing = 0  # requests that are being read; the event loop's own
        self._checker = FormChecker()
        self._preparing = ThreadPoolExecutor(N_PREPARING, "hybrid-request")

    def open(self, engine: Engine) -> None:
        """Answer requests with this engine from now on. Raises as BatchLoop does."""
        settings = self.settings
        # Now, because it would hold up all answers for a second when the first request needs it.
        engine.prepare_grammars(self._checker)
        loop = BatchLoop(
            engine,
            n_sequences=settings.n_sequences,
            queue_size=settings.queue_size,
            cache_bytes=settings.cache_bytes,
        )
        self._model = Model(engine, loop)

    @property
    def model(self) -> Model:
        """The model. Raises ApiError with status 503 while there is none, or none any more."""
        if self._is_draining:
            raise unavailable("the server is shutting down", "shutting_down")
        if self._model is None:
            raise unavailable("the model is being loaded", "loading")
        if self._model.loop.is_closed:  # a mistake of ours has ended it
            raise ApiError(
                500, "the batching loop has ended; start the server again", "server_error"
            )
        return self._model

    async def prepare(self, work: Callable[[], _Result]) -> _Result:
        """Run work on a thread: what a client sends may take a second to read and encode.

        Work that has not begun is dropped if the task is cancelled. Raises ApiError if too much of
        it waits.
        """
        if self._n_preparing >= MAX_PREPARING:
            raise unavailable("too many requests are being read", "queue_full")
        self._n_preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._preparing, work)
        finally:
            self._n_preparing -= 1

    def drain(self, seconds: float) -> None:
        """Refuse new requests, give running answers some time to end, and end the others."""
        self._is_draining = True
        if self._model is None:
            return
        loop, deadline = self._model.loop, time.monotonic() + seconds
        while (loop.running or loop.stats.n_waiting) and time.monotonic() < deadline:
            time.sleep(0.05)
        loop.close()

    def close(self) -> None:
        """End all answers now. The engine is the caller's to close."""
        self.drain(0)
        self._checker.close()
        self._preparing.shutdown(wait=False, cancel_futures=True)
