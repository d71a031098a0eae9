"""SentencePiece's own file, tokenizer.model, as the tokenizer.json that encodes in the same way.

The file is a protocol buffer (sentencepiece_model.proto of github.com/google/sentencepiece). Its
few fields that matter are read here, and nothing of it is executed.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.errors import InvalidCheckpoint, UnsupportedModel, one_line
from hybrid.files import read_bytes

MAX_BYTES = 64 << 20
MAX_PIECES = 2_000_000
MAX_PIECE = 256  # characters; the longest published ones have 64

UNIGRAM, BPE = 1, 2  # TrainerSpec.model_type
_NORMAL, _UNKNOWN, CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # SentencePiece.type

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


class Piece(NamedTuple):
    """A piece of a vocabulary."""

    text: str
    score: float
    kind: int


class SentencePieceModel(NamedTuple):
    """What decides how a vocabulary encodes; fields by their numbers in the protocol buffer."""

    pieces: list[Piece]
    trainer: dict[int, Any]  # by field number
    normalizer: dict[int, Any]


def convert(path: Path, *, adds_bos: bool) -> str:
    """Return the text of a tokenizer.json. Raises InvalidCheckpoint and UnsupportedModel.

    It encodes as SentencePiece does. `adds_bos`: a text begins with BOS if the model has one.
    """
    try:
        data = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: {error.strerror or error}") from error
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", data):
        raise UnsupportedModel(
            f"{path}: not supported: the vocabulary is tiktoken's; hybrid needs a tokenizer.json"
        )
    try:
        model = _read_model(data)
    except (ValueError, IndexError, struct.error) as error:
        raise InvalidCheckpoint(
            f"{path}: not a SentencePiece model ({one_line(error)}); download it again"
        ) from None
    names = {UNIGRAM: "Unigram", BPE: "BPE", 3: "words", 4: "characters"}
    kind = model.trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE) or model.trainer.get(24):
        raise UnsupportedModel(
            f"{path}: not supported: expected Unigram or BPE with spaces before words, found "
            f"{names.get(kind, kind)}"
        )
    if not model.pieces or len({piece.text for piece in model.pieces}) != len(model.pieces):
        raise InvalidCheckpoint(f"{path}: has a piece twice, or none; download it again")
    return json.dumps(layout_of(model, kind, adds_bos=adds_bos), ensure_ascii=False)


def layout_of(model: SentencePieceModel, kind: int, *, adds_bos: bool) -> dict[str, Any]:
    pieces, normalizer = model.pieces, model.normalizer
    has_bytes = bool(model.trainer.get(35, 0))
    has_prefix, joins_spaces = normalizer.get(3, 1), normalizer.get(4, 1)
    normalizers: list[dict[str, Any]] = []
    if normalizer.get(2):
        charsmap = base64.b64encode(normalizer[2]).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if joins_spaces:
        normalizers += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if has_prefix:
        normalizers.append({"type": "Prepend", "prepend": "▁"})
    normalizers.append(_replace({"String": " "}, "▁"))
    whole = [piece.text for piece in pieces if piece.kind == _USER_DEFINED]
    decoders: list[dict[str, Any]] = [_replace({"String": "▁"}, " ")]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    special = [id for id, piece in enumerate(pieces) if piece.kind in (_UNKNOWN, CONTROL)]
    bos = model.trainer.get(41, 1)
    begins = adds_bos and 0 <= bos < len(pieces)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": pieces[id].text, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for id in special
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": _isolating(whole) if whole else None,
        "post_processor": beginning_with(pieces[bos].text, bos) if begins else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(pieces, has_bytes=has_bytes) if kind == BPE else _unigram(pieces, has_bytes),
    }


def _bpe(pieces: list[Piece], *, has_bytes: bool) -> dict[str, Any]:
    """SentencePiece merges the neighbours whose piece has the highest score."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    merges = [
        (left, right)
        for text in sorted(scores, key=scores.__getitem__, reverse=True)
        for at in range(1, len(text))
        if (left := text[:at]) in scores and (right := text[at:]) in scores
    ]
    return {
        "type": "BPE",
        "unk_token": next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None),
        "fuse_unk": True,
        "byte_fallback": has_bytes,
        "ignore_merges": any(piece.kind == _USER_DEFINED for piece in pieces),
        "vocab": {piece.text: id for id, piece in enumerate(pieces)},
        "merges": merges,
    }


def _unigram(pieces: list[Piece], has_bytes: bool) -> dict[str, Any]:
    unknown = next((id for id, piece in enumerate(pieces) if piece.kind == _UNKNOWN), None)
    # Control pieces and unused ones must not be found in a text: no path has such a score.
    usable = (_NORMAL, _USER_DEFINED, _UNKNOWN, _BYTE)
    vocab = [(p.text, p.score if p.kind in usable else -1e9) for p in pieces]
    return {"type": "Unigram", "unk_id": unknown, "byte_fallback": has_bytes, "vocab": vocab}


def _isolating(whole: list[str]) -> dict[str, Any]:
    """Keep user-defined pieces whole, as SentencePiece does."""
    longest_first = sorted(whole, key=len, reverse=True)
    pattern = "|".join(re.escape(text) for text in longest_first)
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def beginning_with(text: str, id: int) -> dict[str, Any]:
    first: dict[str, Any] = {"SpecialToken": {"id": text, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
    }


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _read_model(data: bytes) -> SentencePieceModel:
    """Raises ValueError, IndexError, struct.error."""
    model = SentencePieceModel([], {}, {})
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(_as_bytes(value)))
            (score,) = struct.unpack("<f", _as_bytes(fields.get(2, bytes(4))))
            text = _as_bytes(fields.get(1, b"")).decode("utf-8")
            if len(text) > MAX_PIECE:
                raise ValueError(f"a piece of {len(text):,} characters")
            kind = fields.get(3, _NORMAL)
            if not isinstance(kind, int):
                raise ValueError("a field has another type")
            model.pieces.append(Piece(text, score, kind))
            if len(model.pieces) > MAX_PIECES:
                raise ValueError(f"more than {MAX_PIECES:,} pieces")
        elif number in (2, 3):
            (model.trainer if number == 2 else model.normalizer).update(_fields(_as_bytes(value)))
    if not model.pieces:
        raise ValueError("it has no pieces")
    for fields, numbers in ((model.trainer, (3, 24, 35, 41)), (model.normalizer, (3, 4))):
        if not all(isinstance(fields.get(number, 0), int) for number in numbers):
            raise ValueError("a field has another type")
    _as_bytes(model.normalizer.get(2, b""))
    return model


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has another type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield each field's number and its value: an integer, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if wire == _BYTES:
            n, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            n = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"a field of type {wire}")
        if n > len(data) - at:
            raise ValueError("it ends within a field")
        yield key >> 3, data[at : at + n]
        at += n


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
