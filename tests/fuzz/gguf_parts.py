"""A sound GGUF file in parts that can be removed, repeated and exchanged."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class Section(NamedTuple):
    """A key with its value, or a tensor's entry."""

    name: bytes
    rest: bytes

    def content(self) -> bytes:
        return struct.pack("<Q", len(self.name)) + self.name + self.rest


@dataclass
class GgufParts:
    head: bytes  # magic and version
    keys: list[Section]
    tensors: list[Section]
    data: bytes
    counts: tuple[int, int] | None = None  # of tensors and keys; None: the true ones

    @classmethod
    def of(cls, content: bytes) -> GgufParts:
        n_tensors, n_keys = struct.unpack_from("<QQ", content, 8)
        at = 24
        keys, tensors = [], []
        for _ in range(n_keys):
            name, begin = _string(content, at)
            at = _after_value(content, begin)
            keys.append(Section(name, content[begin:at]))
        for _ in range(n_tensors):
            name, begin = _string(content, at)
            (n,) = struct.unpack_from("<I", content, begin)
            at = begin + 4 + 8 * n + 12
            tensors.append(Section(name, content[begin:at]))
        return cls(content[:8], keys, tensors, content[at + -at % 32 :])

    def content(self) -> bytes:
        counts = self.counts or (len(self.tensors), len(self.keys))
        sections = b"".join(section.content() for section in [*self.keys, *self.tensors])
        head = self.head + struct.pack("<QQ", *counts) + sections
        return head + bytes(-len(head) % 32) + self.data


def _string(content: bytes, at: int) -> tuple[bytes, int]:
    (n,) = struct.unpack_from("<Q", content, at)
    return content[at + 8 : at + 8 + n], at + 8 + n


def _after_value(content: bytes, at: int) -> int:
    (kind,) = struct.unpack_from("<I", content, at)
    at += 4
    if kind == _STRING:
        return _string(content, at)[1]
    if kind != _ARRAY:
        return at + int(_SIZES[kind])
    element, n = struct.unpack_from("<IQ", content, at)
    at += 12
    if element != _STRING:
        return at + int(_SIZES[element]) * int(n)
    for _ in range(n):
        at = _string(content, at)[1]
    return at
