"""Choose the predictors of an engine: find their file, check that it belongs to this model, and
pack it for the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hybrid.checkpoint import Checkpoint
from hybrid.checkpoint.identity import SourceFile, hash_content
from hybrid.engine.options import LoadOptions
from hybrid.errors import InvalidArtifact, InvalidOption
from hybrid.files import has_files, open_file
from hybrid.kernels import Predictor
from hybrid.model.stored_predictors import StoredPredictors
from hybrid.notices import Notices
from hybrid.weights.packed_predictor import (
    pack_predictor,
    predictor_bytes,
    stored_predictor_bytes,
)
from predictors.errors import PredictorError
from predictors.file import PredictorFile, load_predictor_file

if TYPE_CHECKING:
    from hybrid.engine.loading.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predictors in use, with the quality that was measured when they were trained.

    Of those in a model's own file (`stored`) nothing was measured, so that quality is None.
    """

    path: Path
    recall: float | None  # the requested recall of each layer
    kinds: tuple[str, ...]  # per layer: "exact", or "lowrank" or "mlp" with its rank
    worst_recall: float | None  # lowest recall of any layer, on held-out tokens
    predicted: float | None  # share of the neurons whose gates are computed, on held-out tokens
    bytes_per_token: int  # of the predictors themselves
    stored: StoredPredictors | None = None
    source: SourceFile | None = None  # the state of the file that was read; None: `stored`

    def identity(self) -> str:
        """Return what names these predictors: a hash of their file and the recall, or "own".

        The model's hash covers those in its own file. Raises InvalidArtifact if the file is no
        longer the one that was read.
        """
        if self.source is None:
            return "own"
        with suppress(OSError), open_file(self.path) as file:
            if SourceFile.of(self.path) == self.source:
                content = hash_content(file.fileno(), self.source.n_bytes)
                return f"{content:.16} at recall {self.recall:g}"
        raise InvalidArtifact(
            f"{self.path}: was changed or removed after it was read; load the model again"
        )

    @property
    def summary(self) -> str:
        """Whose predictors these are, or how good."""
        if self.stored is not None:
            return f"{self.stored.maker}'s predictors"
        return f"recall {self.recall:g}"

    @property
    def predicted_layers(self) -> frozenset[int]:
        """The layers in which a predictor names neurons."""
        return frozenset(layer for layer, kind in enumerate(self.kinds) if kind != "exact")

    @property
    def n_predicted_layers(self) -> int:
        return len(self.predicted_layers)


def predictor_path(home: Path, model_hash: str, quant: str) -> Path:
    """Return where `hybrid.setup` keeps the predictor of a model, in hybrid's own folder."""
    return home / "predictors" / f"{model_hash[:32]}-{quant}.safetensors"


def choose_predictors(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: LoadOptions,
    home: Path | None,
    notices: Notices,
) -> tuple[Sequence[Predictor | None] | None, Prediction | None]:
    """Return native predictors per layer and their description; None and None compute every gate.

    "exact" uses no predictor. "auto" falls back to exact, with a notice, if this model has no
    usable predictor. "own" uses those in the model's own file, whose native form is None: they are
    packed with the model. Raises InvalidArtifact if a given file is broken or of another model or
    neuron order. Raises InvalidOption if a given file was not made for the requested recall, or if
    there are no predictors of the model's own.
    """
    config, format, is_auto = spec.config, spec.format, options.predictor == "auto"
    if options.predictor == "exact":
        if checkpoint.predictors is not None:
            notices.add(
                f"{checkpoint.folder.name}: its predictors are not used: every gate is computed, "
                "which is exact; --predictor own uses them"
            )
        return None, None
    if options.predictor == "own":
        return None, _own(checkpoint)
    if not config.is_sparse:
        if is_auto:
            return None, None
        raise InvalidOption(
            f"predictor: the model's activation is {config.activation}, so every neuron fires and "
            "there is nothing to predict; use predictor exact"
        )
    path = Path(options.predictor)
    if is_auto:
        kept = None
        if home is not None and has_files(home / "predictors"):
            kept = predictor_path(home, spec.model_hash, format.name)
        if kept is None or not os.path.lexists(kept):
            notices.add("no predictor for this model, so it runs exactly; hybrid.setup makes one")
            return None, None
        path = kept
    try:
        source = SourceFile.of(path) if os.path.exists(path) else None  # noqa: PTH110 - never raises
        file = load_predictor_file(path)
        _check(file, path, spec)
        try:
            selected = file.select(options.recall)
        except PredictorError as error:
            raise InvalidOption(f"recall: {error}") from error
    except (PredictorError, InvalidArtifact, InvalidOption) as error:
        if is_auto:
            notices.add(f"predictor not used, exact instead: {error}")
            return None, None
        if isinstance(error, PredictorError):
            raise InvalidArtifact(str(error)) from error
        raise
    choices = [choice for choice, _ in selected]
    prediction = Prediction(
        path=path,
        recall=options.recall,
        kinds=tuple(choice.name for choice in choices),
        worst_recall=min(choice.recall for choice in choices),
        predicted=float(np.mean([choice.predicted for choice in choices])),
        bytes_per_token=sum(
            predictor_bytes(format, layer, config.hidden_size)
            for _, layer in selected
            if layer is not None
        ),
        source=source,
    )
    n_exact = config.n_layers - prediction.n_predicted_layers
    if n_exact:
        notices.add(f"{n_exact} of {config.n_layers} layers are exact: no predictor pays off there")
    if file.about["quant"] != format.name:
        notices.add(
            f"the predictor was trained on {file.about['quant']} weights, not {format.name}"
        )
    natives = [
        None if layer is None else pack_predictor(format, layer, choice.margin)
        for choice, layer in selected
    ]
    return natives, prediction


def _own(checkpoint: Checkpoint) -> Prediction:
    """Describe the predictors in a model's own file. Raises InvalidOption if it has none."""
    stored, config = checkpoint.predictors, checkpoint.config
    if stored is None:
        raise InvalidOption(
            f"predictor own: {checkpoint.folder} brings no predictors; they are in GGUF files of "
            "PowerInfer and Kairox"
        )
    if not config.is_sparse:
        raise InvalidOption(
            f"predictor own: with activation {config.activation} every neuron fires, so there is "
            "nothing to predict; use predictor exact"
        )
    return Prediction(
        path=checkpoint.folder,
        recall=None,
        kinds=tuple(f"mlp{rank}" for rank in stored.ranks),
        worst_recall=None,
        predicted=None,
        bytes_per_token=stored_predictor_bytes(stored, config),
        stored=stored,
    )


def _check(file: PredictorFile, path: Path, spec: ModelSpec) -> None:
    about, config = file.about, spec.config
    sizes = about["n_layers"], about["n_neurons"], about["hidden_size"]
    if about.get("input") != "normed":
        raise InvalidArtifact(f"{path}: takes {about.get('input')!r} inputs, expected 'normed'")
    if sizes != (config.n_layers, config.n_neurons, config.hidden_size):
        raise InvalidArtifact(
            f"{path}: is for {sizes[0]} layers of {sizes[1]} neurons and hidden size {sizes[2]}; "
            f"this model has {config.n_layers}, {config.n_neurons} and {config.hidden_size}"
        )
    if about["model_hash"] != spec.model_hash:
        raise InvalidArtifact(
            f"{path}: was trained for other weights (hash {about['model_hash']:.12}, this model's "
            f"is {spec.model_hash:.12}); train it again"
        )
    if about["order_hash"] != spec.order_hash:
        raise InvalidArtifact(
            f"{path}: is for another order of neurons (hash {about['order_hash']:.12}, the model "
            f"is packed in {spec.order_hash:.12}); record the trace again with this model's profile"
        )
