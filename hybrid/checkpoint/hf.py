"""A model's folder in Hugging Face's layout: config.json, and weights in one file or in shards.

This file decides which files are read, and in what order. `hybrid.model.families` knows the configs
and the names of tensors. `safetensors` and `torch_bin` read the weight files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hybrid.checkpoint import foreign
from hybrid.checkpoint.identity import ModelIdentity, SourceFile
from hybrid.checkpoint.json_file import read_object
from hybrid.checkpoint.roles import find_tensors
from hybrid.checkpoint.safetensors import SafetensorsFile
from hybrid.checkpoint.tensor import StoredWeights, Tensor, TensorEntry
from hybrid.checkpoint.torch_bin import TorchBin
from hybrid.errors import (
    EngineClosed,
    InvalidCheckpoint,
    InvalidOption,
    ModelNotFound,
    UnsupportedModel,
)
from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.model.families import parse_config, refuse_unused
from hybrid.model.stored_predictors import StoredPredictors
from hybrid.notices import Notices, short_list

if TYPE_CHECKING:
    from hybrid.checkpoint.gguf.reader import GgufFile

# The preferred format first: a safetensors file cannot hold a program, and all of it is validated.
_FORMATS: tuple[tuple[str, type[SafetensorsFile] | type[TorchBin]], ...] = (
    ("model.safetensors", SafetensorsFile),
    ("pytorch_model.bin", TorchBin),
)
MAX_SHARDS = 1000  # each stays open; the largest published models have 200


class Generated(Protocol):
    """A tensor that is in no file and is made when it is used."""

    def make(self) -> Tensor: ...


class Checkpoint:
    """A model's config and its mapped weights. Arrays that it returned stay valid after `close`."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        tensors: Mapping[tuple[str, int | None], Tensor | Generated],
        *,
        identity: ModelIdentity,
        format: Format | None = None,
        is_synthetic: bool = False,
        notices: tuple[str, ...] = (),
        unused_tensors: tuple[str, ...] = (),
        predictors: StoredPredictors | None = None,
        gguf: GgufFile | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.identity = identity  # also lists the files that the weights come from
        self.format = format  # what the weights are packed to; None: they are not
        self.is_synthetic = is_synthetic  # random weights, to measure speed
        self.notices = notices  # one line each, for the user
        self.unused_tensors = unused_tensors  # names in the files that the family lacks
        self.predictors = predictors  # in the files, if any
        self.gguf = gguf  # the GGUF file that also has the tokenizer, if there is one
        self._tensors: Mapping[tuple[str, int | None], Tensor | Generated] | None = tensors

    def read(self, role: str, layer: int | None = None) -> np.ndarray:
        """Return the float32 weights of a role, such as "embedding", or "gate" of a layer.

        This is a new array, or a read-only view of the file if it holds contiguous float32. Raises
        the errors of `tensor`.
        """
        return self.tensor(role, layer).fp32()

    def tensor(self, role: str, layer: int | None = None) -> Tensor:
        """Return the weights of a role as a tensor, which can be read part by part.

        Raises EngineClosed after `close`, and InvalidOption for an unknown role or layer.
        """
        if self._tensors is None:
            raise EngineClosed(f"{self.folder}: this checkpoint was closed; open it again")
        if role == "head" and self.config.has_tied_head:
            role = "embedding"
        tensor = self._tensors.get((role, layer))
        if tensor is None:
            roles = sorted({role for role, _ in self._tensors})
            raise InvalidOption(
                f"no weights for role {role!r} of layer {layer}; roles are {', '.join(roles)}, "
                f"layers 0 to {self.config.n_layers - 1}"
            )
        return tensor if isinstance(tensor, Tensor) else tensor.make()

    @property
    def weights_hash(self) -> str:
        """The hash of `identity`. Raises InvalidCheckpoint."""
        return self.identity.weights_hash

    def close(self) -> None:
        self._tensors = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(
    folder: Path,
    format: Format | None = None,
    *,
    use_mmap: bool = True,
    hashes: Path | None = None,
) -> Checkpoint:
    """Open a model's folder. Finds every tensor and checks its type and shape before it returns.

    Without `use_mmap` weights are read from the file when they are needed, and a file that shrinks
    is an error. If a mapped file shrinks, the process ends. `format` is what the weights will be
    packed to, which changes nothing here. `hashes` is the folder in which the
    hashes of weight files are remembered.

    Raises `ModelNotFound`, `InvalidCheckpoint` or `UnsupportedModel`.
    """
    if not folder.is_dir():
        kind = foreign.file_kind(folder)
        raise ModelNotFound(
            f"{folder}: is not a folder; expected one with config.json and weights"
            + (f": {kind}" if kind else "")
        )
    # Recorded before the files are opened, so that old weights never get a newer file's state.
    present = {path: SourceFile.of(path) for path in folder.iterdir() if path.is_file()}
    notices = Notices()
    config = read_config(folder, notices)
    weights = open_weights(folder, use_mmap=use_mmap)
    config, tensors, unused = find_tensors(folder, config, weights, notices)
    if unused:
        refuse_unused(read_object(folder / "config.json"), unused, folder)
    for name, _ in _FORMATS:
        if folder / name in weights.paths and folder / f"{name}.index.json" in present:
            notices.add(
                f"the folder has {name} and {name}.index.json; the former is read, as by "
                "transformers, and the files that the index lists are not"
            )
    if folder / "adapter_config.json" in present:
        notices.add("the folder also holds a LoRA adapter, which is not applied")
    notices.add(*weights.notices)
    sources = tuple(present[path] for path in weights.paths)
    return Checkpoint(
        folder,
        config,
        tensors,
        identity=ModelIdentity(folder, config, sources, hashes),
        format=format,
        notices=tuple(notices),
        unused_tensors=unused,
    )


def read_config(folder: Path, notices: Notices | None = None) -> ModelConfig:
    """Read config.json and generation_config.json.

    `notices` receives a line for each thing that is read otherwise than it is written. Raises
    InvalidCheckpoint, UnsupportedModel.
    """
    notices = Notices() if notices is None else notices
    path = folder / "config.json"
    names = _file_names(folder)
    if path.name not in names and (kind := foreign.folder_kind(folder, names)):
        raise UnsupportedModel(f"{folder}: has no config.json: {kind}")
    config = parse_config(read_object(path), path, notices)
    generation_path = folder / "generation_config.json"
    if generation_path.name in names:
        # This file is about generation, so it overrides config.json. An id that the model lacks
        # cannot end an answer; hybrid/text/generation_config.py reports it.
        eos = read_object(generation_path, keeps_constants=True).get("eos_token_id")
        if eos_ids := known_token_ids(eos, config.vocab_size):
            config = replace(config, eos_ids=eos_ids)
    return config


def known_token_ids(value: object, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of the vocabulary among a field's value: one, a list, or anything else."""
    values = value if isinstance(value, list) else [value]
    return tuple(token for token in values if type(token) is int and 0 <= token < vocab_size)


def open_weights(folder: Path, *, use_mmap: bool = True) -> StoredWeights:
    """Open a folder's files of weights. Raises InvalidCheckpoint and UnsupportedModel."""
    files = _file_names(folder)
    for name, file_type in _FORMATS:
        reader = partial(file_type, use_mmap=use_mmap)
        if name in files:
            return reader(folder / name)
        if f"{name}.index.json" in files:
            return _Shards(folder / f"{name}.index.json", reader)
    if kind := foreign.folder_kind(folder, files):
        raise UnsupportedModel(f"{folder}: has no weights that hybrid reads: {kind}")
    expected = [expected for name, _ in _FORMATS for expected in (name, f"{name}.index.json")]
    raise InvalidCheckpoint(
        f"{folder}: has no weights; expected one of {', '.join(expected)}; "
        f"found {', '.join(sorted(files)[:20])}"
    )


class _Shards:
    """The weights of an index file, which maps each tensor's name to a file's name."""

    def __init__(self, index: Path, reader: Callable[[Path], StoredWeights]) -> None:
        self._index = index
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) for shard in weight_map.values()
        ):
            raise InvalidCheckpoint(
                f"{index}: expected an object weight_map that maps tensor names to file names"
            )
        self._shard_of: dict[str, str] = weight_map
        shards = set(weight_map.values())
        if len(shards) > MAX_SHARDS:
            raise InvalidCheckpoint(
                f"{index}: lists {len(shards):,} files, expected at most {MAX_SHARDS:,}"
            )
        # Only names in the folder's own listing pass, so "../" and absolute paths cannot.
        missing = sorted(shards - _file_names(index.parent))
        if missing:
            raise InvalidCheckpoint(
                f"{index}: lists files that are not in its folder: {short_list(missing)}; download "
                "them"
            )
        self._files = {shard: reader(index.parent / shard) for shard in shards}
        self.notices = tuple(line for file in self._files.values() for line in file.notices)
        self.paths = (index, *(index.parent / shard for shard in sorted(shards)))

    @property
    def names(self) -> Collection[str]:
        return self._shard_of.keys() | {
            name for file in self._files.values() for name in file.names
        }

    def tensor(self, name: str) -> Tensor:
        if name not in self._shard_of:
            raise InvalidCheckpoint(f"{self._index}: lists no tensor {name!r}")
        return self._files[self._shard_of[name]].tensor(name)

    def entry(self, name: str) -> TensorEntry:
        if name not in self._shard_of:
            raise InvalidCheckpoint(f"{self._index}: lists no tensor {name!r}")
        return self._files[self._shard_of[name]].entry(name)


def _file_names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise InvalidCheckpoint(f"{folder}: cannot be listed: {error}") from error
