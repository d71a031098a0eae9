"""Writes a GGUF file (github.com/ggml-org/ggml, docs/gguf.md): metadata, then tensors in parts."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint.gguf.blocks import BlockType
from hybrid.exporting.encoding import NUMBERS, Bytes
from hybrid.exporting.writing import Meter
from hybrid.files import replacing

LLAMA_CPP, POWERINFER = b"GGUF", b"PWRI"
_VERSION, _ALIGNMENT = 3, 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class FileTensor(Protocol):
    """What a file needs to know of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> BlockType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def n_bytes(self) -> int: ...
    def parts(self) -> Iterator[Bytes]: ...


def write_gguf(
    path: Path,
    magic: bytes,
    metadata: Mapping[str, Any],
    tensors: Sequence[FileTensor],
    meter: Meter,
) -> None:
    """Write a file, or replace it when it is complete.

    Values of `metadata` are bool, int, float, str, lists of str, arrays of int32 or float32, and
    bytes: a value with its type, as another file has it. Raises OSError, and what reading raises.
    """
    header = _header(magic, metadata, tensors)
    total = len(header) + sum(map(_padded, (tensor.n_bytes for tensor in tensors)))
    with replacing(path, total) as file:
        file.write(header)
        for tensor in tensors:
            n = 0
            for part in tensor.parts():
                n += file.write(np.ascontiguousarray(part).data)
                meter.add(part.nbytes)
            assert n == tensor.n_bytes
            file.write(bytes(_padded(n) - n))


def _header(magic: bytes, metadata: Mapping[str, Any], tensors: Sequence[FileTensor]) -> bytes:
    parts = [magic, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    begin = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        parts.append(struct.pack("<IQ", NUMBERS[tensor.type.name], begin))
        begin += _padded(prod(sizes) // tensor.type.n_values * tensor.type.n_bytes)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Return a value with the number of its type before it."""
    match value:
        case bytes():
            return value
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
        case list():
            head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
            return head + b"".join(map(_string, value))
        case _:
            return _array(value)


def _array(values: NDArray[Any]) -> bytes:
    kind = {"i": _INT32, "f": _FLOAT32}[values.dtype.kind]
    data = values.astype("<i4" if kind == _INT32 else "<f4")
    return struct.pack("<IIQ", _ARRAY, kind, len(values)) + data.tobytes()
