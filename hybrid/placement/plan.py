"""PlacementPlan: which part of each layer is on the GPU.

A plan is a few integers per layer, because neurons are packed by falling activation frequency and
hot neurons are a prefix. `solver` decides the integers; the executors copy the bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import InvalidArtifact
from hybrid.files import write_atomically
from hybrid.model.config import ModelConfig

VERSION = 1
FILE_NAME = "placement_plan.json"
BUCKET = 64  # neurons; n_gate and n_hot are multiples of it, or all neurons of a layer


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """Placement of one layer. If it is not on the GPU, the CPU computes all of it; counts are 0.

    If it is, the GPU holds attention with its KV cache, the gates of neurons [0, n_gate), and the
    up and down rows of neurons [0, n_hot). The CPU computes the rest. For neurons [n_hot, n_gate)
    the GPU tells the CPU which fire. From n_gate on the CPU computes the gates itself: all of them,
    or those that its predictor names.
    """

    is_on_gpu: bool = False
    n_gate: int = 0
    n_hot: int = 0


ON_CPU = LayerPlacement()


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """Devices of the layers and the head of one model, for one format and context."""

    model_hash: str  # Checkpoint.weights_hash
    order_hash: str  # weights.packing.order_hash: the neuron order that prefixes refer to
    quant: str  # "bf16", "q8" or "q4"
    n_context: int  # positions for which GPU layers have a KV cache
    n_neurons: int  # per layer
    layers: tuple[LayerPlacement, ...]
    is_head_on_gpu: bool = False
    vram_budget: int = 0  # bytes of the whole process that the plan was made for
    vram_bytes: int = 0  # bytes of its tensors: weights, KV cache, buffers
    context_bytes: int = 0  # bytes that CUDA and torch take besides the tensors
    torch_bytes: int = 0  # torch's share of context_bytes
    hand_offs: str = ""  # the mechanism that measured fastest (engine.gpu.device)

    @property
    def uses_gpu(self) -> bool:
        return self.is_head_on_gpu or any(layer.is_on_gpu for layer in self.layers)

    @property
    def is_all_on_gpu(self) -> bool:
        return self.is_head_on_gpu and all(self.is_whole(layer) for layer in self.layers)

    def is_whole(self, layer: LayerPlacement) -> bool:
        """Whether the CPU has nothing to do for this layer."""
        return layer.is_on_gpu and layer.n_hot == self.n_neurons

    def is_split(self, layer: LayerPlacement) -> bool:
        """Whether attention is on the GPU and the CPU computes some or all of the FFN."""
        return layer.is_on_gpu and layer.n_hot < self.n_neurons

    def summary(self) -> str:
        """Return one line that says which parts are on the GPU."""
        if not self.uses_gpu:
            return "plan: all on the CPU"
        whole = sum(self.is_whole(layer) for layer in self.layers)
        split = [layer for layer in self.layers if self.is_split(layer)]
        parts = []
        if whole:
            parts.append(f"{whole} of {len(self.layers)} layers")
        if split:
            hot = sum(layer.n_hot for layer in split) / len(split) / self.n_neurons
            gates = sum(layer.n_gate for layer in split) / len(split) / self.n_neurons
            layers = f"{len(split)} more" if whole else f"{len(split)} layers"
            parts.append(
                f"attention of {layers} with {gates:.0%} of the gates and {hot:.0%} of the neurons"
            )
        if self.is_head_on_gpu:
            parts.append("the head")
        where = ", ".join(parts) if not self.is_all_on_gpu else "all layers and the head"
        return f"plan: on the GPU {where} ({self.vram_bytes / 2**20:.0f} MiB); the rest on the CPU"

    def save(self, path: Path) -> None:
        """Write the file. Raises OSError."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        write_atomically(path, text.encode())


def cpu_plan(
    config: ModelConfig, quant: str, n_context: int, model_hash: str, order_hash: str
) -> PlacementPlan:
    """Return the plan with everything on the CPU."""
    layers = (ON_CPU,) * config.n_layers
    return PlacementPlan(model_hash, order_hash, quant, n_context, config.n_neurons, layers)


def whole_plan(plan: PlacementPlan) -> PlacementPlan:
    """Return a plan for the same model with everything on the GPU."""
    layer = LayerPlacement(True, plan.n_neurons, plan.n_neurons)
    return replace(plan, layers=(layer,) * len(plan.layers), is_head_on_gpu=True)


def split_active(active: NDArray[np.intp], n_hot: int) -> tuple[NDArray[np.intp], ...]:
    """Split ascending neuron ids into (hot, cold) at the plan's boundary."""
    boundary = np.searchsorted(active, n_hot)
    return active[:boundary], active[boundary:]


def load_plan(path: Path) -> PlacementPlan:
    """Read a plan. Raises InvalidArtifact if the file is no plan, broken, or of another version."""
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArtifact(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidArtifact(
            f"{path}: is not a placement plan ({error}); make a new one"
        ) from error
    if not isinstance(fields, dict) or fields.pop("version", None) != VERSION:
        raise InvalidArtifact(
            f"{path}: expected a plan of version {VERSION}; make a new one with hybrid.plan"
        )
    try:
        layers = tuple(LayerPlacement(**layer) for layer in fields.pop("layers"))
        plan = PlacementPlan(layers=layers, **fields)
        _check_values(plan)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidArtifact(f"{path}: is broken ({error}); make a new one") from error
    return plan


def _check_values(plan: PlacementPlan) -> None:
    """Raises ValueError, TypeError."""
    for name in (
        "n_context",
        "n_neurons",
        "vram_budget",
        "vram_bytes",
        "context_bytes",
        "torch_bytes",
    ):
        value = getattr(plan, name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}: expected a count, found {value!r}")
    for name in ("model_hash", "order_hash", "quant", "hand_offs"):
        if not isinstance(getattr(plan, name), str):
            raise ValueError(f"{name}: expected text")
    if type(plan.is_head_on_gpu) is not bool:
        raise ValueError("is_head_on_gpu: expected true or false")
    for index, layer in enumerate(plan.layers):
        if type(layer.is_on_gpu) is not bool or not all(
            type(n) is int and (n % BUCKET == 0 or n == plan.n_neurons)
            for n in (layer.n_gate, layer.n_hot)
        ):
            raise ValueError(f"layer {index}: {layer}")
        if not 0 <= layer.n_hot <= layer.n_gate <= plan.n_neurons:
            raise ValueError(f"layer {index}: expected n_hot <= n_gate <= n_neurons, found {layer}")
        if not layer.is_on_gpu and layer.n_gate:
            raise ValueError(f"layer {index}: is on the CPU, but has neurons on the GPU")


def check_plan(plan: PlacementPlan, path: Path, model: PlacementPlan) -> None:
    """Raises InvalidArtifact unless the plan is for the model, format, order and context of
    another plan, such as the one that puts everything on the CPU.
    """
    again = "make a new one with hybrid.plan"
    for what, expected, found in (
        ("layers", len(model.layers), len(plan.layers)),
        ("neurons per layer", model.n_neurons, plan.n_neurons),
        ("format", model.quant, plan.quant),
        ("model hash", model.model_hash[:12], plan.model_hash[:12]),
        ("neuron order", model.order_hash[:12], plan.order_hash[:12]),
    ):
        if expected != found:
            raise InvalidArtifact(f"{path}: {what}: expected {expected}, found {found}; {again}")
    if plan.uses_gpu and plan.n_context < model.n_context:
        raise InvalidArtifact(
            f"{path}: is for a context of {plan.n_context} positions, but {model.n_context} are "
            f"requested; {again}, or choose a smaller context"
        )
