"""PowerInfer's files: GGUF with another magic, transposed down matrices, and predictors.

github.com/SJTU-IPADS/PowerInfer (convert.py, llama.cpp). Its `llama` is computed with ReLU. It has
no scales of MiniCPM, and the head is always a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.gguf.blocks import BlockType
from hybrid.engine.loading.model_spec import describe
from hybrid.engine.loading.prediction import choose_predictors
from hybrid.engine.options import LoadOptions
from hybrid.errors import InvalidOption
from hybrid.exporting.encoding import F16, Bytes
from hybrid.exporting.powerinfer_predictor import (
    Converted,
    Halves,
    convert,
    observe,
    quality,
    write_texts,
)
from hybrid.hub.catalog import hybrid_home
from hybrid.hub.loading import load
from hybrid.notices import Notices
from hybrid.progress import Progress
from predictors.file import load_predictor_file

THRESHOLD_KEY = "powerinfer.sparse_threshold"  # of the predictors' scores


@dataclass(frozen=True, slots=True)
class PredictorTensor:
    """A predictor's matrix, as it will be written."""

    name: str
    values: Halves

    @property
    def type(self) -> BlockType:
        return F16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def n_bytes(self) -> int:
        return self.values.nbytes

    def parts(self) -> Iterator[Bytes]:
        yield self.values.astype("<f2", copy=False).view(np.uint8)


def predictors(
    checkpoint: Checkpoint, model: str, options: LoadOptions, notices: Notices, progress: Progress
) -> list[PredictorTensor]:
    """Return the predictors' matrices. Runs the model on texts that it writes.

    `model` is what the user calls it, for messages. Raises InvalidOption if it has no predictor,
    and InvalidArtifact if a given file is of another model.
    """
    path = _predictor_file(checkpoint, model, options)
    config = checkpoint.config
    norms = [checkpoint.read("ffn_norm", layer) for layer in range(config.n_layers)]
    exact = replace(options, predictor="exact", device="cpu")
    with load(checkpoint.folder, options=exact, progress=progress) as engine:
        seen = observe(engine, write_texts(engine, progress), norms)
        orders = engine.neuron_orders
    selected = load_predictor_file(path).select(options.recall)
    layers: list[Converted] = []
    for layer, (choice, predictor) in enumerate(selected):
        order = None if orders is None else np.asarray(orders[layer], np.intp)
        layers.append(convert(predictor, choice.margin, norms[layer], seen[layer], order))
    notices.add(f"the predictor of {path} is converted", quality(layers))
    return list(_tensors(layers))


def _predictor_file(checkpoint: Checkpoint, model: str, options: LoadOptions) -> Path:
    """Return the file of the model's predictor, which belongs to the model."""
    config, found = checkpoint.config, Notices()
    if not config.is_sparse:
        raise InvalidOption(
            f"{model}: its activation is {config.activation}, which is never zero: PowerInfer has "
            "nothing to skip; export it --to gguf"
        )
    spec, _ = describe(checkpoint, options, hybrid_home(), found)
    _, prediction = choose_predictors(checkpoint, spec, options, hybrid_home(), found)
    if prediction is not None and prediction.stored is not None:
        raise InvalidOption(f"{model}: predictor own: only hybrid's predictors are converted")
    if prediction is None:
        why = "".join(f" ({line})" for line in found if "exact instead" in line)
        raise InvalidOption(
            f"{model}: it has no predictor of {spec.format.name} weights, and PowerInfer needs "
            f"one; make it with: hybrid setup -m {model} --quant {spec.format.name}{why}"
        )
    return prediction.path


def _tensors(layers: Sequence[Converted]) -> Iterator[PredictorTensor]:
    for at, layer in enumerate(layers):
        yield PredictorTensor(f"blk.{at}.fc1.weight", layer.fc1)
        yield PredictorTensor(f"blk.{at}.fc2.weight", layer.fc2)
