"""Choose the predictors of an engine: find their file, check that it belongs to this model, and
pack it for the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hybrid.errors import InvalidArtifact, InvalidOption
from hybrid.kernels import Format, Predictor
from hybrid.model.config import ModelConfig
from hybrid.weights.packed_predictor import pack_predictor, predictor_bytes
from predictors.errors import PredictorError
from predictors.file import PredictorFile, load_predictor_file

DEFAULT_RECALL = 0.99


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predictors in use, with the quality that was measured when they were trained."""

    path: Path
    recall: float  # the requested recall of each layer
    kinds: tuple[str, ...]  # per layer: "exact", or "lowrank" with its rank
    worst_recall: float  # lowest recall of any layer, on held-out tokens
    predicted: float  # share of the neurons whose gates are computed, on held-out tokens
    bytes_per_token: int  # of the predictors themselves

    @property
    def n_predicted_layers(self) -> int:
        return sum(kind != "exact" for kind in self.kinds)


def predictor_path(home: Path, model_hash: str, quant: str) -> Path:
    """Return where `hybrid.setup` keeps the predictor of a model, in hybrid's own folder."""
    return home / "predictors" / f"{model_hash[:32]}-{quant}.safetensors"


def choose_predictors(
    predictor: Path | Literal["exact", "auto"],
    recall: float,
    *,
    config: ModelConfig,
    model_hash: str,
    order_hash: str,
    quant: str,
    home: Path | None,
) -> tuple[Sequence[Predictor | None] | None, Prediction | None, list[str]]:
    """Return native predictors per layer, their description, and notices.

    "exact" uses no predictor. "auto" falls back to exact, with a notice, if this model has no
    usable predictor. Raises InvalidArtifact if a given file is broken or of another model or neuron
    order. Raises InvalidOption if the file was not made for `recall`.
    """
    if not 0.0 < recall < 1.0:
        raise InvalidOption(f"recall: expected a value between 0 and 1, found {recall}")
    if predictor == "exact":
        return None, None, []
    if not config.is_sparse:
        if predictor == "auto":
            return None, None, []
        raise InvalidOption(
            f"predictor: the model's activation is {config.activation}, so every neuron fires and "
            "there is nothing to predict; use predictor exact"
        )
    path = predictor_path(home, model_hash, quant) if home else Path()
    if predictor != "auto":
        path = Path(predictor)
    elif not path.is_file():
        return (
            None,
            None,
            ["no predictor for this model, so it runs exactly; hybrid.setup makes one"],
        )
    try:
        file = load_predictor_file(path)
        _check(file, path, config, model_hash, order_hash)
    except (PredictorError, InvalidArtifact) as error:
        if predictor == "auto":
            return None, None, [f"predictor not used, exact instead: {error}"]
        raise InvalidArtifact(str(error)) from error
    try:
        selected = file.select(recall)
    except PredictorError as error:
        raise InvalidOption(f"recall: {error}") from error
    format = Format[quant]
    choices = [choice for choice, _ in selected]
    prediction = Prediction(
        path=path,
        recall=recall,
        kinds=tuple(choice.name for choice in choices),
        worst_recall=min(choice.recall for choice in choices),
        predicted=float(np.mean([choice.predicted for choice in choices])),
        bytes_per_token=sum(
            predictor_bytes(format, layer, config.hidden_size)
            for _, layer in selected
            if layer is not None
        ),
    )
    notices = []
    if prediction.n_predicted_layers < config.n_layers:
        n_exact = config.n_layers - prediction.n_predicted_layers
        notices.append(
            f"{n_exact} of {config.n_layers} layers are exact: no predictor pays off there"
        )
    if file.about["quant"] != quant:
        notices.append(f"the predictor was trained on {file.about['quant']} weights, not {quant}")
    natives = [
        None if layer is None else pack_predictor(format, layer, choice.margin)
        for choice, layer in selected
    ]
    return natives, prediction, notices


def _check(
    file: PredictorFile, path: Path, config: ModelConfig, model_hash: str, order_hash: str
) -> None:
    about = file.about
    sizes = about["n_layers"], about["n_neurons"], about["hidden_size"]
    if about.get("input") != "normed":
        raise InvalidArtifact(f"{path}: takes {about.get('input')!r} inputs, expected 'normed'")
    if sizes != (config.n_layers, config.n_neurons, config.hidden_size):
        raise InvalidArtifact(
            f"{path}: is for {sizes[0]} layers of {sizes[1]} neurons and hidden size {sizes[2]}; "
            f"this model has {config.n_layers}, {config.n_neurons} and {config.hidden_size}"
        )
    if about["model_hash"] != model_hash:
        raise InvalidArtifact(
            f"{path}: was trained for other weights (hash {about['model_hash']:.12}, this model's "
            f"is {model_hash:.12}); train it again"
        )
    if about["order_hash"] != order_hash:
        raise InvalidArtifact(
            f"{path}: is for another order of neurons (hash {about['order_hash']:.12}, the model "
            f"is packed in {order_hash:.12}); record the trace again with this model's profile"
        )
