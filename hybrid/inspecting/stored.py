"""The tensors of a model's files, as they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hybrid.checkpoint.gguf.reader import GgufFile
from hybrid.checkpoint.gguf.tensor import open_tensor
from hybrid.checkpoint.tensor import StoredWeights, Tensor
from hybrid.inspecting.report import StoredType

# Bytes of an element, by its type in safetensors files.
_ELEMENT_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4}
_ELEMENT_BYTES |= {"F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    read: Callable[[], Tensor]  # raises UnsupportedModel for a type that is not read
    raw: memoryview | None = None  # its bytes, if hybrid reads no values of the type

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


def gguf_tensors(files: Sequence[GgufFile]) -> list[StoredTensor]:
    """Return the tensors of a model's GGUF files in order, those of unread types too."""
    return [_of_gguf(file, name) for file in files for name in file.tensors]


def _of_gguf(file: GgufFile, name: str) -> StoredTensor:
    info = file.tensors[name]
    raw = None
    if not info.type.is_read:
        raw = memoryview(file.buffer)[info.begin : info.begin + info.n_bytes]

    def opened() -> Tensor:
        return open_tensor(file, info, name)

    return StoredTensor(name, info.type.name, info.shape, info.n_bytes, opened, raw)


def folder_tensors(weights: StoredWeights) -> list[StoredTensor]:
    """Return the tensors of a folder by name. Raises InvalidCheckpoint."""
    return [_of_folder(weights, name) for name in sorted(weights.names)]


def _of_folder(weights: StoredWeights, name: str) -> StoredTensor:
    entry = weights.entry(name)
    n_bytes = math.prod(entry.shape) * _ELEMENT_BYTES.get(entry.dtype, 1)
    return StoredTensor(name, entry.dtype, entry.shape, n_bytes, lambda: weights.tensor(name))


def table(tensors: Iterable[StoredTensor]) -> tuple[StoredType, ...]:
    """Return how much of each type there is, most bytes first."""
    rows: dict[str, StoredType] = {}
    for tensor in tensors:
        row = rows.get(tensor.type, StoredType(tensor.type, 0, 0, 0))
        rows[tensor.type] = StoredType(
            row.type,
            row.tensors + 1,
            row.weights + tensor.n_weights,
            row.bytes + tensor.n_bytes,
        )
    return tuple(sorted(rows.values(), key=lambda row: -row.bytes))
