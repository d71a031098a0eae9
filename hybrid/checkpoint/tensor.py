"""Tensor: a named array in a mapped file, and the mapping itself.

This file has what all weight files have in common. The module of each format knows where in a file
a tensor is. Mappings are never closed explicitly: arrays keep their file mapped, and freeing the
last array unmaps it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import InvalidCheckpoint, UnsupportedModel
from hybrid.files import open_file

DType = Literal["F32", "F16", "BF16"]
# An index into a tensor, such as (slice(0, 256),). Empty: all of it.
Part = tuple[slice | NDArray[np.intp], ...]

# Files are little-endian on every machine. NumPy has no bfloat16, so its bits stay integers.
_ELEMENT_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_MAX_DIMENSIONS = 4
_COMPARED_BYTES = 4 << 20  # of each tensor at a time

_HTML_STARTS = (b"<!doctype", b"<html", b"<?xml")


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dtype: DType
    data: np.ndarray  # mapped, read-only; uint16 bit patterns if dtype is BF16
    # Without mmap, read the values from here instead: the file, the first byte in it, its inode.
    unmapped: tuple[Path, int, int] | None = None
    verify: Callable[[], None] | None = None  # compares checksums; raises InvalidCheckpoint

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def fp32(self, part: Part = ()) -> np.ndarray:
        """Return the values of a part as contiguous float32.

        They are a view of the file if it already holds that. Without mmap, a part other than a
        range of rows reads the whole tensor first; `in_memory` does that once for many parts.
        """
        data = self._stored(part)
        if self.dtype == "BF16":
            bits = data.astype(np.uint32, order="C")
            bits <<= 16  # a bfloat16 is the upper half of a float32
            return bits.view(np.float32)
        return np.require(data, np.float32, ["C", "A"])

    def release(self) -> None:
        """Let the system take back the memory of what was read of the mapped file.

        What is read later is read from the file again.
        """
        buffer = self.data.base
        if not isinstance(buffer, mmap.mmap) or not hasattr(buffer, "madvise"):
            return
        begin = self.data.ctypes.data - np.frombuffer(buffer, np.uint8).ctypes.data
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + self.data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            buffer.madvise(mmap.MADV_DONTNEED, first, last - first)

    def in_memory(self) -> Tensor:
        """Return the tensor itself if it is mapped. If not, return one with the values read."""
        if self.unmapped is None:
            return self
        return Tensor(self.name, self.dtype, self._stored())

    def has_values_of(self, other: Tensor) -> bool:
        """Return whether all values are equal. Reads a few rows at a time."""
        if self.shape != other.shape:
            return False
        if self.data.__array_interface__ == other.data.__array_interface__:
            return True  # the same bytes: torch.save stores tied weights once
        step = max(1, _COMPARED_BYTES // max(1, self.data[:1].nbytes))
        for first in range(0, len(self.data), step):
            part = (slice(first, first + step),)
            is_same = self.dtype == other.dtype and np.array_equal(
                self._stored(part), other._stored(part)
            )
            if not is_same and not np.array_equal(self.fp32(part), other.fp32(part)):
                return False
        return True

    def bytes_of(self, rows: slice | NDArray[np.intp]) -> np.ndarray:
        """Return rows as the file stores them, whatever they mean."""
        return self._stored((rows,))

    def _stored(self, part: Part = ()) -> np.ndarray:
        """Return the values of a part as the file stores them."""
        if self.verify is not None:
            self.verify()
        if self.unmapped is None:
            return self.data[part] if part else self.data
        match part:
            case (slice() as rows,):
                return self._read(*self.unmapped, rows)
            case _:
                data = self._read(*self.unmapped)
                return data[part] if part else data

    def _read(self, path: Path, begin: int, inode: int, rows: slice | None = None) -> np.ndarray:
        """Read the values from the file, or those of some rows.

        Raises InvalidCheckpoint if the file was replaced or shrinks. If a mapped file shrinks, the
        process ends.
        """
        if rows is None:
            ranges = [range(self.shape[0] if self.shape else 1)]
        else:
            wanted = range(*rows.indices(self.shape[0]))
            ranges = [wanted] if wanted.step == 1 else [range(row, row + 1) for row in wanted]
        try:
            with open_file(path) as file:
                if os.fstat(file.fileno()).st_ino != inode:
                    raise InvalidCheckpoint(f"{path}: was replaced while it was read; try again")
                parts = [self._read_rows(file, begin, part) for part in ranges]
        except OSError as error:
            raise InvalidCheckpoint(f"{path}: cannot be read: {error}") from error
        except EOFError:
            raise InvalidCheckpoint(
                f"{path}: became shorter while it was read; download it again"
            ) from None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_rows(self, file: BinaryIO, begin: int, rows: range) -> np.ndarray:
        """Read consecutive rows of a tensor that begins at byte `begin`. Raises EOFError."""
        itemsize, strides, shape = self.data.itemsize, self.data.strides, self.shape
        if shape:
            begin, shape = begin + rows.start * strides[0], (len(rows), *shape[1:])
        n = 1 + sum(
            (size - 1) * stride // itemsize for size, stride in zip(shape, strides, strict=True)
        )
        file.seek(begin)
        values = np.fromfile(file, self.data.dtype, n)
        if values.size < n:
            raise EOFError
        return np.lib.stride_tricks.as_strided(values, shape, strides, writeable=False)


class WeightFile(Protocol):
    """A file, or several that belong together, from which tensors are read by name."""

    paths: tuple[Path, ...]
    notices: tuple[str, ...]  # one line each, for the user

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor. Raises `InvalidCheckpoint` or `UnsupportedModel` if it is unusable."""


class StoredWeights(WeightFile, Protocol):
    """A file in Hugging Face's layout, or several."""

    def entry(self, name: str) -> TensorEntry:
        """Return what the index says of a tensor, whatever its type. Raises InvalidCheckpoint."""


def map_file(path: Path) -> mmap.mmap:
    """Map a file read-only. Raises InvalidCheckpoint if it cannot be a weight file."""
    if not path.is_file():  # a pipe or a device would block
        raise InvalidCheckpoint(
            f"{path}: is missing, or is a link to a missing file; download the model again"
        )
    try:
        with open_file(path) as file:
            head = file.read(256)
            if not head:
                raise InvalidCheckpoint(f"{path}: is empty; download it again")
            if head.startswith(b"version https://git-lfs."):
                raise InvalidCheckpoint(
                    f"{path}: is a git-LFS pointer, not the weights; run `git lfs pull` in its "
                    "folder, or download the file itself"
                )
            if head.lstrip().lower().startswith(_HTML_STARTS):
                raise InvalidCheckpoint(
                    f"{path}: is a web page, not the weights; download the file itself"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be read: {error}") from error


class TensorEntry(NamedTuple):
    """What a file's index says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte of the first element in the file
    strides: tuple[int, ...] | None = None  # in elements; None: contiguous


def map_tensor(
    path: Path, buffer: mmap.mmap, entry: TensorEntry, *, use_mmap: bool = True
) -> Tensor:
    """Return the tensor of an entry. The caller has checked that it is inside the file.

    Raises UnsupportedModel for its type, InvalidCheckpoint for its shape.
    """
    name, dtype, shape, begin, strides = entry
    element_type = _ELEMENT_TYPES.get(dtype)
    if element_type is None:
        raise UnsupportedModel(
            f"{path}: tensor {name!r} is {dtype}; expected {', '.join(_ELEMENT_TYPES)}"
        )
    if len(shape) > _MAX_DIMENSIONS or 0 in shape:  # NumPy cannot hold all of these
        raise InvalidCheckpoint(
            f"{path}: tensor {name!r} has shape {shape[:8]}; expected at most {_MAX_DIMENSIONS} "
            "dimensions, none of them 0"
        )
    byte_strides = strides and [stride * element_type.itemsize for stride in strides]
    data = np.ndarray(shape, element_type, buffer, begin, byte_strides)
    return Tensor(
        name, cast(DType, dtype), data, None if use_mmap else (path, begin, path.stat().st_ino)
    )
