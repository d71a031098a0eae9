"""ActivationProfile: how often each FFN neuron of a model fired on some texts.

`profiler.record` writes it. Packing takes the neuron order from it, and placement takes the
frequencies. Neurons are in the checkpoint's order. docs/formats.md describes the file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from hybrid.errors import InvalidArtifact
from hybrid.files import has_files, read_safetensors, write_atomically
from hybrid.model.config import ModelConfig
from hybrid.notices import Notices
from predictors.schema import anything, field_of, integer, list_of, parse_json, record, text

VERSION = 2
_MAX_BYTES = 2 << 30
FILE_NAME = "activation_profile.safetensors"
_METADATA = "hybrid_profile"
POSITION_BUCKETS = 16  # bucket b holds positions 2^b - 1 to 2^(b+1) - 2 of a window


@dataclass(frozen=True, slots=True)
class ActivationProfile:
    """Counts of one recording, summed over its tokens."""

    model_hash: str  # Checkpoint.weights_hash of the model
    n_tokens: int
    counts: NDArray[np.int64]  # (n_layers, n_neurons) tokens for which the neuron fired
    text_counts: NDArray[np.int64]  # (n_texts, n_layers, n_neurons) the same per text
    position_active: NDArray[np.int64]  # (n_layers, POSITION_BUCKETS) active neurons
    position_tokens: NDArray[np.int64]  # (POSITION_BUCKETS,) tokens
    overlap: NDArray[np.int64]  # (n_layers,) active neurons that also fired one token before
    overlap_base: NDArray[np.int64]  # (n_layers,) active neurons of tokens with a token before
    about: dict[str, Any]  # model, quant, window, texts with their hashes, versions

    @property
    def frequency(self) -> NDArray[np.float64]:
        """(n_layers, n_neurons) share of tokens for which each neuron fired."""
        return self.counts / self.n_tokens

    @property
    def sparsity(self) -> NDArray[np.float64]:
        """(n_layers,) share of inactive neurons."""
        return 1.0 - self.frequency.mean(1)

    def neuron_orders(self) -> list[NDArray[np.intp]]:
        """Return per layer the neurons by falling frequency. Equal ones keep their order."""
        return [np.argsort(-counts, kind="stable") for counts in self.counts]

    def save(self, path: Path) -> None:
        """Write the file. Raises OSError."""
        about = {
            **self.about,
            "version": VERSION,
            "model_hash": self.model_hash,
            "n_tokens": self.n_tokens,
        }
        tensors = {name: getattr(self, name) for name in _SHAPES}
        metadata = {_METADATA: json.dumps(about, ensure_ascii=False)}
        write_atomically(path, save(tensors, metadata))


_ABOUT = record(
    {"version": integer(), "model_hash": text(), "n_tokens": integer(1)},
    {
        **dict.fromkeys(("model", "quant", "tokenizer_hash", "hybrid_version"), text()),
        "window": integer(1),
        "texts": list_of(
            record(
                {},
                {**dict.fromkeys(("name", "sha256"), text()), "bytes": integer()},
                others=anything,
            )
        ),
    },
    others=anything,
)

# Dimensions of each array: T texts, L layers, N neurons, B buckets.
_SHAPES = {
    "counts": "LN",
    "text_counts": "TLN",
    "position_active": "LB",
    "position_tokens": "B",
    "overlap": "L",
    "overlap_base": "L",
}


def load_profile(path: Path) -> ActivationProfile:
    """Read a profile. Raises InvalidArtifact if the file is no profile, broken, or of another
    version.
    """
    try:
        metadata, arrays = read_safetensors(path, _MAX_BYTES)
        if _METADATA not in metadata:
            raise InvalidArtifact(
                f"{path}: is not an activation profile; make one with profiler.record"
            )
        about = parse_json(metadata[_METADATA])
        version = field_of(about, "version")
        if version != VERSION:
            raise InvalidArtifact(
                f"{path}: expected a profile of version {VERSION}, found {version!r:.20}; record "
                "it again"
            )
        about = _ABOUT(about)
    except OSError as error:
        raise InvalidArtifact(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidArtifact(f"{path}: is broken ({error}); record it again") from error
    del about["version"]
    n_tokens, model_hash = about.pop("n_tokens"), about.pop("model_hash")
    sizes = {"B": POSITION_BUCKETS}
    counts = {}
    for name, dimensions in _SHAPES.items():
        array = arrays.get(name)
        is_sound = array is not None and array.dtype == np.int64 and array.ndim == len(dimensions)
        if array is not None:
            for dimension, size in zip(dimensions, array.shape, strict=False):
                is_sound &= size > 0 and sizes.setdefault(dimension, size) == size
        if array is None or not is_sound or (array < 0).any():
            raise InvalidArtifact(f"{path}: its array {name!r} is broken; record it again")
        counts[name] = array
    if counts["counts"].max() > n_tokens:
        raise InvalidArtifact(f"{path}: its counts contradict each other; record it again")
    return ActivationProfile(model_hash=model_hash, n_tokens=n_tokens, **counts, about=about)


class ModelName(Protocol):
    """A model that is hashed when its hash is first needed."""

    @property
    def weights_hash(self) -> str: ...


def check_profile(
    profile: ActivationProfile, path: Path, model_hash: str, config: ModelConfig
) -> None:
    """Raises InvalidArtifact unless the profile was recorded with this model."""
    n_layers, n_neurons = config.n_layers, config.n_neurons
    if profile.counts.shape != (n_layers, n_neurons):
        found = " x ".join(map(str, profile.counts.shape))
        raise InvalidArtifact(
            f"{path}: is for a model of {found} neurons; this one has {n_layers} x {n_neurons}"
        )
    if profile.model_hash != model_hash:
        raise InvalidArtifact(
            f"{path}: was recorded with other weights (hash {profile.model_hash:.12}, this "
            f"model's is {model_hash:.12}); record it again with profiler.record"
        )


def profile_path(home: Path, model_hash: str) -> Path:
    """Return where `hybrid.setup` keeps the profile of a model, in hybrid's own folder."""
    return home / "profiles" / f"{model_hash[:32]}.safetensors"


def find_profile(
    folder: Path, home: Path | None, identity: ModelName, config: ModelConfig, notices: Notices
) -> ActivationProfile | None:
    """Return the profile that `hybrid.setup` recorded, else the one in the model's folder.

    A profile that exists but cannot be used becomes a notice. The model is hashed only if there is
    a profile that could be its own.
    """
    found = [folder / FILE_NAME]
    if home is not None and has_files(home / "profiles"):
        found.insert(0, profile_path(home, identity.weights_hash))
    for path in found:
        if not os.path.lexists(path):
            continue
        try:
            profile = load_profile(path)
            check_profile(profile, path, identity.weights_hash, config)
            return profile
        except InvalidArtifact as error:
            notices.add(f"profile not used: {error}")
    return None
