"""HandOffs: the exchanges between GPU and CPU within one pass over the model.

Data is exchanged in host memory that both devices see. A hand-off begins when the device has
written its input there. It ends when the CPU's answer is there. In between the device continues
with other work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor

from hybrid.engine.gpu.device import Device, Event, Mechanism, copy
from hybrid.kernels._native import FLAG_BYTES, PREFILL_CHUNK, DeviceLink

PATIENCE_S = 2.0  # how long the device and the CPU's thread wait for each other before they fail


class Exchange:
    """Host memory that device and session share, and the link whose flags are in it too."""

    def __init__(
        self,
        device: Device,
        hidden_size: int,
        n_neurons: int,
        n_slots: int,
        patience_s: float = PATIENCE_S,
    ) -> None:
        hidden, n = hidden_size, PREFILL_CHUNK
        self.x, self.h, self.y = (device.host(n, hidden) for _ in range(3))
        self.gates = device.host(n, n_neurons)
        flags = device.host((n_slots + 1) * FLAG_BYTES // 4).numpy().view(np.uint8)
        begin = -flags.ctypes.data % 64
        self.link = DeviceLink(
            flags=flags[begin : begin + n_slots * FLAG_BYTES],
            n_slots=n_slots,
            x=self.x.numpy(),
            h=self.h.numpy(),
            gates=self.gates.numpy(),
            y=self.y.numpy(),
            patience_s=patience_s,
        )


class HandOffs:
    """The hand-offs of one pass, one slot after the other."""

    def __init__(
        self,
        device: Device,
        link: DeviceLink,
        mechanism: Mechanism,
        answer: Callable[[int], object],
    ) -> None:
        """`answer` computes a slot's segment on the calling thread.

        It is used only by "synchronise"; with other mechanisms the session's thread answers.
        """
        self.device, self.link, self.mechanism = device, link, mechanism
        self._answer = answer
        self._slot = 0
        self._event: Event | None = None  # of the open hand-off, if the mechanism is "synchronise"
        self._is_open = False

    def start(self, *copies: tuple[Tensor, Tensor]) -> None:
        """Let the device copy (target, source) pairs and then signal the CPU to begin."""
        for target, source in copies:
            self.device.launch(copy, target, source)
        if self.mechanism == "synchronise":
            self._event = self.device.event()
            self.device.call(self._event.record)
        else:
            self.device.request(self.link, self._slot, self.mechanism)
        self._is_open = True

    def finish(self, *copies: tuple[Tensor, Tensor]) -> None:
        """Let the device wait for the CPU's answer and then copy (target, source) pairs."""
        self._end_slot(is_awaited=True)
        for target, source in copies:
            self.device.launch(copy, target, source)

    def close(self) -> None:
        """End the pass. A hand-off that is still open ends too, without a wait by the device."""
        if self._is_open:
            self._end_slot(is_awaited=False)

    def _end_slot(self, *, is_awaited: bool) -> None:
        if self.mechanism == "synchronise":
            assert self._event is not None
            self.device.call(partial(self._synchronise, self._event, self._slot))
        elif is_awaited:
            self.device.wait(self.link, self._slot, self.mechanism)
        self._slot += 1
        self._is_open = False

    def _synchronise(self, event: Event, slot: int) -> None:
        event.synchronize()
        self._answer(slot)
