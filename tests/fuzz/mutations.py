"""Damage to files: bytes of any file, and what a format's structure is made of."""

from __future__ import annotations

import copy
import io
import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz.gguf_parts import GgufParts

NUMBERS = (0, 1, -1, 2, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63)
_NUMBERS = (*NUMBERS, 2**63 - 1, 2**64 - 1, 2**64 - 2**16)
TEXTS = (
    *("", "\0", "\ud800", "ﷺ" * 40, "▁" * 300, "a" * 10_000, "<s>", "../../x", "/dev/zero", "\n"),
    *("{{ '9' * 10**9 }}", "{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ x.__class__ }}"),
    *("{% if", "{{ messages[0].content * 9999999 }}", "{{ 9 ** 9 ** 9 }}", "{{ raise_exception }}"),
    *("{{ messages | tojson(indent=999999999) }}", "{{ '%999999999d' % 1 }}", "(" * 999, "(a+)+$"),
    *("(?:a{999}){999}", "[", r"\p{L}{99999}", "F8_E4M3", "I64", "fatrelu", "model.norm.weight"),
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{%- for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), 2**31),
    *(2**63, 2**64, 10**400, [], {}, [[]], [None], {"": 0}, [0] * 1000, *TEXTS),
)
_DEEP = "@deep@"  # a place at which a text of JSON is nested deeply


def damaged(files: dict[str, bytes], draw: Random) -> dict[str, bytes]:
    """Return the files with one of them damaged. The same `draw` gives the same damage."""
    name = draw.choice(sorted(files))
    content = files[name]
    if draw.random() < 0.03:
        content = draw.choice((b"", content[:8])) + draw.randbytes(draw.choice((1, 50, 3000)))
        return files | {name: content}
    if draw.random() < 0.75:
        content = _damaged_structure(name, content, draw)
    if draw.random() < 0.35:
        content = damaged_bytes(content, draw)
    return files | {name: content}


def _damaged_structure(name: str, content: bytes, draw: Random) -> bytes:
    try:
        return _STRUCTURES.get(name.rpartition(".")[2], damaged_bytes)(content, draw)
    except Exception:  # it has no structure any more, since it was damaged before
        return damaged_bytes(content, draw)


def damaged_bytes(content: bytes, draw: Random) -> bytes:
    """Change bytes anywhere, most of them near the beginning or the end."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at = _place(len(data), draw)
        n = min(draw.choice((1, 2, 4, 8, 30, 500)), len(data) - at)
        kind = draw.randrange(8)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + n] = draw.randbytes(n)
        elif kind == 2:
            size = draw.choice((1, 2, 4, 8))
            data[at : at + size] = integer(size, draw)
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + n]
        elif kind == 5:
            data[at:at] = data[at : at + n]
        elif kind == 6:
            other = _place(len(data), draw)
            data[at : at + n] = data[other : other + n]
        else:
            data[at:at] = draw.choice(TEXTS).encode(errors="replace")
    return bytes(data)


def integer(size: int, draw: Random) -> bytes:
    """Return a number of `size` bytes that a reader may not expect."""
    value = draw.choice(_NUMBERS) + draw.choice((0, 0, 0, 1, -1))
    return (value % (1 << 8 * size)).to_bytes(size, "little")


def _place(n: int, draw: Random) -> int:
    share = draw.random() ** draw.choice((1, 4, 8))
    return int((share if draw.random() < 0.8 else 1 - share) * max(0, n - 1))


def damaged_gguf(content: bytes, draw: Random) -> bytes:
    parts = GgufParts.of(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        kind = draw.randrange(7)
        sections = draw.choice((parts.keys, parts.keys, parts.tensors))
        if not sections:
            continue
        at, other = draw.randrange(len(sections)), draw.randrange(len(sections))
        if kind == 0:
            sections.insert(at, sections[other])
        elif kind == 1:
            del sections[at]
        elif kind == 2:
            sections[at], sections[other] = sections[other], sections[at]
        elif kind == 3:  # the name of one, the rest of another
            sections[at] = sections[at]._replace(rest=sections[other].rest)
        elif kind == 4:
            sections[at] = sections[at]._replace(name=draw.choice(TEXTS).encode(errors="replace"))
        elif kind == 5:
            sections[at] = sections[at]._replace(rest=_damaged_rest(sections[at].rest, draw))
        else:
            key = draw.randrange(len(parts.keys)) if parts.keys else 0
            if key < len(parts.keys):
                parts.keys[key] = parts.keys[key]._replace(rest=_other_value(draw))
    if draw.random() < 0.1:
        parts.counts = draw.choice(_NUMBERS) % 2**64, draw.choice((0, 1, 2**63, len(parts.keys)))
    return parts.content()


def _damaged_rest(rest: bytes, draw: Random) -> bytes:
    """Change a field of a value, or of a tensor's shape, type and offset."""
    size = draw.choice((4, 8))
    at = draw.choice((0, 4, 8, 12, 16, 20, 24, _place(len(rest), draw)))
    return rest[:at] + integer(size, draw) + rest[at + size :]


def _other_value(draw: Random) -> bytes:
    """Return the bytes of a value of any type, behind its type."""
    kind = draw.choice((0, 1, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12))
    if kind == 8:
        text = draw.choice(TEXTS).encode(errors="replace")
        return struct.pack("<IQ", 8, len(text)) + text
    if kind == 9:
        n = draw.choice((0, 1, 3, 300))
        element = draw.choice((0, 4, 5, 6, 8))
        item = bytes(8) if element == 8 else integer(1 if element == 0 else 4, draw)
        return struct.pack("<IIQ", 9, element, n) + item * n
    if kind in (6, 12):
        value = draw.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
        return struct.pack("<I" + ("f" if kind == 6 else "d"), kind, value)
    size = {0: 1, 1: 1, 4: 4, 5: 4, 7: 1, 10: 8, 11: 8}[kind]
    return struct.pack("<I", kind) + integer(size, draw)


def damaged_json(content: bytes, draw: Random) -> bytes:
    value = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        value = _damaged_value(value, draw)
    text = json.dumps(value)
    if _DEEP in text:
        n = draw.choice((10, 900, 100_000))
        text = text.replace(f'"{_DEEP}"', "[" * n + "]" * n)
    elif draw.random() < 0.05:  # a name twice
        text = re.sub(r'("\w+": )', r"\g<1>1, \g<1>", text, count=1)
    return text.encode()


def _damaged_value(value: Any, draw: Random) -> Any:
    """Go down from a value, at random, and change what is there."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.02:
        return _DEEP if draw.random() < 0.02 else copy.deepcopy(draw.choice(VALUES))
    is_object = isinstance(value, dict)
    keys = list(value) if is_object else range(len(value))
    key = draw.choice(keys)
    kind = draw.randrange(12)
    if kind == 0:
        del value[key]
    elif kind == 1:
        value[key] = copy.deepcopy(value[draw.choice(keys)])
    elif kind == 2 and is_object:
        value[draw.choice(TEXTS)] = value.pop(key)
    elif kind == 2:
        value.insert(key, copy.deepcopy(value[key]))
    elif kind == 3:
        value[key] = copy.deepcopy(draw.choice(VALUES))
    elif isinstance(value[key], int) and draw.random() < 0.5:
        value[key] = draw.choice(_NUMBERS)
    else:
        value[key] = _damaged_value(value[key], draw)
    return value


def damaged_safetensors(content: bytes, draw: Random) -> bytes:
    n = int.from_bytes(content[:8], "little")
    if draw.random() < 0.1:
        return integer(8, draw) + content[8:]
    header = damaged_json(content[8 : 8 + n], draw)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + n :]


def damaged_torch(content: bytes, draw: Random) -> bytes:
    if draw.random() < 0.3:
        return _damaged_directory(content, draw)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    members = [
        (name, _damaged_pickle(data, draw) if name.endswith(".pkl") else data)
        for name, data in members
    ]
    if draw.random() < 0.2:
        at = draw.randrange(len(members))
        name = draw.choice((*TEXTS[2:6], members[0][0], "x/data.pkl")).encode(errors="replace")
        members[at] = name.decode(), draw.choice((members[at][1], b"", b"big"))
    packed = io.BytesIO()
    compression = draw.choice((*[zipfile.ZIP_STORED] * 9, zipfile.ZIP_DEFLATED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a name that is there twice
        with zipfile.ZipFile(packed, "w", compression) as archive:
            for name, data in members:
                archive.writestr(name or "_", data)
    return packed.getvalue()


def _damaged_directory(content: bytes, draw: Random) -> bytes:
    """Change a field of a zip file's directory, its end, or the header before a member."""
    data = bytearray(content)
    signature = draw.choice((b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04", b"PK\x06\x06"))
    places = [found.start() for found in re.finditer(re.escape(signature), content)]
    if places:
        at = draw.choice(places) + draw.randrange(4, 46, 2)
        size = draw.choice((2, 4, 8))
        data[at : at + size] = integer(size, draw)
    return bytes(data)


def _damaged_pickle(content: bytes, draw: Random) -> bytes:
    """Remove, repeat, exchange and replace operations."""
    places = [place for _, _, place in pickletools.genops(content) if place is not None]
    operations = [content[a:b] for a, b in zip(places, [*places[1:], len(content)], strict=True)]
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, other = draw.randrange(len(operations)), draw.randrange(len(operations))
        kind = draw.randrange(6)
        if kind == 0 and len(operations) > 1:
            del operations[at]
        elif kind == 1:
            operations[at:at] = [operations[other]] * draw.choice((1, 2, 1000))
        elif kind == 2:
            operations[at], operations[other] = operations[other], operations[at]
        elif kind == 3:
            operations[at] = operations[at][:1] + integer(max(1, len(operations[at]) - 1), draw)
        elif kind == 4:
            operations[at] = draw.choice(_OPERATIONS)
        else:
            operations[at] = damaged_bytes(operations[at], draw)
    return b"".join(operations)


_OPERATIONS = (
    *(b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\0", b"M\xff\xff", b"K\0", b"N", b"\x88"),
    *(b")", b"}", b"]", b"(", b"t", b"\x85", b"\x86", b"\x87", b"s", b"u", b"e", b"a", b"R", b"Q"),
    *(b"b", b"cos\nsystem\n", b"ctorch\nFloatStorage\n", b"h\0", b"q\0", b"\x94", b"\x93", b"."),
    *(b"G" + struct.pack(">d", float("nan")), b"X\x02\0\0\0ab", b"X\x03\0\0\0\xed\xa0\x80", b"0"),
)
_STRUCTURES: dict[str, Callable[[bytes, Random], bytes]] = {
    "gguf": damaged_gguf,
    "json": damaged_json,
    "safetensors": damaged_safetensors,
    "bin": damaged_torch,
}
