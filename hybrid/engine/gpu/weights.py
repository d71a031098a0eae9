"""Data on the GPU: the weights that a plan puts there, and the memory of one sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hybrid.kernels import Format
from hybrid.kernels._native import PREFILL_CHUNK
from hybrid.kernels.gpu.torch_kernels import (
    DeviceMatrix,
    LayerCache,
    Rope,
    TorchKernels,
    Vectors,
    empty_vectors,
)
from hybrid.kernels.reference import rope_tables
from hybrid.model.config import ModelConfig
from hybrid.placement.plan import PlacementPlan
from hybrid.weights.unpacked import PackedReader, PlainRows


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """A layer's attention weights and the rows of its first neurons."""

    attention_norm: Tensor  # fp32 (hidden,)
    qkv: DeviceMatrix
    o: DeviceMatrix
    ffn_norm: Tensor
    gate: DeviceMatrix  # n_gate rows
    up: DeviceMatrix  # n_hot rows
    down: DeviceMatrix  # n_hot rows


@dataclass(frozen=True, slots=True)
class GpuWeights:
    layers: dict[int, GpuLayer]  # layers that the plan puts on the GPU, by index
    norm: Tensor | None
    head: DeviceMatrix | None
    rope: Rope


def upload(
    reader: PackedReader, plan: PlacementPlan, n_context: int, device: torch.device
) -> GpuWeights:
    """Copy the plan's part of a packed model to the GPU. Raises torch.OutOfMemoryError."""
    config, format = reader.layout.config, reader.layout.format

    def matrix(rows: PlainRows) -> DeviceMatrix:
        values = torch.from_numpy(rows.values)
        scales = None if rows.scales is None else torch.from_numpy(rows.scales).to(device)
        if format is Format.bf16:
            values = values.view(torch.bfloat16)
        return DeviceMatrix(format, values.to(device), scales)

    def norm(name: str) -> Tensor:
        return torch.from_numpy(reader.norm(name)).to(device)

    layers = {}
    for index, placement in enumerate(plan.layers):
        if not placement.is_on_gpu:
            continue
        up, down = reader.up_and_down(index, placement.n_hot)
        layers[index] = GpuLayer(
            attention_norm=norm(f"{index}.attention_norm"),
            qkv=matrix(reader.matrix(f"{index}.qkv")),
            o=matrix(reader.matrix(f"{index}.o")),
            ffn_norm=norm(f"{index}.ffn_norm"),
            gate=matrix(reader.matrix(f"{index}.gate", placement.n_gate)),
            up=matrix(up),
            down=matrix(down),
        )
    head = None
    if plan.is_head_on_gpu:
        head = matrix(reader.matrix(reader.layout.head.name))
    tables = rope_tables(config.head_dim, config.rope_theta, n_context)
    return GpuWeights(
        layers,
        norm("norm") if plan.is_head_on_gpu else None,
        head,
        Rope(*(torch.from_numpy(np.ascontiguousarray(table)).to(device) for table in tables)),
    )


class Lane:
    """Memory of one sequence on the device: its KV cache and the activations of a pass.

    A pass has at most PREFILL_CHUNK tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        format: Format,
        plan: PlacementPlan,
        n_context: int,
        kernels: TorchKernels,
        device: torch.device,
    ) -> None:
        """Raises torch.OutOfMemoryError."""
        n, hidden = PREFILL_CHUNK, config.hidden_size
        n_splits, n_counts = kernels.n_splits, kernels.n_counts(config.n_neurons)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.x, self.h, self.y = (empty(n, hidden) for _ in range(3))
        self.h_quant = empty_vectors(format, n, hidden, device)
        self.qkv = empty(n, config.qkv_size)
        self.q = empty(n, config.n_heads, config.head_dim)
        self.attention = empty(n, config.attention_size)
        self.attention_quant = empty_vectors(format, n, config.attention_size, device)
        self.gates = empty(n, config.n_neurons)
        self.values = empty(n, max((layer.n_hot for layer in plan.layers), default=0))
        self.partials = empty(n_splits, n, hidden)
        self.decode_partials = empty(n_splits, 1, hidden)  # contiguous for one token
        self.logits = empty(1, config.vocab_size if plan.is_head_on_gpu else 0)
        self.position = empty(1, dtype=torch.int64)  # of the pass's first token
        # Hot neurons that fired: per layer `n_counts` partial counts.
        self.counts = empty(config.n_layers, n_counts, dtype=torch.int64)
        shape = (config.n_kv_heads, n_context, config.head_dim)
        self.caches = {
            index: LayerCache(*(empty(*shape, dtype=torch.float16) for _ in range(2)))
            for index, layer in enumerate(plan.layers)
            if layer.is_on_gpu
        }


def device_bytes(of: GpuWeights | Lane) -> int:
    """Return the bytes of all tensors, for which the plan's budget must have room."""
    return sum(tensor.nbytes for tensor in _tensors(of))


def _tensors(of: object) -> Iterator[Tensor]:
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, (DeviceMatrix, Vectors, GpuLayer, GpuWeights)):
        for field in fields(of):
            yield from _tensors(getattr(of, field.name))
    elif isinstance(of, (Rope, LayerCache)):
        yield from of
    elif isinstance(of, dict):
        for value in of.values():
            yield from _tensors(value)
    elif isinstance(of, Lane):
        yield from _tensors(vars(of))
