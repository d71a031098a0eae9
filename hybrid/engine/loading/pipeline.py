"""The way of a model from its folder to an Engine: open → choose → pack → decide → open.

Each step is one function. All of them receive the same `Request`, and report to its notices.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.engine.loading.choices import (
    PackingNeeds,
    choose_preview,
    choose_residence,
    largest_ffn_bytes,
    notice_isa,
)
from hybrid.engine.loading.executors import Executor, Weights, open_executor
from hybrid.engine.loading.model_spec import ModelSpec, describe, hashes_folder
from hybrid.engine.loading.planning import decide
from hybrid.engine.loading.prediction import choose_predictors
from hybrid.engine.options import LoadOptions
from hybrid.kernels import check_isa_cap
from hybrid.notices import Notices
from hybrid.placement.plan import PlacementPlan
from hybrid.progress import Progress, ignore_progress
from hybrid.text.generation_config import GenerationDefaults, read_generation_defaults
from hybrid.text.tokenizer import Tokenizer
from hybrid.weights.packed_file import LoadedModel, load_packed
from hybrid.weights.packing import NeuronOrders, view_predictors


@dataclass(frozen=True, slots=True)
class Request:
    """A model that is to be loaded."""

    folder: Path
    options: LoadOptions
    home: Path | None  # hybrid's own folder; None keeps nothing and looks for nothing
    progress: Progress = ignore_progress
    notices: Notices = field(default_factory=Notices)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an Engine is made of."""

    folder: Path
    tokenizer: Tokenizer
    defaults: GenerationDefaults  # for answers
    spec: ModelSpec
    # Per layer: the checkpoint's neurons in packed order. None: the checkpoint's own order.
    orders: NeuronOrders | None
    is_synthetic: bool
    loaded: LoadedModel
    plan: PlacementPlan  # in use
    executor: Executor
    device_name: str  # of the GPU in use, or "cpu"
    notices: Notices
    load_s: float


def load_parts(request: Request) -> Parts:
    """Load a model. Raises every error of `hybrid.load` but those of a download."""
    started = time.perf_counter()
    check_isa_cap()
    options, notices = request.options, request.notices
    with open_checkpoint(
        request.folder,
        options.format,
        request.progress,
        use_mmap=options.mmap is not False,
        hashes=hashes_folder(request.home),
        activation=options.activation,
    ) as checkpoint:
        config = checkpoint.config
        tokenizer = Tokenizer.from_folder(
            checkpoint.gguf or request.folder,
            vocab_size=config.vocab_size,
            bos_id=config.bos_id,
            eos_id=next(iter(config.eos_ids), None),
            add_bos=options.add_bos,
            chat_template=options.chat_template,
        )
        defaults = read_generation_defaults(request.folder, config.vocab_size)
        notices.add(*checkpoint.notices, *tokenizer.notices, *defaults.notices)
        spec, orders = describe(checkpoint, options, request.home, notices)
        predictors, prediction = choose_predictors(checkpoint, spec, options, request.home, notices)
        has_preview = choose_preview(options.preview_head, config.vocab_size, notices)
        spec = spec.laid_out_for(prediction, has_preview=has_preview)
        loaded = pack(checkpoint, spec, orders, request)
        spec = replace(spec, has_matrix_scales=loaded.has_matrix_scales)
        if prediction is not None and prediction.stored is not None:
            memory = loaded.model.embedding.memory
            predictors = view_predictors(memory, spec.layout, prediction.stored)
    decision = decide(options.device_request, spec, request.home, notices)
    executor, plan = open_executor(
        decision, spec, Weights(loaded.model, predictors), request.home, notices
    )
    if has_preview and plan.is_head_on_gpu:
        notices.add("preview_head has no effect: the plan puts the head on the GPU")
    notice_isa(notices)
    device = decision.device if plan.uses_gpu else None
    return Parts(
        folder=request.folder,
        tokenizer=tokenizer,
        defaults=defaults,
        spec=spec,
        orders=orders,
        is_synthetic=checkpoint.is_synthetic,
        loaded=loaded,
        plan=plan,
        executor=executor,
        device_name="cpu" if device is None else device.name,
        notices=notices,
        load_s=time.perf_counter() - started,
    )


def pack(
    checkpoint: Checkpoint, spec: ModelSpec, orders: NeuronOrders | None, request: Request
) -> LoadedModel:
    """Return the packed weights, from their file if that is current."""
    options = request.options
    needs = PackingNeeds(spec.layout.n_bytes, spec.n_threads)
    if options.mmap is False:
        held = largest_ffn_bytes(checkpoint)
        # A bundle's parts are those of two matrices. A profile's order spreads both.
        needs = needs._replace(held_bytes=held if orders is None else 2 * held)
    residence = choose_residence(options, needs, request.notices)
    loaded = load_packed(
        checkpoint,
        spec.layout,
        cache=None if request.home is None else request.home / "packed",
        neuron_orders=orders,
        residence=residence,
        progress=request.progress,
    )
    request.notices.add(*loaded.notices)
    return loaded
