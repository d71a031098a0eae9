"""One GGUF file: its metadata and where its tensors are, all of it validated.

The format (github.com/ggml-org/ggml, docs/gguf.md): magic, version, counts; the metadata, typed
pairs of key and value; the tensors' names, shapes, types and offsets; padding; the tensors' bytes.
Integers are little-endian. Nothing that the file says is believed before it is compared with the
file's length: counts, lengths of strings and arrays, offsets.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint.gguf.blocks import BLOCK_TYPES, UNREAD_TYPES, BlockType
from hybrid.checkpoint.tensor import map_file
from hybrid.errors import InvalidCheckpoint, UnsupportedModel

_POWERINFER = b"PWRI"  # the magic of PowerInfer's files, which are the same but for some tensors
_MAGICS = (b"GGUF", _POWERINFER)
_VERSIONS = (2, 3)
_MAX_KEYS, _MAX_TENSORS = 65_536, 100_000
_MAX_KEY, _MAX_NAME = 65_535, 256  # bytes; llama.cpp allows 64 for a tensor's name
_MAX_ELEMENTS = 1 << 24  # of an array; the largest vocabulary has 300,000 pieces
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 20
_MAX_NESTING = 4  # of arrays of arrays

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {  # type of a value: its NumPy type
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("u1"),  # a bool
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


class TensorInfo(NamedTuple):
    """A tensor, as the file describes it."""

    name: str
    type: BlockType
    shape: tuple[int, ...]  # rows first, as in NumPy; the file lists the sizes in reverse
    begin: int  # first byte in the file
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file whose structure is sound. `buffer` is mapped and read-only."""

    path: Path
    buffer: mmap
    version: int
    is_powerinfers: bool
    metadata: dict[str, Any]  # numbers, strings, bools; arrays as NumPy arrays or lists of str
    tensors: dict[str, TensorInfo]
    # Where a key's value is in the buffer, with the number of its type before it.
    spans: dict[str, slice] = field(default_factory=dict)

    def single(self, key: str, default: Any = None) -> Any:
        """Return a value that is no array. Raises InvalidCheckpoint if it is one."""
        value = self.metadata.get(key, default)
        if isinstance(value, (list, np.ndarray)):
            raise InvalidCheckpoint(f"{self.path}: {key}: expected one value, found an array")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Read a file's structure. Raises InvalidCheckpoint, and UnsupportedModel for its version."""
    buffer = map_file(path)
    try:
        return _Parser(path, buffer).parse()
    except _Malformed as error:
        raise InvalidCheckpoint(
            f"{path}: is not a sound GGUF file: {error}; it has {len(buffer):,} bytes, perhaps cut "
            "off: download it again"
        ) from None


def unread_type(path: Path, name: str, type: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path}: tensor {name!r} is of {type}, which hybrid does not read; it reads "
        f"{', '.join(kind.name for kind in BLOCK_TYPES.values())}"
    )


class _Malformed(Exception):
    """The file contradicts itself. The message says how."""


class _Parser:
    def __init__(self, path: Path, buffer: mmap) -> None:
        self.path, self.buffer, self.at = path, buffer, 0

    def parse(self) -> GgufFile:
        magic = self.bytes(4)
        if magic not in _MAGICS:
            raise _Malformed("it does not begin with GGUF")
        version = self.integer("<I")
        if version not in _VERSIONS:
            if version.to_bytes(4, "little")[::-1] in [v.to_bytes(4, "little") for v in _VERSIONS]:
                raise UnsupportedModel(f"{self.path}: not supported: a big-endian GGUF file")
            raise UnsupportedModel(
                f"{self.path}: not supported: version {version} of GGUF; expected 2 or 3"
            )
        n_tensors, n_keys = self.integer("<Q"), self.integer("<Q")
        if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
            raise _Malformed(f"it would have {n_tensors:,} tensors and {n_keys:,} keys")
        metadata: dict[str, Any] = {}
        spans = {}
        for _ in range(n_keys):
            key = self.string(_MAX_KEY)
            if not key or key in metadata:
                raise _Malformed(f"the key {key[:60]!r} is empty, or there twice")
            begin = self.at
            metadata[key] = self.value(self.integer("<I"), key)
            spans[key] = slice(begin, self.at)
        infos = [self.tensor() for _ in range(n_tensors)]
        return GgufFile(
            self.path,
            self.buffer,
            version,
            magic == _POWERINFER,
            metadata,
            self.located(infos, _alignment(metadata)),
            spans,
        )

    def bytes(self, n: int) -> bytes:
        if n > len(self.buffer) - self.at:
            raise _Malformed(f"it ends within a field of {n:,} bytes at byte {self.at:,}")
        self.at += n
        return self.buffer[self.at - n : self.at]

    def integer(self, code: str) -> int:
        (value,) = struct.unpack(code, self.bytes(struct.calcsize(code)))
        return int(value)

    def string(self, longest: int | None = None) -> str:
        n = self.integer("<Q")
        if longest is not None and n > longest:
            raise _Malformed(f"a name of {n:,} bytes at byte {self.at:,}")
        data = self.bytes(n)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise _Malformed(f"{data[:60]!r} at byte {self.at - n:,} is not UTF-8") from None

    def value(self, kind: int, key: str, nesting: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key, nesting)
        if kind not in _SCALARS:
            raise _Malformed(f"{key[:60]!r} has a value of the unknown type {kind}")
        (value,) = self.scalars(kind, 1, key)
        return bool(value) if kind == _BOOL else value.item()

    def scalars(self, kind: int, n: int, key: str) -> NDArray[Any]:
        dtype = _SCALARS[kind]
        values = np.frombuffer(self.bytes(n * dtype.itemsize), dtype)
        if kind == _BOOL and values.size and values.max() > 1:
            raise _Malformed(f"{key[:60]!r} has a bool that is neither 0 nor 1")
        return values

    def array(self, key: str, nesting: int) -> Any:
        kind, n = self.integer("<I"), self.integer("<Q")
        if n > _MAX_ELEMENTS or nesting == _MAX_NESTING:
            raise _Malformed(f"{key[:60]!r} has an array of {n:,} elements")
        if kind in _SCALARS:
            return self.scalars(kind, n, key)
        if kind == _STRING:
            return self.strings(n)
        return [self.value(kind, key, nesting + 1) for _ in range(n)]

    def strings(self, n: int) -> list[str]:
        """Read an array of strings, such as a vocabulary, ten times as fast as one by one."""
        if n > (len(self.buffer) - self.at) // 8:
            raise _Malformed(f"it ends within an array of {n:,} strings at byte {self.at:,}")
        at, end = self.at, len(self.buffer)
        unpack = struct.Struct("<Q").unpack_from
        found = []
        with memoryview(self.buffer) as buffer:
            for _ in range(n):
                if at + 8 > end:
                    raise _Malformed(f"it ends within an array of strings at byte {at:,}")
                (length,) = unpack(buffer, at)
                begin = at + 8
                at = begin + length
                if at > end:
                    raise _Malformed(f"a string of {length:,} bytes at byte {begin:,}")
                # Some vocabularies have pieces that are no UTF-8. They can never be encoded.
                found.append(str(buffer[begin:at], "utf-8", "replace"))
        self.at = at
        return found

    def tensor(self) -> TensorInfo:
        name = self.string(_MAX_NAME)
        n_dimensions = self.integer("<I")
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            raise _Malformed(f"tensor {name!r} has {n_dimensions} dimensions")
        sizes = [self.integer("<Q") for _ in range(n_dimensions)]
        number = self.integer("<I")
        if not all(0 < size < 1 << 40 for size in sizes) or prod(sizes) >= 1 << 48:
            raise _Malformed(f"tensor {name!r} has the shape {sizes[::-1]}")
        kind = BLOCK_TYPES.get(number) or UNREAD_TYPES.get(number)
        if kind is None:
            raise unread_type(self.path, name, f"GGUF's type {number}")
        if sizes[0] % kind.n_values:
            raise _Malformed(
                f"tensor {name!r} has rows of {sizes[0]} values, no multiple of {kind.n_values}"
            )
        n_bytes = prod(sizes) // kind.n_values * kind.n_bytes
        return TensorInfo(name, kind, tuple(sizes[::-1]), self.integer("<Q"), n_bytes)

    def located(self, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """Return the tensors with their places in the file, none of which overlap."""
        data = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for info in infos:
            if info.name in tensors:
                raise _Malformed(f"tensor {info.name!r} is there twice")
            if info.begin % alignment or data + info.begin + info.n_bytes > len(self.buffer):
                raise _Malformed(
                    f"tensor {info.name!r} would have {info.n_bytes:,} bytes at byte "
                    f"{data + info.begin:,}"
                )
            tensors[info.name] = info._replace(begin=data + info.begin)
        end = 0
        for info in sorted(tensors.values(), key=lambda info: info.begin):
            if info.begin < end:
                raise _Malformed(f"tensor {info.name!r} overlaps another one")
            end = info.begin + info.n_bytes
        return tensors


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if (
        type(alignment) is not int
        or not 0 < alignment <= _MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise _Malformed(f"general.alignment is {alignment!r:.40}, no power of two")
    return alignment
