"""A model in GGUF files: one file, or several with names such as model-00001-of-00003.gguf."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid.checkpoint.gguf.architecture import (
    TRANSPOSED,
    stored_rows,
    tensor_name,
)
from hybrid.checkpoint.gguf.predictors import predictor_role
from hybrid.checkpoint.gguf.reader import GgufFile, TensorInfo, read_gguf, unread_type
from hybrid.checkpoint.gguf.tensor import BlockTensor, open_tensor
from hybrid.errors import InvalidCheckpoint, UnsupportedModel
from hybrid.notices import short_list

NEURON_ORDER = ".ffn_reorder_perms"  # of Kairox's files
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MAX_PARTS = 1000


def first_part(path: Path) -> Path:
    """Return the first of the files that belong together. It has the config and the tokenizer."""
    match = PART.fullmatch(path.name)
    return path if match is None else path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")


def open_files(path: Path) -> list[GgufFile]:
    """Read a file and the others that belong to it, the first one first.

    Raises InvalidCheckpoint if one is missing, or if they do not fit together.
    """
    match = PART.fullmatch(path.name)
    first = read_gguf(path)
    n = first.single("split.count", 1)
    if type(n) is not int or n < 1:
        raise InvalidCheckpoint(f"{path}: split.count: expected an integer, 1 or more, found {n!r}")
    if match is None or n == 1:
        if n > 1:
            raise InvalidCheckpoint(
                f"{path}: is one of {n} files, but its name does not say which; name it such as "
                "model-00001-of-00003.gguf"
            )
        return [first]
    n = int(match[3])
    if not 1 <= n <= MAX_PARTS:
        raise InvalidCheckpoint(f"{path}: would be one of {n} files")
    paths = [path.with_name(f"{match[1]}-{at:05}-of-{n:05}.gguf") for at in range(1, n + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise InvalidCheckpoint(f"{path.parent}: lacks {short_list(missing)}; download them")
    files = [read_gguf(part) for part in paths]
    for at, file in enumerate(files):
        if file.single("split.count") != n or file.single("split.no") != at:
            raise InvalidCheckpoint(f"{file.path}: is not part {at + 1} of {n}, as its name says")
    return files


def refuse_neuron_order(file: GgufFile) -> None:
    """Raise UnsupportedModel for a file that holds only how Kairox groups a model's neurons."""
    if file.tensors and all(name.endswith(NEURON_ORDER) for name in file.tensors):
        raise UnsupportedModel(
            f"{file.path}: says in which groups Kairox caches a model's neurons, and holds no "
            "model; load the model's own file"
        )


class GgufWeights:
    """The tensors of GGUF files by Hugging Face's names. Implements `WeightFile`."""

    def __init__(
        self, files: list[GgufFile], config: dict[str, Any], *, use_mmap: bool = True
    ) -> None:
        """Raises InvalidCheckpoint, and UnsupportedModel for tensors of other architectures."""
        self.paths = tuple(file.path for file in files)
        self.notices: tuple[str, ...] = ()
        self._config, self._use_mmap = config, use_mmap
        # The tensors of predictors, by role and layer.
        self.predictors: dict[tuple[str, int | None], tuple[GgufFile, TensorInfo]] = {}
        self._found: dict[str, tuple[GgufFile, TensorInfo]] = {}
        unknown, has_order = [], False
        for file in files:
            for info in file.tensors.values():
                name = tensor_name(info.name)
                if role := predictor_role(info.name):
                    self.predictors[role] = file, info
                    continue
                if info.name.endswith(NEURON_ORDER):
                    has_order = True
                    continue
                if not info.type.is_read:
                    raise unread_type(file.path, info.name, f"the type {info.type.name}")
                if name is None:
                    unknown.append(info.name)
                elif name in self._found:
                    raise InvalidCheckpoint(f"{file.path}: {info.name!r} is in two files")
                else:
                    self._found[name] = file, info
        if has_order:
            # Gate, up, down and predictor have their rows in one order, and any order computes the
            # same.
            self.notices = (f"{self.paths[0].name}: its order of neurons for a cache is not used",)
        if unknown:
            raise UnsupportedModel(
                f"{self.paths[0]}: not supported: the architecture has no tensors such as "
                f"{short_list(unknown)}"
            )
        self.n_weights: Counter[str] = Counter()  # of matrices, by the name of their type
        for _, info in self._found.values():
            if len(info.shape) > 1:
                self.n_weights[info.type.name] += math.prod(info.shape)
        # Types of down matrices whose rows are not those of neurons.
        self.down_types: set[str] = {
            info.type.name
            for name, (_, info) in self._found.items()
            if name.endswith("down_proj.weight") and not _is_transposed(info)
        }

    @property
    def names(self) -> Collection[str]:
        return self._found.keys()

    def tensor(self, name: str) -> BlockTensor:
        if name not in self._found:
            raise InvalidCheckpoint(f"{self.paths[0]}: has no tensor {name!r}")
        file, info = self._found[name]
        rows = stored_rows(name, info.shape[0], self._config)
        tensor = open_tensor(file, info, name, use_mmap=self._use_mmap)
        return replace(tensor, rows=rows, is_transposed=_is_transposed(info))


def _is_transposed(info: TensorInfo) -> bool:
    return f".{TRANSPOSED}." in info.name
