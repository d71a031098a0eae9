"""Measure this machine's CPU for the time model.

The real threads run a short program of the model's own shape with random weights. It has as many
layers as are needed to exceed the caches.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

from hybrid.checkpoint import Tensor
from hybrid.errors import InvalidArtifact
from hybrid.kernels import Format, Session, ThreadPool, _native, active_isa
from hybrid.model.config import ModelConfig
from hybrid.model.families import expected_tensors
from hybrid.model.forward import forward
from hybrid.model.program import ProgramRecorder, new_program
from hybrid.notices import Notices
from hybrid.placement.disturbance import OtherLoad
from hybrid.placement.hardware import available_memory_bytes, last_level_cache_bytes
from hybrid.placement.machine import CpuSpeeds, Machine, load_machine
from hybrid.weights.layout import packed_layout
from hybrid.weights.packing import PackedModel, pack_model, view_packed

_VOCAB = 512
_CONTEXT = 256  # positions that attention reads
_TOKENS, _ROUNDS = 16, 3
# The weights are as large as this many last-level caches. So those that stay in a cache hardly
# count.
_CACHES = 16
_ACTIVE_AT = 1.175  # a normal variable exceeds it in 12 % of all cases


def measure_cpu(config: ModelConfig, format: Format, pool: ThreadPool) -> CpuSpeeds:
    """Measure the CPU's speeds. It takes a few seconds and some hundred MB. Raises MemoryError."""
    config = _shape(config, format)
    model = _random_model(config, format)
    n_context = _CONTEXT + _TOKENS * _ROUNDS + 1
    program = new_program(config, format, n_context)
    # With a residual scale of 0 every layer sees the same x, and about the same number of neurons
    # fires in each.
    uniform = replace(
        config,
        activation="fatrelu",
        threshold=_ACTIVE_AT,
        embedding_scale=1.0,
        residual_scale=0.0,
        logit_scale=1.0,
    )
    forward(ProgramRecorder(program, uniform), model, uniform)
    session = Session(program, pool, n_context, False, True)
    session.prefill(np.arange(_CONTEXT) % _VOCAB)
    session.decode(0)
    rounds: list[tuple[float, CpuSpeeds]] = []
    for _ in range(_ROUNDS):
        session.reset_counts()
        for token in range(_TOKENS):
            session.decode(token)
        seconds = {k: s / pool.n_threads for k, s in session.stage_seconds.items()}
        n_bytes = session.decode_bytes
        streamed = ("qkv", "output", "gate", "head")
        speeds = CpuSpeeds(
            stream_gbs=sum(n_bytes[k] for k in streamed) / sum(seconds[k] for k in streamed) / 1e9,
            gather_gbs=n_bytes["up_down"] / seconds["up_down"] / 1e9,
            kv_gbs=n_bytes["attend"] / seconds["attend"] / 1e9,
            layer_us=max(0.0, seconds["waiting"]) / _TOKENS / config.n_layers * 1e6,
        )
        rounds.append((sum(seconds.values()), speeds))
    return sorted(rounds, key=lambda r: r[0])[_ROUNDS // 2][1]


def measured_machine(
    config: ModelConfig,
    format: Format,
    pool: ThreadPool,
    home: Path | None,
    notices: Notices,
    *,
    again: bool = False,
) -> Machine:
    """Return this machine with its CPU. Speeds are measured once and kept in `home`.

    They are not kept if other processes took the processors meanwhile. `again` measures them again.
    Raises MemoryError.
    """
    path = None if home is None else machine_path(home, config, format, pool.n_threads)
    kept = None if path is None or again else kept_machine(path, notices)
    if kept is not None:
        return kept
    load = OtherLoad()
    machine = Machine(
        name=platform.node() or "this machine",
        quant=format.name,
        n_threads=pool.n_threads,
        isa=active_isa(),
        ram_bytes=available_memory_bytes(),
        cpu=measure_cpu(config, format, pool),
    )
    if path is not None and not load.notice(pool.n_threads, notices):
        save_quietly(machine, path)
    return machine


def kept_machine(path: Path, notices: Notices) -> Machine | None:
    """Return the machine of a file that hybrid keeps, if there is one.

    A broken file becomes a notice. It is measured anew and overwritten.
    """
    if not os.path.lexists(path):
        return None
    try:
        return load_machine(path)
    except InvalidArtifact as error:
        notices.add(f"kept speeds not used, measured again: {error}")
        return None


def machine_path(home: Path, config: ModelConfig, format: Format, n_threads: int) -> Path:
    """Return where a machine's speeds for models of this shape are kept."""
    shape = (*astuple(replace(config, eos_ids=())), format.name, n_threads, active_isa())
    key = json.dumps([platform.node(), *shape])
    return home / "machines" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def save_quietly(machine: Machine, path: Path) -> None:
    """Save the machine and ignore OSError. If it cannot be saved, it is measured each time."""
    try:
        machine.save(path)
    except OSError:
        return


def _shape(config: ModelConfig, format: Format) -> ModelConfig:
    """Return the config with as many layers as exceed the caches, at most all of them."""
    config = replace(config, vocab_size=_VOCAB, has_tied_head=True)
    one = packed_layout(replace(config, n_layers=1), format).n_bytes
    far = max(_CACHES * (last_level_cache_bytes() or 0), 64 << 20)
    far = min(far, available_memory_bytes() // 2)
    return replace(config, n_layers=max(1, min(config.n_layers, -(-far // one))))


class _Random:
    """A checkpoint with random weights."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._shapes = {tensor.role: tensor.shape for tensor in expected_tensors(config)}
        self._rng = np.random.default_rng(0)

    def tensor(self, role: str, layer: int | None = None) -> Tensor:
        shape = self._shapes[role]
        if len(shape) == 1:
            return Tensor(role, "F32", np.ones(shape, np.float32))
        w = self._rng.standard_normal(shape, np.float32)
        return Tensor(role, "F32", w / np.float32(np.sqrt(self.config.hidden_size)))


def _random_model(config: ModelConfig, format: Format) -> PackedModel:
    """Return a model in which every layer is a copy of one random layer."""
    single = replace(config, n_layers=1)
    source, layout = packed_layout(single, format), packed_layout(config, format)
    one = pack_model(_Random(single), source).embedding.memory
    buffer = _native.allocate_bytes(layout.n_bytes)
    for name, array in layout.arrays.items():
        layer, dot, part = name.partition(".")
        copied = source.arrays[f"0.{part}" if dot else layer]
        buffer[array.first : array.end] = one[copied.first : copied.end]
    return view_packed(buffer, layout)
