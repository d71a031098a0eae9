"""The hybrid executor: a model of which a plan puts parts on a GPU. It owns both sides' weights and
the recordings; each session borrows a lane, and has the CPU's share as a native session.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid.engine.cpu_executor import CpuExecutor
from hybrid.engine.device import Device, Mechanism, Work
from hybrid.engine.gpu_side import GpuSide
from hybrid.engine.gpu_weights import Lane, device_bytes, upload
from hybrid.engine.hand_off import PATIENCE_S, Exchange, HandOffs
from hybrid.engine.scheduler import SILENT, Scheduler
from hybrid.errors import DeviceFailed, InvalidOption, OutOfMemory
from hybrid.kernels import Format, ThreadPool
from hybrid.kernels._native import PREFILL_CHUNK, Session, meet
from hybrid.kernels.torch_kernels import TorchKernels
from hybrid.model_config import ModelConfig
from hybrid.placement.plan import PlacementPlan
from hybrid.weights.packed import PackedModel
from hybrid.weights.unpacked import PackedReader

SMALLEST_BUCKET = 256  # positions that a recording's attention looks at; others double it
_ERRORS = {
    1: "the GPU did not ask for the CPU's work in time",
    2: "the CPU's work did not come in time",
    3: "a token was cut off",
}


class HybridExecutor:
    """A packed model, ready to run on both devices."""

    def __init__(
        self,
        cpu: CpuExecutor,
        model: PackedModel,
        reader: PackedReader,
        plan: PlacementPlan,
        device: Device,
        *,
        n_context: int,
        decode_kernels: TorchKernels | None = None,
        mechanism: Mechanism | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`cpu` has recorded the plan's share. `decode_kernels` take one token at a time (those of
        prefill where None). `mechanism`: else the plan's, where the device has it. Raises
        OutOfMemory, DeviceFailed.
        """
        self.cpu, self.model, self.plan, self.device = cpu, model, plan, device
        self.config: ModelConfig = reader.config
        self.format: Format = reader.format
        self.n_context, self.patience_s = n_context, patience_s
        self.prefill_kernels = TorchKernels()
        self.decode_kernels = decode_kernels or self.prefill_kernels
        planned = [own for own in device.mechanisms if own == plan.hand_offs]
        self.mechanism: Mechanism = mechanism or (*planned, *device.mechanisms)[0]
        self.failure: str | None = None
        self.lock = threading.Lock()  # held by the session that uses the device
        self._free_lanes: list[_Lane] = []
        self._n_lanes = self.lane_bytes = 0
        try:
            self.weights = upload(reader, plan, n_context, device.torch_device)
            self.weight_bytes = device_bytes(self.weights)
            self._free_lanes.append(self._new_lane())
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"the plan's {plan.vram_bytes / 2**20:.0f} MiB do not fit on {device.name}: "
                f"{str(error).splitlines()[0]} Make a plan for a smaller --vram-budget"
            ) from error

    @property
    def pool(self) -> ThreadPool:
        return self.cpu.pool

    def close(self) -> None:
        """Sessions that are open go on; their lanes go with them."""
        self._free_lanes.clear()

    def open_session(self, *, is_dense: bool = False, is_timed: bool = False) -> HybridSession:
        native = self.cpu.open_session(is_dense=is_dense, is_timed=is_timed)
        return HybridSession(self, native, is_dense=is_dense)

    def take_lane(self) -> _Lane:
        if self._free_lanes:
            return self._free_lanes.pop()
        return self._new_lane()

    def return_lane(self, lane: _Lane) -> None:
        self._free_lanes.append(lane)

    def check(self) -> None:
        """Raises DeviceFailed once anything has failed: what the GPU holds is not to be trusted."""
        if self.failure is not None:
            raise DeviceFailed(f"{self.device.name}: {self.failure}; load the model again")

    def fail(self, why: str) -> None:
        self.failure = self.failure or why

    def _new_lane(self) -> _Lane:
        budget, context = self.plan.vram_budget, self.plan.context_bytes
        needed = context + self.weight_bytes + (self._n_lanes + 1) * self.lane_bytes
        if self._n_lanes > 0 and budget and needed > budget:
            raise OutOfMemory(
                f"the plan's VRAM budget has room for {self._n_lanes} session(s) of "
                f"{self.n_context} tokens at a time; close one, or make a plan for a larger one"
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
        return _Lane(self, tensors)


class _Lane:
    """A sequence's place on the device, and what was recorded there."""

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
        self.native: Session | None = None  # that answers now
        self._device = device

    def __del__(self) -> None:
        # What the stream may still wait for, or call, must outlive its work.
        exchange, device = getattr(self, "exchange", None), getattr(self, "_device", None)
        if exchange is not None and device is not None:
            exchange.link.abandon()
            with contextlib.suppress(Exception):  # of a device that failed, or a process that ends
                device.synchronize()


class HybridSession:
    """One sequence over both devices; the interface is `kernels.Session`'s."""

    def __init__(self, executor: HybridExecutor, native: Session, *, is_dense: bool) -> None:
        executor.check()
        self._executor, self._native, self._is_dense = executor, native, is_dense
        self._lane = executor.take_lane()
        self._lane.tensors.counts.zero_()
        meet(native, self._lane.exchange.link)
        self._n_passed = 0  # tokens since counts were reset
        self._logits = np.zeros(executor.config.vocab_size, np.float32)

    def __del__(self) -> None:
        lane = getattr(self, "_lane", None)
        if lane is not None:
            lane.native = None
            self._executor.return_lane(lane)

    @property
    def position(self) -> int:
        return self._native.position

    @property
    def n_context(self) -> int:
        return self._native.n_context

    @property
    def logits(self) -> NDArray[np.float32]:
        if not self._executor.plan.is_head_on_gpu:
            return self._native.logits
        view = self._logits.view()
        view.flags.writeable = False
        return view

    def truncate(self, position: int) -> None:
        self._native.truncate(position)

    def decode(self, token: int) -> None:
        """Append one token. The first of each length of context runs step by step, as a warm-up;
        the next is recorded.
        """
        executor, lane = self._executor, self._lane
        executor.check()
        self._check_tokens(np.array([token]))
        key = (self._bucket(self.position + 1), self._is_dense)
        with self._guarded(), executor.device.on_stream():
            if key not in lane.warm:
                self._pass(np.array([token], np.int64), is_decode=True, n_visible=key[0])
                lane.warm.add(key)
            else:
                if key not in lane.recordings:
                    lane.recordings[key] = executor.device.record(partial(self._launch_decode, key))
                self._replay(lane.recordings[key], token)
        self._n_passed += 1

    def prefill(
        self,
        tokens: NDArray[np.int64],
        all_logits: bool = False,
        masks: object = None,
        inputs: object = None,
    ) -> NDArray[np.float32] | None:
        if masks is not None:
            raise InvalidOption("observing needs the whole model on the CPU: use device cpu")
        executor = self._executor
        executor.check()
        self._check_tokens(tokens)
        shape = len(tokens), executor.config.vocab_size
        logits = np.empty(shape, np.float32) if all_logits else None
        for first in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[first : first + PREFILL_CHUNK]
            rows = None if logits is None else logits[first : first + len(chunk)]
            n_visible = self._bucket(self.position + len(chunk))
            with self._guarded(), executor.device.on_stream():
                self._pass(chunk, is_decode=False, n_visible=n_visible, logits=rows)
        self._n_passed += len(tokens)
        return logits

    @property
    def active_counts(self) -> list[int]:
        hot = self._lane.tensors.counts.sum(1).cpu().tolist()
        return _sums(hot, self._native.active_counts)

    @property
    def predicted_counts(self) -> list[int]:
        on_gpu = [layer.n_gate * self._n_passed for layer in self._executor.plan.layers]
        return _sums(on_gpu, self._native.predicted_counts)

    @property
    def decode_bytes(self) -> dict[str, int]:
        """The CPU's, by part, as counted."""
        return self._native.decode_bytes

    @property
    def stage_seconds(self) -> dict[str, float]:
        return self._native.stage_seconds

    def reset_counts(self) -> None:
        self._n_passed = 0
        self._lane.tensors.counts.zero_()
        self._native.reset_counts()

    def _check_tokens(self, tokens: NDArray[np.integer]) -> None:
        """All that could be wrong with a call, before anything runs on either side."""
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError("tokens must be (n,), n > 0")
        if tokens.min() < 0 or tokens.max() >= self._executor.config.vocab_size:
            raise ValueError("token beyond the vocabulary")
        if tokens.size > self.n_context - self.position:
            raise ValueError("the context is full")

    def _bucket(self, n_positions: int) -> int:
        bucket = SMALLEST_BUCKET
        while bucket < n_positions:
            bucket *= 2
        return min(bucket, self._executor.n_context)

    def _schedule(
        self, hand_offs: HandOffs, *, n_tokens: int, n_visible: int, is_decode: bool
    ) -> GpuSide:
        """Launch one pass."""
        executor, lane = self._executor, self._lane
        executor.device.launch(lane.tensors.position.copy_, lane.position, True)
        side = GpuSide(
            executor.device,
            executor.decode_kernels if is_decode else executor.prefill_kernels,
            executor.weights,
            lane.tensors,
            lane.exchange,
            hand_offs,
            executor.config,
            executor.plan,
            n_tokens=n_tokens,
            n_visible=n_visible,
            computes_all=self._is_dense,
        )
        Scheduler(executor.plan, SILENT, side).run(executor.model, executor.config)
        if side.has_logits:
            side.fetch((lane.logits, lane.tensors.logits))
        return side

    def _launch_decode(self, key: tuple[int, bool]) -> None:
        executor, lane = self._executor, self._lane

        def answer(slot: int) -> None:
            assert lane.native is not None
            lane.native.run_segment(slot)

        hand_offs = HandOffs(executor.device, lane.exchange.link, executor.mechanism, answer)
        self._schedule(hand_offs, n_tokens=1, n_visible=key[0], is_decode=True)

    def _replay(self, recording: Sequence[Work], token: int) -> None:
        executor, lane, native = self._executor, self._lane, self._native
        lane.position[0] = self.position
        lane.native = native
        link = lane.exchange.link
        if executor.mechanism == "synchronise":
            native.begin(np.array([token], np.int64), is_decode=True)
            for step in recording:
                step()
            native.end()
        else:
            link.arm()
            for step in recording:
                step()
            if not link.serve(native, token):
                raise DeviceFailed(_ERRORS.get(link.error, "the hand-off failed"))
        if executor.plan.is_head_on_gpu:
            executor.device.synchronize()
            self._logits[:] = lane.logits.numpy()[0]
        if link.error:
            raise DeviceFailed(_ERRORS[link.error])

    def _pass(
        self,
        tokens: NDArray[np.int64],
        *,
        is_decode: bool,
        n_visible: int,
        logits: NDArray[np.float32] | None = None,
    ) -> None:
        """Step by step, synchronising."""
        executor, lane, native = self._executor, self._lane, self._native
        on_cpu = None if executor.plan.is_head_on_gpu else logits
        native.begin(tokens, is_decode=is_decode, logits=on_cpu)
        lane.position[0] = self.position
        hand_offs = HandOffs(executor.device, lane.exchange.link, "synchronise", native.run_segment)
        side = self._schedule(
            hand_offs, n_tokens=len(tokens), n_visible=n_visible, is_decode=is_decode
        )
        native.end()
        executor.device.synchronize()
        if not executor.plan.is_head_on_gpu:
            return
        self._logits[:] = lane.logits.numpy()[0]
        if logits is None:
            return
        for token in range(len(tokens)):
            side.head_of(token, executor.config.logit_scale)
            side.fetch((lane.logits, lane.tensors.logits))
            executor.device.synchronize()
            logits[token] = lane.logits.numpy()[0]

    def _guarded(self) -> _Guard:
        return _Guard(self._executor, self._lane.exchange.link.abandon)


def _sums(on_gpu: list[int], on_cpu: list[int]) -> list[int]:
    """Layer by layer; the CPU's program counts up to the last layer that it has."""
    return [gpu + cpu for gpu, cpu in zip_longest(on_gpu, on_cpu, fillvalue=0)]


class _Guard:
    """The device for one session at a time. Any error within it, an interruption too, fails the
    executor for good: a stream may wait for an answer that nobody gives, and caches may be half
    written.
    """

    def __init__(self, executor: HybridExecutor, abandon: Callable[[], None]) -> None:
        self._executor, self._abandon = executor, abandon

    def __enter__(self) -> None:
        self._executor.lock.acquire()

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._executor.lock.release()
        if error is None:
            return
        self._abandon()
        self._executor.fail(str(error).splitlines()[0] if str(error) else type(error).__name__)
        if isinstance(error, (RuntimeError, DeviceFailed)):
            raise DeviceFailed(
                f"{self._executor.device.name}: {self._executor.failure}; load the model again"
            ) from error
