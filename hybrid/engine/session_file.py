"""Session files: the tokens of a sequence, with their keys and values.

A file is safetensors. Its header says what computed the keys and values, and follows from these
facts alone. So a sound file begins with the header that would be written for them today.
docs/formats.md describes the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hybrid.engine.loading.model_spec import ModelSpec
from hybrid.errors import ContextOverflow, InvalidArtifact, one_line
from hybrid.files import open_file, replacing
from hybrid.kernels import Session, _native, active_isa
from hybrid.weights.packed_file import safetensors_header
from predictors.schema import Malformed, field_of, integer, parse_json, record, text

VERSION = 1  # a new one makes every file stale: also if kernels compute other keys or values
_METADATA = "hybrid_session"
_MAX_HEADER_BYTES = 1 << 14
_PART = 64  # positions that are read or written at once
_DTYPES = {"fp16": "F16", "bf16": "BF16"}  # of safetensors
_SIZES = ("n_layers", "n_kv_heads", "head_dim")

_ABOUT = record(
    {
        "version": integer(),
        **dict.fromkeys(("model_hash", "order_hash", "quant", "kv", "predictor", "isa"), text(200)),
        **dict.fromkeys(_SIZES, integer(1, 1 << 20)),
        "n_tokens": integer(0, 1 << 31),
    }
)
# What each fact is, and what to do if the engine's is another; {} stands for the file's.
_FACTS = {
    "model_hash": ("model", "open it with that model"),
    "order_hash": ("order of neurons", "load the model with the profile that it had then"),
    "quant": ("weight format", "load the model with quant {}"),
    "kv": ("format of the KV cache", "load the model with kv {}"),
    "predictor": ("predictor", "load the model with that predictor"),
    "isa": ("instruction set", "set HYBRID_ISA={} if this CPU has it"),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """What decides the bits of a session's keys and values, beside its tokens."""

    spec: ModelSpec
    ignores_predictor: bool = False

    def about(self) -> dict[str, Any]:
        """Return the facts that a file states.

        Raises InvalidCheckpoint or InvalidArtifact if the files of the model or of its predictor
        are no longer those that were loaded.
        """
        spec = self.spec
        prediction = None if self.ignores_predictor else spec.prediction
        return {
            "version": VERSION,
            "model_hash": spec.model_hash,
            "order_hash": spec.order_hash,
            "quant": spec.format.name,
            "kv": spec.kv.name,
            "predictor": "exact" if prediction is None else prediction.identity(),
            "isa": active_isa(),
            **{name: getattr(spec.config, name) for name in _SIZES},
        }


def write_session(path: Path, origin: Origin, tokens: Sequence[int], native: Session) -> None:
    """Write the file, or replace it. Raises OSError, and the errors of `Origin.about`."""
    header, n_bytes = _header(origin.about() | {"n_tokens": len(tokens)})
    with replacing(path, n_bytes) as file:
        crc = 0
        for part in _parts(header, tokens, native):
            crc = _native.crc32(part, crc)
            file.write(part.data)
        file.write(np.array(crc, "<u4").tobytes())


def _parts(header: bytes, tokens: Sequence[int], native: Session) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a file up to its checksum."""
    yield np.frombuffer(header, np.uint8)
    yield np.array(tokens, "<i4").view(np.uint8)
    for first in range(0, len(tokens), _PART):
        kv = native.read_kv(first, min(first + _PART, len(tokens)))
        yield kv.reshape(-1).view(np.uint8)


def read_session(path: Path, origin: Origin, native: Session) -> list[int]:
    """Fill a new native session from its file, and return its tokens.

    Raises ContextOverflow, and InvalidArtifact if the file is no session, was computed otherwise
    than this session computes, or is damaged. Damage of keys and values is found at the end: then
    the session must not be used. Raises the errors of `Origin.about`.
    """
    expected = origin.about()
    try:
        with open_file(path) as file:
            return _Reader(path, file).read(expected, native)
    except OSError as error:
        raise InvalidArtifact(f"{path}: cannot be read: {error.strerror or error}") from error


class _Reader:
    """An open file, and the checksum of what has been read of it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._crc = path, file, 0

    def read(self, expected: dict[str, Any], native: Session) -> list[int]:
        n, vocab_size = self._read_header(expected, native.n_context), native.logits.size
        tokens = self._take(4 * n).view("<i4")
        if n and (tokens.min() < 0 or tokens.max() >= vocab_size):
            raise self._damaged("it has tokens that the model does not have")
        shape = *(expected[name] for name in _SIZES[:2]), 2, expected["head_dim"]
        for first in range(0, n, _PART):
            kv = self._take(2 * min(_PART, n - first) * math.prod(shape))
            native.append_kv(kv.view("<u2").reshape(-1, *shape))
        crc = self._crc
        if self._take(4).view("<u4")[0] != crc:
            raise self._damaged("its checksum differs")
        return [int(token) for token in tokens]

    def _read_header(self, expected: dict[str, Any], n_context: int) -> int:
        """Return the number of tokens, after every check but that of the checksum."""
        path, header = self._path, self._take_header()
        about = self._about_of(header)
        for name, mine in expected.items():
            if about[name] != mine:
                raise InvalidArtifact(f"{path}: {_difference(name, about[name], mine)}")
        sound, n_bytes = _header(about)
        if header != sound:
            raise self._damaged("its header is not that of a session")
        found = os.fstat(self._file.fileno()).st_size
        if found != n_bytes:
            raise self._damaged(f"expected {n_bytes:,} bytes, found {found:,}")
        if about["n_tokens"] > n_context:
            raise ContextOverflow(
                f"{path}: holds {about['n_tokens']} tokens, the context holds {n_context}; choose "
                "a larger context_size"
            )
        return int(about["n_tokens"])

    def _take_header(self) -> bytes:
        start = self._take(8).tobytes()
        n = int.from_bytes(start, "little")
        if n > _MAX_HEADER_BYTES:
            raise self._foreign()
        return start + self._take(n).tobytes()

    def _about_of(self, header: bytes) -> dict[str, Any]:
        try:
            metadata = field_of(field_of(parse_json(header[8:]), "__metadata__"), _METADATA)
            if not isinstance(metadata, str):
                raise self._foreign()
            about = parse_json(metadata)
            if field_of(about, "version") != VERSION:
                raise InvalidArtifact(
                    f"{self._path}: expected a session of version {VERSION}, found "
                    f"{field_of(about, 'version')!r:.20}; begin a new one"
                )
            return dict(_ABOUT(about))
        except Malformed as error:
            raise self._damaged(str(error)) from error

    def _take(self, n: int) -> NDArray[np.uint8]:
        """Read the next bytes. Raises InvalidArtifact if there are fewer."""
        part = np.frombuffer(self._file.read(n), np.uint8)
        if part.size < n:
            raise self._damaged("it is cut off")
        self._crc = _native.crc32(part, self._crc)
        return part

    def _damaged(self, why: str) -> InvalidArtifact:
        return InvalidArtifact(f"{self._path}: is no session or is broken ({why}); begin a new one")

    def _foreign(self) -> InvalidArtifact:
        return InvalidArtifact(
            f"{self._path}: is not a session that hybrid saved; name another file"
        )


def _difference(name: str, theirs: object, mine: object) -> str:
    what, advice = _FACTS.get(name, (name, "open it with that model"))
    shown = one_line(theirs, 40)
    return (
        f"was saved with another {what}: {shown}, this engine has {one_line(mine, 40)}; "
        f"{advice.format(shown)}, or begin a new session"
    )


def _header(about: dict[str, Any]) -> tuple[bytes, int]:
    """Return a file's first bytes, and the size of the whole file."""
    n = about["n_tokens"]
    shape = [n, about["n_layers"], about["n_kv_heads"], 2, about["head_dim"]]
    tensors = {
        "tokens": ("I32", [n], 4 * n),
        "kv": (_DTYPES.get(about["kv"], ""), shape, 2 * math.prod(shape)),
        "checksum": ("U32", [1], 4),
    }
    entries: dict[str, object] = {"__metadata__": {_METADATA: json.dumps(about)}}
    end = 0
    for name, (dtype, sizes, n_bytes) in tensors.items():
        offsets = [end, end + n_bytes]
        entries[name] = {"dtype": dtype, "shape": sizes, "data_offsets": offsets}
        end += n_bytes
    header = safetensors_header(entries)
    return header, len(header) + end
