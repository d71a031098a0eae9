"""ModelSpec: a model as it will be loaded, with everything that its plan depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.checkpoint.identity import ModelIdentity
from hybrid.engine.loading.choices import check_context_memory, choose_orders
from hybrid.engine.loading.prediction import Prediction
from hybrid.engine.options import LoadOptions, checked_context
from hybrid.kernels import Format, KvFormat
from hybrid.model.config import ModelConfig
from hybrid.notices import Notices
from hybrid.placement.hardware import default_threads
from hybrid.placement.machine import Machine
from hybrid.placement.plan import PlacementPlan, cpu_plan
from hybrid.placement.sizes import ModelSizes
from hybrid.placement.time_model import PredictorCost, TimeModel, flat_frequencies
from hybrid.progress import Progress, ignore_progress
from hybrid.weights.layout import PackedLayout, packed_layout
from hybrid.weights.packing import NeuronOrders, order_hash

# Share of the neurons that is assumed to fire per token if there is no profile.
UNRECORDED_ACTIVE = 0.12
PLANNED_POSITIONS = 512  # positions of context that a planned token attends to


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model in one format, with one order of neurons, for one context and number of threads."""

    layout: PackedLayout  # also says the config and the format
    n_context: int
    n_threads: int
    identity: ModelIdentity
    order_hash: str
    # (n_layers, n_neurons) in packed order: share of tokens for which each neuron fires. None: no
    # profile.
    frequencies: NDArray[np.float64] | None
    prediction: Prediction | None = None
    kv: KvFormat = KvFormat.fp16  # of the KV cache
    has_matrix_scales: bool = False  # whether any matrix has one; known once the model is packed

    @property
    def config(self) -> ModelConfig:
        return self.layout.config

    @property
    def format(self) -> Format:
        return self.layout.format

    @property
    def model_hash(self) -> str:
        """The hash of the checkpoint's weights. Raises InvalidCheckpoint when it is first needed,
        if the files have changed since they were opened.
        """
        return self.identity.weights_hash

    def laid_out_for(self, prediction: Prediction | None, *, has_preview: bool) -> ModelSpec:
        """Return the spec with predictors, or with a preview of the head."""
        layers = frozenset[int]() if prediction is None else prediction.predicted_layers
        stored = None if prediction is None else prediction.stored
        layout = packed_layout(
            self.config, self.format, layers, has_preview=has_preview, stored=stored
        )
        return replace(self, layout=layout, prediction=prediction)

    def cpu_plan(self, *, is_named: bool = True) -> PlacementPlan:
        """Return the plan with everything on the CPU.

        If it is not named, its model hash is empty, and the model need not be hashed.
        """
        model_hash = self.model_hash if is_named else ""
        return cpu_plan(self.config, self.format.name, self.n_context, model_hash, self.order_hash)

    def time_model(self, machine: Machine) -> TimeModel:
        config, frequencies = self.config, self.frequencies
        if frequencies is None:
            active = UNRECORDED_ACTIVE if config.is_sparse else 1.0
            frequencies = flat_frequencies(config.n_layers, config.n_neurons, active)
        return TimeModel(
            machine,
            ModelSizes(self.layout, self.n_context, has_matrix_scales=self.has_matrix_scales),
            frequencies,
            n_positions=min(PLANNED_POSITIONS, self.n_context),
            predictors=self._predictor_costs(),
        )

    def _predictor_costs(self) -> tuple[PredictorCost | None, ...] | None:
        prediction = self.prediction
        if prediction is None or prediction.predicted is None:
            return None
        n_bytes = prediction.bytes_per_token // max(prediction.n_predicted_layers, 1)
        cost = PredictorCost(n_bytes, prediction.predicted)
        return tuple(None if kind == "exact" else cost for kind in prediction.kinds)


def hashes_folder(home: Path | None) -> Path | None:
    """Return where the hashes of weight files are remembered, in hybrid's own folder."""
    return None if home is None else home / "hashes"


def describe(
    checkpoint: Checkpoint, options: LoadOptions, home: Path | None, notices: Notices
) -> tuple[ModelSpec, NeuronOrders | None]:
    """Return the spec of a model that runs exactly, and the order of its neurons.

    Raises InvalidOption, OutOfMemory, and InvalidArtifact for a given profile.
    """
    n_context = checked_context(options.context_size, checkpoint.config)
    assert checkpoint.format is not None
    # At once, before minutes of packing. Layers on a GPU keep their keys and values there.
    n_cpu_layers = checkpoint.config.n_layers if options.device == "cpu" else 0
    check_context_memory(checkpoint.config, n_context, n_cpu_layers)
    orders, frequencies = choose_orders(checkpoint, options.profile, home, notices)
    spec = ModelSpec(
        layout=packed_layout(checkpoint.config, checkpoint.format),
        n_context=n_context,
        n_threads=options.threads or default_threads(),
        identity=checkpoint.identity,
        order_hash=order_hash(orders),
        frequencies=frequencies,
        kv=KvFormat[options.kv],
    )
    return spec, orders


def read_model_spec(
    folder: Path,
    options: LoadOptions,
    *,
    home: Path | None,
    notices: Notices,
    progress: Progress = ignore_progress,
) -> ModelSpec:
    """Return the spec of a model as it would be loaded, without loading its weights.

    `notices` receives what the checkpoint has to say, and what loading would say so far.
    Raises the errors that loading the same folder with the same options raises.
    """
    with open_checkpoint(
        folder,
        options.format,
        progress,
        hashes=hashes_folder(home),
        activation=options.activation,
    ) as checkpoint:
        notices.add(*checkpoint.notices)
        return describe(checkpoint, options, home, notices)[0]
