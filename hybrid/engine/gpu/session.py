"""HybridSession: one sequence over both devices.

The CPU's share is a native session. The GPU's share is a lane of the executor with its recordings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hybrid.engine.gpu.device import Work
from hybrid.engine.gpu.hand_off import HandOffs
from hybrid.engine.gpu.operations import GpuSide, Pass
from hybrid.engine.scheduler import SILENT, Scheduler
from hybrid.errors import DeviceFailed, InvalidOption
from hybrid.kernels import KvFormat
from hybrid.kernels._native import PREFILL_CHUNK, Session, meet
from hybrid.model.forward import forward

if TYPE_CHECKING:
    from hybrid.engine.gpu.executor import HybridExecutor

# A recording's attention reads a fixed number of positions: this many, doubled as often as needed.
SMALLEST_BUCKET = 256
_ERRORS = {
    1: "the GPU did not request the CPU's work in time",
    2: "the CPU's answer did not come in time",
    3: "a token was aborted",
}


class HybridSession:
    """One sequence over both devices, with the interface of `kernels.Session`."""

    def __init__(self, executor: HybridExecutor, native: Session, *, is_dense: bool) -> None:
        executor.check()
        self._executor, self._native, self._is_dense = executor, native, is_dense
        self._lane = executor.take_lane()
        self._lane.tensors.counts.zero_()
        meet(native, self._lane.exchange.link)
        self._n_passed = 0  # tokens since the counts were reset
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

    @property
    def kv(self) -> KvFormat:
        return self._native.kv

    @property
    def largest_kv(self) -> float:
        """The largest magnitude of the keys and values that the CPU stored.

        It is infinite if one on the GPU exceeds fp16. It is then NaN there, and so are the logits:
        only if they are not finite, the GPU's cache is looked at.
        """
        if not np.isfinite(self.logits.max()):
            caches = self._lane.tensors.caches.values()
            stored = [of[:, : self.position] for cache in caches for of in cache]
            if any(bool(of.isnan().any()) for of in stored):
                return math.inf
        return self._native.largest_kv

    def truncate(self, position: int) -> None:
        self._native.truncate(position)

    def decode(self, token: int) -> None:
        """Append one token.

        The first token of each context bucket runs step by step, as a warm-up. The second token
        makes a recording. It and later tokens replay the recording.
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
            raise InvalidOption("observing needs the whole model on the CPU; use device cpu")
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
    def shortlisted_count(self) -> int:
        return self._native.shortlisted_count

    @property
    def decode_bytes(self) -> dict[str, int]:
        """The bytes that the CPU read, by part of the model, as counted."""
        return self._native.decode_bytes

    @property
    def stage_seconds(self) -> dict[str, float]:
        return self._native.stage_seconds

    def reset_counts(self) -> None:
        self._n_passed = 0
        self._lane.tensors.counts.zero_()
        self._native.reset_counts()

    def _check_tokens(self, tokens: NDArray[np.integer]) -> None:
        """Check a call completely before anything runs on the CPU or the GPU. Raises ValueError."""
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

    def _schedule(self, hand_offs: HandOffs, shape: Pass) -> GpuSide:
        """Launch the GPU's side of one pass."""
        executor, lane = self._executor, self._lane
        executor.device.launch(lane.tensors.position.copy_, lane.position, True)
        side = GpuSide(executor, lane, hand_offs, shape)
        forward(Scheduler(executor.plan, SILENT, side), executor.model, executor.config)
        if side.has_logits:
            side.fetch((lane.logits, lane.tensors.logits))
        return side

    def _launch_decode(self, key: tuple[int, bool]) -> None:
        executor, lane = self._executor, self._lane

        def answer(slot: int) -> None:
            assert lane.native is not None
            lane.native.run_segment(slot)

        hand_offs = HandOffs(executor.device, lane.exchange.link, executor.mechanism, answer)
        self._schedule(hand_offs, Pass(1, key[0], is_decode=True, computes_all=key[1]))

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
        """Run one pass step by step, with synchronising hand-offs."""
        executor, lane, native = self._executor, self._lane, self._native
        on_cpu = None if executor.plan.is_head_on_gpu else logits
        native.begin(tokens, is_decode=is_decode, logits=on_cpu)
        lane.position[0] = self.position
        hand_offs = HandOffs(executor.device, lane.exchange.link, "synchronise", native.run_segment)
        shape = Pass(len(tokens), n_visible, is_decode=is_decode, computes_all=self._is_dense)
        side = self._schedule(hand_offs, shape)
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
    """Add counts per layer. The CPU's list is shorter if its program lacks the last layers."""
    return [gpu + cpu for gpu, cpu in zip_longest(on_gpu, on_cpu, fillvalue=0)]


class _Guard:
    """Gives the device to one session at a time.

    Any error inside it, including an interruption, makes the executor fail permanently. The reason
    is that the stream may wait for an answer that never comes, and caches may be half written.
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
