"""PlacementPlan: which part of each layer is on the GPU.

A plan is a few integers per layer, because neurons are packed by falling activation frequency and
hot neurons are a prefix. `solver` decides the integers; the executors copy the bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import InvalidArtifact
from hybrid.files import read_bytes, write_atomically
from hybrid.model.config import ModelConfig
from predictors.schema import boolean, field_of, integer, list_of, parse_json, record, text

VERSION = 2
_MAX_BYTES = 16 << 20
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

    model_hash: str  # Checkpoint.weights_hash; empty within a load that needs no plan
    order_hash: str  # weights.packing.order_hash: the neuron order that prefixes refer to
    quant: str  # the weight format, such as "q8"
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
        content = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        write_atomically(path, content.encode())


_PLAN = record(
    {
        "version": integer(),
        **dict.fromkeys(("model_hash", "order_hash", "quant"), text()),
        **dict.fromkeys(("n_context", "n_neurons"), integer()),
        "layers": list_of(
            record({}, {"is_on_gpu": boolean, "n_gate": integer(), "n_hot": integer()})
        ),
    },
    {
        "is_head_on_gpu": boolean,
        **dict.fromkeys(("vram_budget", "vram_bytes"), integer()),
        **dict.fromkeys(("context_bytes", "torch_bytes"), integer()),
        "hand_offs": text(),
    },
)


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
        fields = parse_json(read_bytes(path, _MAX_BYTES))
        version = field_of(fields, "version")
        if version != VERSION:
            raise InvalidArtifact(
                f"{path}: expected a plan of version {VERSION}, found {version!r:.20}; make a new "
                "one with hybrid.plan"
            )
        fields = _PLAN(fields)
        del fields["version"]
        layers = tuple(LayerPlacement(**layer) for layer in fields.pop("layers"))
        plan = PlacementPlan(layers=layers, **fields)
        for index, layer in enumerate(layers):
            _check_layer(index, layer, plan.n_neurons)
    except OSError as error:
        raise InvalidArtifact(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidArtifact(f"{path}: the plan is broken ({error}); make a new one") from error
    return plan


def _check_layer(index: int, layer: LayerPlacement, n_neurons: int) -> None:
    """Raises ValueError."""
    counts = layer.n_gate, layer.n_hot
    if any(n % BUCKET and n != n_neurons for n in counts):
        raise ValueError(f"layer {index}: counts are not multiples of {BUCKET}: {counts}")
    if not layer.n_hot <= layer.n_gate <= n_neurons:
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
