"""PredictorFile: a model's predictors, layer by layer, for several recalls.

It is one safetensors file, described in docs/formats.md. Neurons are in the order of the packed
model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from predictors.errors import PredictorError
from predictors.predictors import RANK_STEP, WIDE_RANK, LowRank
from predictors.reading import read_safetensors
from predictors.schema import (
    Malformed,
    anything,
    field_of,
    integer,
    list_of,
    mapping,
    number,
    parse_json,
    record,
    text,
)
from predictors.writing import replacing

VERSION = 3
_METADATA = "hybrid_predictor"
_MAX_BYTES = 8 << 30
EXACT, LOWRANK = "exact", "lowrank"  # kinds of a layer


def _recall(key: str) -> float:
    try:
        recall = float(key)
    except ValueError:
        recall = math.nan
    if not 0 < recall <= 1:
        raise Malformed("expected a recall between 0 and 1")
    return recall


_share = number(0.0, 1.000001)  # measured as a quotient of two rounded sums
_size = integer(1, 1 << 24)
_CHOICE = record(
    {
        "kind": text(),
        "rank": integer(0, 1 << 16),
        "margin": number(-1e8, 1e8),  # trained scores have a deviation of about 3
        **dict.fromkeys(("recall", "weighted_recall", "precision", "predicted"), _share),
        **dict.fromkeys(("cost_ns", "exact_ns"), number(0.0)),
    }
)
_ABOUT = record(
    {
        "version": integer(),
        **dict.fromkeys(("model_hash", "order_hash", "quant", "input"), text()),
        "n_layers": integer(1, 1 << 16),
        **dict.fromkeys(("n_neurons", "hidden_size"), _size),
        "choices": mapping(_recall, list_of(_CHOICE), least=1),
    },
    others=anything,  # what it was trained on, for the reader
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a layer uses for one recall, and its quality on held-out tokens."""

    kind: str  # EXACT or LOWRANK
    rank: int  # 0 if the kind is EXACT
    margin: float
    recall: float
    weighted_recall: float  # weighted by |activation|
    precision: float
    predicted: float  # share of the neurons that is predicted
    cost_ns: float  # to find the active neurons of a token, by the trace's cost table
    exact_ns: float  # the same by computing all gates

    @property
    def name(self) -> str:
        """The name in the keys of the layer's tensors."""
        return f"{LOWRANK}{self.rank}" if self.kind == LOWRANK else self.kind


@dataclass(frozen=True, slots=True)
class PredictorFile:
    choices: Mapping[float, Sequence[Choice]]  # recall → layers
    predictors: Mapping[tuple[int, str], LowRank]  # (layer, Choice.name)
    about: dict[str, Any]  # model_hash, order_hash, quant, sizes, training texts

    def select(self, recall: float) -> list[tuple[Choice, LowRank | None]]:
        """Return each layer's choice and predictor for a recall; no predictor means exact.

        Raises PredictorError for a recall that the file was not made for.
        """
        for known, choices in self.choices.items():
            if abs(known - recall) < 1e-9:
                return [
                    (choice, self.predictors.get((layer, choice.name)))
                    for layer, choice in enumerate(choices)
                ]
        raise PredictorError(
            f"no predictor for recall {recall:g}; the file holds "
            + ", ".join(f"{known:g}" for known in sorted(self.choices))
        )

    def save(self, path: Path) -> None:
        """Write the file. Raises OSError."""
        tensors: dict[str, NDArray[Any]] = {}
        for (layer, name), predictor in self.predictors.items():
            for part in predictor.__slots__:
                array = np.ascontiguousarray(getattr(predictor, part))
                tensors[f"{layer}.{name}.{part}"] = array
        about = {
            **self.about,
            "version": VERSION,
            "choices": {
                f"{recall:g}": [asdict(choice) for choice in choices]
                for recall, choices in self.choices.items()
            },
        }
        with replacing(path) as file:
            file.write(save(tensors, {_METADATA: json.dumps(about, ensure_ascii=False)}))


def load_predictor_file(path: Path) -> PredictorFile:
    """Read a file. Raises PredictorError if it is missing, broken or of another version."""
    try:
        metadata, arrays = read_safetensors(path, _MAX_BYTES)
        if _METADATA not in metadata:
            raise PredictorError(f"{path}: is not a predictor; predictors.train makes one")
        about = parse_json(metadata[_METADATA])
        version = field_of(about, "version")
        if version != VERSION:
            raise PredictorError(
                f"{path}: is of version {version!r:.20}, expected {VERSION}; train it again"
            )
        about = _ABOUT(about)
        del about["version"]
        choices = {
            recall: tuple(Choice(**choice) for choice in layers)
            for recall, layers in about.pop("choices").items()
        }
        for kind in {choice.kind for layers in choices.values() for choice in layers}:
            if kind not in (EXACT, LOWRANK):
                raise PredictorError(
                    f"{path}: uses the predictor kind {kind!r}, which this version of hybrid "
                    "does not run; train it again with python -m predictors.train"
                )
        n_layers, n_neurons, hidden = about["n_layers"], about["n_neurons"], about["hidden_size"]
        if any(len(layers) != n_layers for layers in choices.values()):
            raise ValueError("its layers are incomplete")
        predictors = {
            (layer, choice.name): _read(arrays, layer, choice, n_neurons, hidden)
            for layers in choices.values()
            for layer, choice in enumerate(layers)
            if choice.kind == LOWRANK
        }
    except OSError as error:
        raise PredictorError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise PredictorError(f"{path}: is broken ({error}); train it again") from error
    return PredictorFile(choices, predictors, about)


def _read(
    arrays: Mapping[str, NDArray[Any]], layer: int, choice: Choice, n_neurons: int, hidden: int
) -> LowRank:
    """Read one predictor. Raises ValueError for arrays of a wrong type or shape."""
    parts: dict[str, tuple[type, tuple[int, ...]]] = {
        "a": (np.float32, (choice.rank, hidden)),
        "b": (np.int8, (n_neurons, choice.rank)),
        "b_scale": (np.float32, (n_neurons, 2)),
        "bias": (np.float32, (n_neurons,)),
    }
    if choice.rank % RANK_STEP or choice.rank < RANK_STEP:
        raise ValueError(f"layer {layer} has rank {choice.rank}, not a multiple of {RANK_STEP}")
    found = {}
    for part, (dtype, shape) in parts.items():
        array = arrays.get(f"{layer}.{choice.name}.{part}")
        if array is None:
            raise ValueError(f"lacks {layer}.{choice.name}.{part}")
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{layer}.{choice.name}.{part} has another type or shape")
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise ValueError(f"{layer}.{choice.name}.{part} is not finite")
        found[part] = array
    narrow = found["b"][:, WIDE_RANK:]
    if ((narrow < -8) | (narrow > 7)).any():
        raise ValueError(f"{layer}.{choice.name}.b has more than 4 bits")
    return LowRank(**found)
