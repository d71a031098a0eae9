"""ModelSpec: the model that a plan is made for. DeviceRequest: the device options of a user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import open_checkpoint
from hybrid.engine.loading.choices import choose_orders
from hybrid.engine.loading.prediction import Prediction
from hybrid.engine.options import MAX_THREADS, checked_context, checked_count
from hybrid.errors import InvalidOption
from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.placement.hardware import default_threads
from hybrid.placement.machine import Machine
from hybrid.placement.plan import PlacementPlan, cpu_plan
from hybrid.placement.sizes import ModelSizes
from hybrid.placement.time_model import PredictorCost, TimeModel, flat_frequencies
from hybrid.progress import Progress, ignore_progress
from hybrid.weights.layout import PackedLayout, packed_layout
from hybrid.weights.packing import order_hash

DeviceName = Literal["auto", "cpu", "cuda"]
HAND_OFFS = ("auto", "memory-operations", "host-functions", "synchronise")
# Share of the neurons that is assumed to fire per token if there is no profile.
UNRECORDED_ACTIVE = 0.12
PLANNED_POSITIONS = 512  # positions of context that a planned token attends to


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """The options of a user that decide about the device."""

    device: DeviceName = "auto"
    vram_budget: int | None = None  # bytes of the whole process; None: all free VRAM
    plan: Path | None = None
    hand_offs: str = "auto"  # a mechanism of engine.gpu.device; "auto": the plan's

    def check(self) -> None:
        """Raises InvalidOption."""
        if self.device not in get_args(DeviceName):
            raise InvalidOption(
                f"device: expected one of {', '.join(get_args(DeviceName))}, found {self.device!r}"
            )
        if self.hand_offs not in HAND_OFFS:
            raise InvalidOption(
                f"hand_offs: expected one of {', '.join(HAND_OFFS)}, found {self.hand_offs!r}"
            )
        if self.vram_budget is not None:
            checked_count("vram_budget", self.vram_budget, least=0)
        if self.plan is not None and self.vram_budget is not None:
            raise InvalidOption(
                "plan and vram_budget exclude each other: a plan has its own budget"
            )
        if self.device == "cpu" and (self.plan is not None or self.vram_budget):
            raise InvalidOption("device cpu takes no plan and no vram_budget")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as it will be loaded, with everything that its plan depends on."""

    layout: PackedLayout  # also says the config and the format
    n_context: int
    n_threads: int
    model_hash: str
    order_hash: str
    # (n_layers, n_neurons) in packed order: share of tokens for which each neuron fires. None: no
    # profile.
    frequencies: NDArray[np.float64] | None
    prediction: Prediction | None = None

    @property
    def config(self) -> ModelConfig:
        return self.layout.config

    @property
    def format(self) -> Format:
        return self.layout.format

    def cpu_plan(self) -> PlacementPlan:
        return cpu_plan(
            self.config, self.format.name, self.n_context, self.model_hash, self.order_hash
        )

    def time_model(self, machine: Machine) -> TimeModel:
        config, frequencies = self.config, self.frequencies
        if frequencies is None:
            active = UNRECORDED_ACTIVE if config.is_sparse else 1.0
            frequencies = flat_frequencies(config.n_layers, config.n_neurons, active)
        return TimeModel(
            machine,
            ModelSizes(self.layout, self.n_context),
            frequencies,
            n_positions=min(PLANNED_POSITIONS, self.n_context),
            predictors=self._predictor_costs(),
        )

    def _predictor_costs(self) -> tuple[PredictorCost | None, ...] | None:
        prediction = self.prediction
        if prediction is None:
            return None
        n_bytes = prediction.bytes_per_token // max(prediction.n_predicted_layers, 1)
        cost = PredictorCost(n_bytes, prediction.predicted)
        return tuple(None if kind == "exact" else cost for kind in prediction.kinds)


def read_model_spec(
    folder: Path,
    *,
    quant: str,
    threads: int | None,
    context_size: int | None,
    home: Path | None,
    progress: Progress = ignore_progress,
) -> tuple[ModelSpec, tuple[str, ...]]:
    """Return the spec of a model as `Engine` would load it, and notices. Loads no weights.

    Raises the errors that `Engine` raises for the same folder and options.
    """
    format = Format[quant]
    with open_checkpoint(folder, format, progress) as checkpoint:
        config = checkpoint.config
        orders, frequencies, notices = choose_orders(checkpoint, "auto", home)
        spec = ModelSpec(
            layout=packed_layout(config, format),
            n_context=checked_context(context_size, config),
            n_threads=checked_count(
                "threads", default_threads() if threads is None else threads, MAX_THREADS
            ),
            model_hash=checkpoint.weights_hash,
            order_hash=order_hash(orders),
            frequencies=frequencies,
        )
    return spec, notices
