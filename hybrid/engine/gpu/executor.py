"""Hybrid executor: runs a model of which a plan puts parts on a GPU.

It owns the weights of both sides and the recordings. Each session borrows a lane, which is a
sequence's memory on the GPU. The CPU's share of a session is a native session.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import torch

from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.gpu.device import Device, Mechanism, Work
from hybrid.engine.gpu.hand_off import PATIENCE_S, Exchange
from hybrid.engine.gpu.session import HybridSession
from hybrid.engine.gpu.weights import Lane, device_bytes, upload
from hybrid.errors import DeviceFailed, InvalidOption, OutOfMemory
from hybrid.kernels import Format, KvFormat, ThreadPool
from hybrid.kernels._native import Session
from hybrid.kernels.gpu.torch_kernels import TorchKernels
from hybrid.model.config import ModelConfig
from hybrid.placement.plan import PlacementPlan
from hybrid.weights.unpacked import PackedReader


class HybridExecutor:
    """A packed model that is ready to run on both devices."""

    def __init__(
        self,
        cpu: CpuExecutor,
        plan: PlacementPlan,
        device: Device,
        *,
        decode_kernels: TorchKernels | None = None,
        mechanism: Mechanism | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`cpu` holds the weights, and must have recorded the CPU's share of the plan.

        `decode_kernels` process one token; None uses the kernels of prefill. `mechanism` None takes
        the plan's mechanism if the device has it, else the device's first one. Raises OutOfMemory,
        DeviceFailed.
        """
        self.cpu, self.model, self.plan, self.device = cpu, cpu.model, plan, device
        self.config: ModelConfig = cpu.layout.config
        self.format: Format = cpu.layout.format
        self.n_context, self.patience_s = cpu.n_context, patience_s
        self.prefill_kernels = TorchKernels()
        self.decode_kernels = decode_kernels or self.prefill_kernels
        planned = [own for own in device.mechanisms if own == plan.hand_offs]
        self.mechanism: Mechanism = mechanism or (*planned, *device.mechanisms)[0]
        self.failure: str | None = None
        self.lock = threading.Lock()  # held by the session that uses the device
        self._free_lanes: list[SessionLane] = []
        self._n_lanes = self.lane_bytes = 0
        if plan.vram_budget:
            # Torch must stay within the plan, including what it rounds up and needs for itself.
            device.limit(plan.vram_budget - plan.context_bytes + plan.torch_bytes)
        try:
            reader = PackedReader(cpu.model.embedding.memory, cpu.layout)
            self.weights = upload(reader, plan, cpu.n_context, device.torch_device)
            self.weight_bytes = device_bytes(self.weights)
            self._free_lanes.append(self._new_lane())
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"the plan's {plan.vram_bytes / 2**20:.0f} MiB do not fit on {device.name}: "
                f"{str(error).splitlines()[0]} Make a plan with a smaller --vram-budget"
            ) from error

    @property
    def pool(self) -> ThreadPool:
        return self.cpu.pool

    def close(self) -> None:
        """Drop the free lanes. Open sessions keep working and keep their lanes."""
        self._free_lanes.clear()

    def open_session(
        self, *, is_dense: bool = False, is_timed: bool = False, kv: KvFormat = KvFormat.fp16
    ) -> HybridSession:
        """Raises InvalidOption for a KV cache that the GPU does not have."""
        if kv is not KvFormat.fp16:
            raise InvalidOption(f"kv {kv.name}: the GPU's KV cache is fp16; use device cpu")
        native = self.cpu.open_session(is_dense=is_dense, is_timed=is_timed)
        return HybridSession(self, native, is_dense=is_dense)

    def take_lane(self) -> SessionLane:
        if self._free_lanes:
            return self._free_lanes.pop()
        return self._new_lane()

    def return_lane(self, lane: SessionLane) -> None:
        self._free_lanes.append(lane)

    def check(self) -> None:
        """Raises DeviceFailed after any failure, because the GPU's data cannot be trusted then."""
        if self.failure is not None:
            raise DeviceFailed(f"{self.device.name}: {self.failure}; load the model again")

    def fail(self, why: str) -> None:
        self.failure = self.failure or why

    def _new_lane(self) -> SessionLane:
        budget, context = self.plan.vram_budget, self.plan.context_bytes
        needed = context + self.weight_bytes + (self._n_lanes + 1) * self.lane_bytes
        if self._n_lanes > 0 and budget and needed > budget:
            raise OutOfMemory(
                f"the plan's VRAM budget has room for {self._n_lanes} session(s) of "
                f"{self.n_context} tokens at a time; close one, or make a plan with a larger budget"
            )
        self.check()
        tensors = Lane(
            self.config,
            self.format,
            self.plan,
            self.n_context,
            self.decode_kernels,
            self.device.torch_device,
        )
        self._n_lanes += 1
        self.lane_bytes = device_bytes(tensors)
        return SessionLane(self, tensors)


class SessionLane:
    """A sequence's memory on the device, and the recordings that use it."""

    def __init__(self, executor: HybridExecutor, tensors: Lane) -> None:
        self.tensors = tensors
        device, config = executor.device, executor.config
        self.exchange = Exchange(
            device,
            config.hidden_size,
            config.n_neurons,
            executor.cpu.n_segments,
            executor.patience_s,
        )
        self.position = device.host(1, dtype=torch.int64)
        self.logits = device.host(*tensors.logits.shape)
        self.recordings: dict[tuple[int, bool], Sequence[Work]] = {}
        self.warm: set[tuple[int, bool]] = set()
        self.native: Session | None = None  # the session that answers hand-offs now
        self._device = device

    def __del__(self) -> None:
        # Flags and functions that the stream may still use must live until its work is done.
        exchange, device = getattr(self, "exchange", None), getattr(self, "_device", None)
        if exchange is not None and device is not None:
            exchange.link.abandon()
            with contextlib.suppress(Exception):  # the device failed, or the process is ending
                device.synchronize()
