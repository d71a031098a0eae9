"""Engines' insides for tests of the hybrid path: a checkpoint, packed, with any plan and device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.checkpoint.hf import open_checkpoint
from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.gpu.executor import HybridExecutor
from hybrid.kernels import Format
from hybrid.placement.plan import LayerPlacement, PlacementPlan
from hybrid.weights.packing import PackedModel, pack_model
from hybrid.weights.unpacked import PackedReader

N_CONTEXT = 320


class PackedFolder:
    """A model's folder, packed once."""

    def __init__(self, folder: Path, format: Format) -> None:
        with open_checkpoint(folder) as checkpoint:
            self.config, self.format = checkpoint.config, format
            self.model: PackedModel = pack_model(checkpoint, format)
        self.reader = PackedReader(self.model.embedding.memory, self.config, format)

    def plan(self, layers: list[LayerPlacement], *, head: bool) -> PlacementPlan:
        return PlacementPlan(
            "", "", self.format.name, N_CONTEXT, self.config.n_neurons, tuple(layers), head
        )

    def plans(self) -> dict[str, PlacementPlan]:
        """Every way to split, in layers that differ."""
        n, n_layers = self.config.n_neurons, self.config.n_layers
        some = n // 3 // 64 * 64
        cpu, whole = LayerPlacement(), LayerPlacement(True, n, n)
        attention = LayerPlacement(True, 0, 0)
        gates, hot = LayerPlacement(True, n, some), LayerPlacement(True, some, some)
        mixed = LayerPlacement(True, 2 * some, some)

        def alternating(*layers: LayerPlacement) -> list[LayerPlacement]:
            return [layers[i % len(layers)] for i in range(n_layers)]

        return {
            "head": self.plan(alternating(cpu), head=True),
            "all": self.plan(alternating(whole), head=True),
            "all but the head": self.plan(alternating(whole), head=False),
            "attention": self.plan(alternating(attention), head=True),
            "all gates": self.plan(alternating(gates), head=True),
            "hot": self.plan(alternating(hot), head=False),
            "everything": self.plan(alternating(cpu, gates, whole, hot, cpu, mixed), head=True),
            "last layer": self.plan([cpu] * (n_layers - 1) + [gates], head=False),
        }

    def cpu(self, plan: PlacementPlan | None = None) -> CpuExecutor:
        return CpuExecutor(
            self.model, self.config, self.format, n_threads=2, n_context=N_CONTEXT, plan=plan
        )

    @contextmanager
    def hybrid(self, plan: PlacementPlan, device: Any, **options: Any) -> Iterator[HybridExecutor]:
        executor = HybridExecutor(
            self.cpu(plan), self.model, self.reader, plan, device, n_context=N_CONTEXT, **options
        )
        yield executor


def some_ids(config: Any, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, config.vocab_size, n)
