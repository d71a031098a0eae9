"""What each token adds to a text, as bytes.

Texts are decoded here, on bytes, and not by the `tokenizers` library. If the last character of a
run of byte tokens is incomplete, the library decodes the whole run as U+FFFD. Text that was already
streamed would then change. Here only the incomplete character becomes one U+FFFD. Valid UTF-8
decodes as in the library, which a sample of the vocabulary is compared with.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from hybrid.errors import InvalidCheckpoint, UnsupportedModel

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
_SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_SENTENCEPIECE = [_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]
N_SAMPLES = 100  # sequences of tokens that are compared with the library


class Decoding:
    """How ids become text. A token's bytes are found when they are first needed."""

    drops_space: bool  # a text has one leading space less than its pieces
    byte_ids: tuple[int, ...] | None  # the token of each byte; None: not every byte has one

    def __init__(
        self,
        names: Sequence[str | None],
        bytes_of: Callable[[str], bytes],
        *,
        drops_space: bool = False,
        byte_ids: tuple[int, ...] | None = None,
    ) -> None:
        """`names` has the piece of each id; None for special tokens and unused ids."""
        self._names, self._bytes_of = names, bytes_of
        self._pieces: list[bytes | None] = [None] * len(names)
        self.drops_space, self.byte_ids = drops_space, byte_ids

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; b"" for special tokens and unused ids."""
        piece = self._pieces[token]
        if piece is None:
            name = self._names[token]
            piece = self._pieces[token] = b"" if name is None else self._bytes_of(name)
        return piece

    def text_of(self, data: bytes) -> str:
        """Return the text of joined pieces from its start; U+FFFD for incomplete characters."""
        text = data.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.drops_space else text


def read_decoding(
    path: Path, library: tokenizers.Tokenizer, decoder: Any, vocab: dict[str, int], vocab_size: int
) -> Decoding:
    """Return what the tokens of a vocabulary add to a text.

    `decoder` is what the tokenizer's file at `path` says, `vocab` has the added tokens, too. Raises
    UnsupportedModel if a token's text depends on the tokens around it, and InvalidCheckpoint if
    byte fallback lacks a byte.
    """
    names: list[str | None] = [None] * vocab_size
    for piece, token in vocab.items():
        if token < vocab_size:
            names[token] = piece
    for token, added in library.get_added_tokens_decoder().items():
        if added.special and token < vocab_size:
            names[token] = None
    steps = _steps(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        decoding = _byte_level(names, vocab)
    elif steps[:3] == _SENTENCEPIECE and steps[3:] in ([], [_STRIP]):
        byte_ids = _fallback_ids(path, vocab)
        decoding = Decoding(
            names, _sentencepiece_bytes, drops_space=len(steps) == 4, byte_ids=byte_ids
        )
    else:
        byte_ids = _fallback_ids(path, vocab) if "ByteFallback" in kinds else None
        decoding = _by_trial(path, library, names, byte_ids)
    _compare(path, library, decoding, vocab_size)
    return decoding


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


class _ByteOfCharacter(dict[int, str]):
    """For `str.translate`: byte-level BPE's characters for bytes, as GPT-2 defined them.

    Bytes that are printable in Latin-1 stand for themselves. The others have U+0100 and following.
    """

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        super().__init__({byte: chr(byte) for byte in printable})
        self.update({0x100 + n: chr(byte) for n, byte in enumerate(others)})

    def __missing__(self, character: int) -> str:
        return "\uffff"  # which Latin-1 lacks


def _byte_level(names: list[str | None], vocab: dict[str, int]) -> Decoding:
    characters = _ByteOfCharacter()

    def bytes_of(piece: str) -> bytes:
        try:
            return piece.translate(characters).encode("latin-1")
        except UnicodeEncodeError:  # an added token with a character of another kind
            return piece.encode()

    character = {ord(byte): chr(code) for code, byte in characters.items()}
    byte_ids = _ids([character[byte] for byte in range(256)], vocab)
    return Decoding(names, bytes_of, byte_ids=byte_ids)


def _sentencepiece_bytes(piece: str) -> bytes:
    return _byte_of(piece) or piece.replace("▁", " ").encode()


def _by_trial(
    path: Path,
    library: tokenizers.Tokenizer,
    names: list[str | None],
    byte_ids: tuple[int, ...] | None,
) -> Decoding:
    """Let the library decode each piece behind another one, and alone."""
    decode = _library_decoder(library)
    pieces = [piece for piece in names if piece is not None]
    base = next((piece for piece in pieces if decode([piece]).strip() == piece), None)
    if base is None:
        raise _unsupported(path, "it changes every token")
    texts, drops_space = {}, False
    for piece in pieces:
        byte = None if byte_ids is None else _byte_of(piece)
        if byte is None:
            whole = decode([base, piece])
            if not whole.startswith(base):
                raise _unsupported(path, f"{piece!r:.40} changes the token before it")
            byte = whole[len(base) :].encode()
            drops_space |= byte.startswith(b" ") and not decode([piece]).startswith(" ")
        texts[piece] = byte
    return Decoding(names, texts.__getitem__, drops_space=drops_space, byte_ids=byte_ids)


def _library_decoder(library: tokenizers.Tokenizer) -> Callable[[list[str]], str]:
    decoder = library.decoder
    if decoder is None:
        return " ".join  # as the library does
    decode: Callable[[list[str]], str] = decoder.decode
    return decode


def _byte_of(piece: str) -> bytes | None:
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(match[1]) if match else None


def _fallback_ids(path: Path, vocab: dict[str, int]) -> tuple[int, ...] | None:
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    missing = [name for name in names if name not in vocab]
    if 0 < len(missing) < 256:
        raise InvalidCheckpoint(f"{path}: byte fallback lacks the piece {missing[0]}")
    return _ids(names, vocab)


def _ids(pieces: list[str], vocab: Mapping[str, int]) -> tuple[int, ...] | None:
    if not all(piece in vocab for piece in pieces):
        return None
    return tuple(vocab[piece] for piece in pieces)


def _compare(
    path: Path, library: tokenizers.Tokenizer, decoding: Decoding, vocab_size: int
) -> None:
    """Compare random sequences of tokens with the library."""
    draw = random.Random(1)
    for _ in range(N_SAMPLES):
        ids = [draw.randrange(vocab_size) for _ in range(draw.randint(1, 9))]
        ids = [token for token in ids if decoding.piece(token)]
        # Decoders differ in how many spaces of a first token they drop.
        while ids and decoding.piece(ids[0]).startswith(b" "):
            ids.pop(0)
        ids += ids[-1:] * draw.randrange(2)  # some decoders drop what comes twice
        expected = library.decode(ids, skip_special_tokens=True)
        found = decoding.text_of(b"".join(map(decoding.piece, ids)))
        if found != expected and "\ufffd" not in expected:
            raise _unsupported(path, f"{ids} are {expected!r:.40}, expected {found!r:.40}")


def _unsupported(path: Path, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path}: not supported: its decoder does not give each token a text of its own: {why}"
    )
