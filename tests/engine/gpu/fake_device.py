"""A fake GPU: a thread that runs its work later, in order, with random delays.

The exchanged buffers hold NaN whenever the CPU or the GPU must not read them. So a missing wait
shows as NaN.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrid.engine.gpu.device import MECHANISMS, Mechanism, Work
from hybrid.engine.gpu.hand_off import Exchange
from hybrid.kernels._native import DeviceLink


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self._done = device, threading.Event()

    def record(self) -> None:
        self._done = done = threading.Event()
        self._device.enqueue(done.set)

    def synchronize(self) -> None:
        assert self._done.wait(10)


class FakeDevice:
    """A `hybrid.engine.gpu.device.Device` whose stream is a queue and a thread."""

    name = "a fake GPU"
    version = "1"
    torch_device = torch.device("cpu")
    mechanisms: Sequence[Mechanism] = MECHANISMS

    def __init__(self, *, seed: int = 0, jitter_s: float = 2e-4) -> None:
        self.exchange: Exchange | None = None  # its buffers are filled with NaN
        self.log: list[str] = []  # requests and waits, in the stream's order
        self._random, self._jitter_s = random.Random(seed), jitter_s
        self._recording: list[Work] | None = None
        self._queue: queue.Queue[Work | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(10)

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def enqueue(self, work: Work) -> None:
        self._queue.put(work)

    def launch(self, work: Callable[..., object], *arguments: Any) -> None:
        self._enqueue_or_record(lambda: work(*arguments))

    def call(self, work: Work) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def request(self, link: DeviceLink, slot: int, mechanism: Mechanism) -> None:
        def ask() -> None:
            if self.exchange is not None:
                self.exchange.y.fill_(float("nan"))  # the CPU has not written it yet
                if slot == 0:
                    self.exchange.x.fill_(float("nan"))
            self.log.append(f"request {slot}")
            link.request(slot)

        self._enqueue_or_record(ask)

    def wait(self, link: DeviceLink, slot: int, mechanism: Mechanism) -> None:
        def take() -> None:
            self.log.append(f"wait {slot}")
            link.await_answer(slot)
            if self.exchange is not None:  # the CPU has read them; a later read is an error
                self.exchange.h.fill_(float("nan"))
                self.exchange.gates.fill_(float("nan"))

        self._enqueue_or_record(take)

    def record(self, work: Work) -> Sequence[Work]:
        steps: list[Work] = []
        self._recording = steps
        try:
            work()
        finally:
            self._recording = None
        return steps

    def limit(self, n_bytes: int) -> None:
        pass

    def synchronize(self) -> None:
        if not self._thread.is_alive():
            return  # closed: everything is done
        event = self.event()
        event.record()
        event.synchronize()
        if self._error is not None:
            raise RuntimeError(f"the stream failed: {self._error}") from self._error

    def fail_later(self, error: BaseException) -> None:
        """Let the stream fail: `synchronize` raises from now on."""
        self._error = error

    def _enqueue_or_record(self, work: Work) -> None:
        if self._recording is None:
            self.enqueue(work)
        else:
            self._recording.append(lambda: self.enqueue(work))

    def _run(self) -> None:
        with torch.inference_mode():
            while (work := self._queue.get()) is not None:
                if self._random.random() < 0.1:
                    time.sleep(self._random.random() * self._jitter_s)
                try:
                    work()
                except BaseException as error:
                    self._error = error
