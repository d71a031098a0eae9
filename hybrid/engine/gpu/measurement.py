"""Measure a device for the time model.

Measured are the bandwidth of decode's kernels, the cost of one more kernel in a recording, and the
cost of a hand-off with each mechanism.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrid.engine.gpu.device import Device, Mechanism, Work
from hybrid.engine.gpu.hand_off import PATIENCE_S, Exchange, HandOffs
from hybrid.engine.scheduler import SILENT, Scheduler, Silent
from hybrid.kernels import Activation, Format, Rows, Session, ThreadPool
from hybrid.kernels._native import meet
from hybrid.kernels.gpu.torch_kernels import (
    CHUNK_VALUES,
    DeviceMatrix,
    Neurons,
    TorchKernels,
    empty_vectors,
)
from hybrid.model.config import ModelConfig
from hybrid.model.forward import forward
from hybrid.model.program import ProgramRecorder, new_program
from hybrid.model.weights import LayerWeights, ModelWeights
from hybrid.placement.hardware import available_memory_bytes
from hybrid.placement.machine import GpuSpeeds
from hybrid.placement.plan import LayerPlacement, PlacementPlan
from hybrid.weights.formats import whole_blocks
from hybrid.weights.layout import PackedLayout
from hybrid.weights.packed_rows import pack_bundles, pack_matrix

_ROUNDS = 5
_ACTIVE = 0.3  # share of rows that fire while `gather_gbs` is measured; as for hot rows
_NODES = 500
_HAND_OFFS = 52
_SMALL = 64  # hidden size and neurons of a program that computes almost nothing


class DeviceMemory(NamedTuple):
    """A device's memory, in bytes."""

    free_bytes: int  # once this process has its context
    context_bytes: int = 0  # of a process besides its tensors; 0 if not measured
    torch_bytes: int = 0  # torch's share of that


def measure_gpu(
    device: Device,
    kernels: TorchKernels,
    layout: PackedLayout,
    pool: ThreadPool,
    memory: DeviceMemory,
    *,
    n_rows: int = 1 << 16,
) -> GpuSpeeds:
    """Measure the GPU's speeds for a model, which takes some seconds.

    `n_rows`: rows of the test matrices.
    """
    hand_offs = {m: hand_off_seconds(device, pool, m) for m in device.mechanisms}
    mechanism = min(hand_offs, key=lambda m: hand_offs[m])
    stream, gather = bandwidths(device, kernels, layout.config.hidden_size, layout.format, n_rows)
    return GpuSpeeds(
        name=device.name,
        vram_bytes=memory.free_bytes,
        context_bytes=memory.context_bytes,
        stream_gbs=stream,
        gather_gbs=gather,
        node_us=node_seconds(device) * 1e6,
        hand_off_us=hand_offs[mechanism] * 1e6,
        mechanism=mechanism,
        torch_bytes=memory.torch_bytes,
    )


def seconds_of(device: Device, work: Callable[[], object], n: int) -> float:
    """Return the seconds of one of the `n` repetitions that `work` launches, in a replay."""
    with device.on_stream():
        work()
        device.synchronize()
        recording = device.record(work)
        best = float("inf")
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            for step in recording:
                step()
            device.synchronize()
            best = min(best, time.perf_counter() - started)
    return best / n


def bandwidths(
    device: Device, kernels: TorchKernels, hidden_size: int, format: Format, n_rows: int
) -> tuple[float, float]:
    """Return GB/s of rows that are all read, and of up rows of which inactive ones are skipped."""
    matrix = random_matrix(format, n_rows, hidden_size, device.torch_device)
    x = empty_vectors(format, 1, hidden_size, device.torch_device)
    x.values.fill_(1)
    out = torch.zeros(1, n_rows, device=device.torch_device)
    n = 16  # launches, so that starting and waiting once hardly counts

    def repeat(kernel: Callable[..., None], *arguments: object) -> Callable[[], None]:
        def launch() -> None:
            for _ in range(n):
                device.launch(kernel, *arguments)

        return launch

    stream = seconds_of(device, repeat(kernels.linear, matrix, x, out), n)
    active = torch.rand(1, n_rows, generator=torch.Generator().manual_seed(0)) < _ACTIVE
    gates = active.float().to(device.torch_device)
    counts = torch.zeros(kernels.n_counts(n_rows), dtype=torch.int64, device=device.torch_device)
    up = repeat(kernels.up, matrix, x, Activation.relu, False, Neurons(gates, out, counts))
    gather = seconds_of(device, up, n)
    share = float(active.float().mean())
    return matrix.n_bytes / stream / 1e9, share * matrix.n_bytes / gather / 1e9


def node_seconds(device: Device) -> float:
    """Return the seconds of one more kernel in a recording, if it does almost nothing."""
    small = torch.zeros(32, device=device.torch_device)

    def launch() -> None:
        for _ in range(_NODES):
            device.launch(_touch, small)

    return seconds_of(device, launch, _NODES)


def hand_off_seconds(
    device: Device, pool: ThreadPool, mechanism: Mechanism, n: int = _HAND_OFFS
) -> float:
    """Return the seconds of a hand-off with its copies, if the CPU has nothing to compute."""
    loop = HandOffLoop(device, pool, mechanism, n)
    best = float("inf")
    with device.on_stream():
        recording = device.record(loop.launch)
        for _ in range(4 * _ROUNDS):
            best = min(best, loop.replay(recording))
    return best / n


class HandOffLoop:
    """A token of `n` hand-offs and nothing between them. The checks on a GPU replay it too.

    It is a pass over `n` split layers. The GPU's side computes nothing, and no neuron fires on the
    CPU.
    """

    def __init__(
        self,
        device: Device,
        pool: ThreadPool,
        mechanism: Mechanism,
        n: int,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.device, self.mechanism, self.n = device, mechanism, n
        format, config = Format.bf16, _small_config(n)
        layers = (LayerPlacement(True, n_gate=_SMALL, n_hot=0),) * n
        self.plan = PlacementPlan("", "", format.name, 2, _SMALL, layers, is_head_on_gpu=True)
        self.config, self.weights = config, _zero_weights(config, format)
        program = new_program(config, format, 2)
        recorder = ProgramRecorder(program, config)
        forward(Scheduler(self.plan, recorder, SILENT), self.weights, config)
        self.session = Session(program, pool, 2)
        self.exchange = Exchange(device, _SMALL, _SMALL, n + 1, patience_s)
        meet(self.session, self.exchange.link)
        self.h = torch.ones(1, _SMALL, device=device.torch_device)
        self.y = torch.zeros(n, _SMALL, device=device.torch_device)

    def launch(self) -> None:
        side = _HandOffsOnly(self)
        forward(Scheduler(self.plan, SILENT, side), self.weights, self.config)

    def replay(self, recording: Sequence[Work]) -> float:
        """Return the seconds of one token. Raises RuntimeError if the link failed."""
        started = time.perf_counter()
        if self.mechanism == "synchronise":
            self.session.begin(np.zeros(1, np.int64), is_decode=True)
            for step in recording:
                step()
            self.session.end()
        else:
            self.exchange.link.arm()
            for step in recording:
                step()
            if not self.exchange.link.serve(self.session, 0):
                raise RuntimeError(f"hand-off failed: error {self.exchange.link.error}")
        self.device.synchronize()
        seconds = time.perf_counter() - started
        self.session.truncate(0)
        return seconds


class _HandOffsOnly(Silent):
    """A GPU's side that computes nothing. It sends `loop.h` and stores the answers in `loop.y`."""

    def __init__(self, loop: HandOffLoop) -> None:
        self.exchange, self.h = loop.exchange, loop.h
        self.hand_offs = HandOffs(
            loop.device, loop.exchange.link, loop.mechanism, loop.session.run_segment
        )
        self.answers = iter(loop.y[:, None])

    def start_token(self) -> None:
        self.hand_offs.start()

    def take_x(self) -> None:
        self.hand_offs.finish()

    def start_cold(self, layer: int) -> None:
        self.hand_offs.start((self.exchange.h[:1], self.h))

    def finish_cold(self) -> None:
        self.hand_offs.finish((next(self.answers), self.exchange.y[:1]))

    def end_token(self) -> None:
        self.hand_offs.close()


def _small_config(n_layers: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=_SMALL,
        hidden_size=_SMALL,
        n_layers=n_layers,
        n_heads=2,
        n_kv_heads=2,
        head_dim=_SMALL // 2,
        n_neurons=_SMALL,
        max_context=2,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        activation="relu",
        threshold=0.0,
        embedding_scale=1.0,
        residual_scale=1.0,
        logit_scale=1.0,
        has_tied_head=True,
        bos_id=None,
        eos_ids=(),
    )


def _zero_weights(config: ModelConfig, format: Format) -> ModelWeights[Rows]:
    zeros = np.zeros((_SMALL, _SMALL), np.float32)
    matrix, (up, down) = pack_matrix(format, zeros), pack_bundles(format, zeros, zeros)
    layer = LayerWeights(zeros[0], matrix, matrix, zeros[0], matrix, up, down)
    return ModelWeights(matrix, (layer,) * config.n_layers, zeros[0], matrix)


def measure_memory(device: Device, *, measures_context: bool = True) -> DeviceMemory:
    """Measure the device's memory.

    To measure what a process needs besides its tensors, a second process dequantises and multiplies
    rows as prefill does. This process then measures how much less VRAM is free.
    """
    if device.torch_device.type != "cuda":
        return DeviceMemory(available_memory_bytes())
    torch.zeros(1, device=device.torch_device)
    before = torch.cuda.mem_get_info(device.torch_device)[0]
    if not measures_context:
        return DeviceMemory(before)
    program = (
        f"import torch, sys; w = torch.zeros({CHUNK_VALUES} // 1024, 1024, device='cuda'); "
        "a = w + 1; b = a * 2; y = a[:64] @ b.T; torch.cuda.synchronize(); "
        "print(torch.cuda.memory_reserved(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        reserved = int(child.stdout.readline())
        taken = before - torch.cuda.mem_get_info(device.torch_device)[0]
        child.communicate()
    return DeviceMemory(before, max(taken, reserved), reserved)


def random_matrix(format: Format, n_rows: int, n_cols: int, device: torch.device) -> DeviceMatrix:
    """Return weights whose values do not matter, in rows of whole blocks."""
    n_cols = whole_blocks(n_cols)
    if format is Format.bf16:
        values = torch.rand(n_rows, n_cols, device=device).to(torch.bfloat16)
        return DeviceMatrix(format, values, None)
    width = n_cols if format is Format.q8 else n_cols // 2
    dtype = torch.int8 if format is Format.q8 else torch.uint8
    values = torch.randint(0, 127, (n_rows, width), device=device, dtype=dtype)
    scales = torch.full((n_rows, n_cols // 32), 0.01, device=device, dtype=torch.float16)
    return DeviceMatrix(format, values, scales)


def _touch(x: Tensor) -> None:
    x.add_(1.0)
