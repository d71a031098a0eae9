"""A tensor of a GGUF file: rows of blocks, which become float32 values where they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint.gguf.blocks import BlockType
from hybrid.checkpoint.gguf.reader import GgufFile, TensorInfo
from hybrid.checkpoint.tensor import Part, Tensor

_COMPARED_ROWS = 256
_ALL = slice(None)
Index: TypeAlias = "slice | NDArray[np.intp]"


@dataclass(frozen=True, slots=True)
class BlockTensor(Tensor):
    """`data` holds the bytes of each row, as the file stores them."""

    stored: Tensor | None = None  # the same bytes, which knows how to read them
    type: BlockType | None = None
    rows: NDArray[np.intp] | None = None  # which stored row each row is; None: in order
    is_transposed: bool = False  # a stored row is a column

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.type is not None
        n = self.data.shape[-1] // self.type.n_bytes * self.type.n_values
        shape = (*self.data.shape[:-1], n)
        return shape[::-1] if self.is_transposed else shape

    def fp32(self, part: Part = ()) -> np.ndarray:
        """Return the values of a part as contiguous float32."""
        rows, columns = (*part, _ALL, _ALL)[:2]
        if self.is_transposed:
            return np.require(self._values(columns, rows).T, np.float32, ["C", "A"])
        return np.require(self._values(rows, columns), np.float32, ["C", "A"])

    def _values(self, rows: Index, columns: Index) -> np.ndarray:
        """Return the values of stored rows and columns."""
        assert self.type is not None
        assert self.stored is not None
        if len(self.shape) == 1:
            rows, columns = _ALL, rows
        elif self.rows is not None:
            rows = self.rows[rows]
        data = self.stored.bytes_of(rows) if len(self.shape) > 1 else self.stored.bytes_of(_ALL)
        blocks = np.ascontiguousarray(data).reshape(-1, self.type.n_bytes)
        with np.errstate(all="ignore"):  # whoever reads them checks that they are finite
            values = self.type.values(blocks).reshape(*data.shape[:-1], -1)
        return values[..., columns]

    def in_memory(self) -> Tensor:
        """Return a tensor that can be read column by column."""
        if self.is_transposed:
            return self
        return Tensor(self.name, "F32", self.fp32())

    def has_values_of(self, other: Tensor) -> bool:
        if self.shape != other.shape:
            return False
        parts = [slice(at, at + _COMPARED_ROWS) for at in range(0, len(self.data), _COMPARED_ROWS)]
        return all(np.array_equal(self.fp32((p,)), other.fp32((p,))) for p in parts)


def open_tensor(
    file: GgufFile, info: TensorInfo, name: str, *, use_mmap: bool = True
) -> BlockTensor:
    """Open a tensor as it is stored.

    Without `use_mmap` its bytes are read from the file when they are needed.
    """
    n_bytes = info.shape[-1] // info.type.n_values * info.type.n_bytes
    data = np.ndarray((*info.shape[:-1], n_bytes), np.uint8, file.buffer, info.begin)
    unmapped = None if use_mmap else (file.path, info.begin, file.path.stat().st_ino)
    stored = Tensor(name, "F32", data, unmapped)
    return BlockTensor(name, "F32", data, stored=stored, type=info.type)
