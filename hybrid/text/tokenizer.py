"""Tokenizer: text ↔ token ids, MiniCPM's chat template, and text from a stream of ids.

BPE is the `tokenizers` library's work; decoding is done here, on bytes. The library turns a whole
run of byte tokens into U+FFFD while its last character is incomplete: text already streamed would
change. Here an incomplete character is one U+FFFD; valid UTF-8 decodes as in the library.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import tokenizers

from hybrid.errors import InvalidCheckpoint, InvalidOption, UnsupportedModel

# The layout of a converted SentencePiece vocabulary, as all models that we run have it.
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
_MAX_FILE_BYTES = 64 << 20  # the tokenizers of 250,000 pieces have 20 MB
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")

_USER, _ASSISTANT = "<用户>", "<AI>"
_MARKER_START = re.compile("<(?=用户>|AI>)")
# Stands for the "<" of a marker that a message spells out. Checked text has no lone surrogate.
_ESCAPED = "\ud800"

Role = Literal["system", "user", "assistant"]


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


class Tokenizer:
    """A model's vocabulary and chat template. Immutable, so threads may share it."""

    vocab_size: int
    notices: tuple[str, ...]  # one line each, for the front-end to show
    has_chat_template: bool

    @classmethod
    def from_folder(cls, folder: Path, *, vocab_size: int, bos_id: int | None) -> Tokenizer:
        """Read `tokenizer.json` and, where there is one, the chat template's kind.

        Raises InvalidCheckpoint where a file is missing, broken or has ids that the model lacks,
        UnsupportedModel where it is not BPE with SentencePiece's spaces and byte fallback.
        """
        return cls(folder, vocab_size, bos_id)

    def __init__(self, folder: Path, vocab_size: int, bos_id: int | None) -> None:
        bpe, layout = _load_bpe(folder / "tokenizer.json", vocab_size)
        vocab = bpe.get_vocab()
        self.vocab_size = vocab_size
        self.has_chat_template, self.notices = _find_chat_template(folder, layout, vocab)
        self._bos = [] if bos_id is None else [bos_id]
        self._pieces = _piece_bytes(bpe, vocab, vocab_size)
        self._escaped_id = vocab["<0x3C>"]
        self._bpe = bpe
        self._bpe.encode_special_tokens = True  # "</s>" in a text is four characters, not an id
        self._bpe.no_truncation()
        self._bpe.no_padding()
        # Encodes text that goes on after other text: the same BPE, but no "▁" is put before it.
        self._continuation = tokenizers.Tokenizer(bpe.model)
        self._continuation.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        self._continuation.pre_tokenizer = bpe.pre_tokenizer

    def encode(self, text: str) -> list[int]:
        """BOS, if the model has one, and the text: ordinary tokens only, whatever it spells."""
        checked = _checked_text(text, "text")
        return self._bos + self._bpe.encode(checked, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        """Text that goes on after other text: no BOS, and no space put before it."""
        return self._continuation.encode(_checked_text(text, "text")).ids

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """`<用户>question<AI>answer<用户>question<AI>`: contents stripped, system text first.

        Text without markers encodes as the whole string would. A marker inside a content decodes
        to the same text, but not from the ids of a marker, so a user cannot forge a turn. A last
        message of the assistant is an answer to go on with.
        """
        if not self.has_chat_template:
            raise InvalidOption(
                "no chat template that hybrid knows; it completes text: use generate()"
            )
        first, *rest = _render_chat(messages).split(_ESCAPED)
        ids = self._bos + self._bpe.encode(first, add_special_tokens=False).ids
        return ids + self._encode_escaped(rest)

    def encode_next_message(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The ids that follow an answer of the model: `<用户>question<AI>`, without BOS.

        The answer's own tokens stay as the model wrote them, so a KV cache keeps all of them.
        """
        first, *rest = _render_chat(messages).split(_ESCAPED)
        return self._continuation.encode(first).ids + self._encode_escaped(rest)

    def _encode_escaped(self, parts: Sequence[str]) -> list[int]:
        """Texts that each follow a "<" which begins no marker."""
        ids: list[int] = []
        for part in parts:
            ids.append(self._escaped_id)
            ids += self._continuation.encode(part).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: special tokens skipped, one leading space removed."""
        return self._join(ids).decode("utf-8", errors="replace").removeprefix(" ")

    def continue_text(self, context: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that `tokens` add to that of `context`, as a stream of them gives it."""
        detokenizer = self.stream(context)
        return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.finish()

    def decode_token(self, token: int) -> str:
        """What one token adds to a text, its space included; U+FFFD for a part of a character."""
        return self._join((token,)).decode("utf-8", errors="replace")

    def stream(self, context: Sequence[int]) -> StreamingDetokenizer:
        """A detokenizer for the tokens that follow `context`."""
        return StreamingDetokenizer(self, context)

    def _join(self, ids: Sequence[int]) -> bytes:
        strange = [token for token in ids if not 0 <= token < self.vocab_size]
        if strange:
            raise InvalidOption(f"token id {strange[0]}: expected 0 to {self.vocab_size - 1}")
        return b"".join([self._pieces[token] for token in ids])


class StreamingDetokenizer:
    """Turns tokens into text as they come, never splitting a character.

    All pushes and `finish` together are what `decode(context + tokens)` has beyond the *certain*
    text of the context: its decoded text without a last character that is still incomplete.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        before = tokenizer._join(context)
        self._decoder.decode(before)
        self._is_at_start = not before  # decode() removes the space before a text's first word

    def push(self, token: int) -> str:
        """The text that `token` makes certain; "" while a character is incomplete."""
        return self._emit(self._tokenizer._join((token,)), is_last=False)

    def finish(self) -> str:
        """What is left: U+FFFD for an incomplete character, else ""."""
        return self._emit(b"", is_last=True)

    def _emit(self, piece: bytes, *, is_last: bool) -> str:
        text = self._decoder.decode(piece, is_last)
        if self._is_at_start and text:
            self._is_at_start = False
            text = text.removeprefix(" ")
        return text


def _load_bpe(path: Path, vocab_size: int) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The library's tokenizer and the JSON that it was made from."""
    text = _read_text(path)
    layout = _parse_json(path, text)
    model = layout.get("model")
    if not isinstance(model, dict):
        raise InvalidCheckpoint(f"{path}: expected a tokenizer's model, found {model!r:.40}")
    if (
        model.get("type") != "BPE"
        or not model.get("byte_fallback")
        or model.get("continuing_subword_prefix")
        or layout.get("decoder") != _DECODER
    ):
        raise UnsupportedModel(
            f"{path}: not supported: expected BPE with byte fallback and SentencePiece's decoder, "
            f"found {model.get('type')!r:.40} with decoder {layout.get('decoder')!r:.400}"
        )
    try:
        bpe = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise InvalidCheckpoint(f"{path}: not a tokenizer: {error}; fetch it again") from error
    vocab = bpe.get_vocab()
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        raise InvalidCheckpoint(f"{path}: byte fallback without the piece <0x{missing[0]:02X}>")
    largest = max(vocab, key=vocab.__getitem__)
    if vocab[largest] >= vocab_size:
        raise InvalidCheckpoint(
            f"{path}: piece {largest!r} has id {vocab[largest]}, but the model's ids end at "
            f"{vocab_size - 1}: tokenizer and weights are not of the same model"
        )
    return bpe, layout


def _piece_bytes(bpe: tokenizers.Tokenizer, vocab: dict[str, int], vocab_size: int) -> list[bytes]:
    """What each id adds to a text; b"" for special tokens and ids without a piece."""
    pieces = [b""] * vocab_size
    for piece, token in vocab.items():
        byte = _BYTE_PIECE.fullmatch(piece)
        pieces[token] = bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
    for token, added in bpe.get_added_tokens_decoder().items():
        if added.special:
            pieces[token] = b""
    return pieces


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InvalidCheckpoint(
                f"{path}: has {path.stat().st_size:,} bytes, expected at most {_MAX_FILE_BYTES:,}"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(f"{path}: missing or not text: {error}; fetch it again") from error


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path}: not JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _find_chat_template(
    folder: Path, layout: dict[str, Any], vocab: dict[str, int]
) -> tuple[bool, tuple[str, ...]]:
    """Whether MiniCPM's template applies, and a notice where the model's own one is not used."""
    template = _read_chat_template(folder)
    if template is None:
        is_minicpm = "用户" in vocab
    else:
        is_minicpm = _USER in template and _ASSISTANT in template
    # Without a piece for "<", markers are spelled with the byte that encode_chat escapes with.
    can_escape = "<" in vocab and layout.get("normalizer") == _NORMALIZER
    if is_minicpm and can_escape:
        return True, ()
    if template is None and not is_minicpm:
        return False, ()
    problem = "the chat template is not known to hybrid (it knows MiniCPM's)"
    if is_minicpm:
        problem = "the vocabulary cannot tell the chat template's markers from a user's text"
    return False, (f"{folder.name}: {problem}; text is completed raw, without a template",)


def _read_chat_template(folder: Path) -> str | None:
    """The template's text, only ever searched, never run; None where the model has none."""
    alone = folder / "chat_template.jinja"  # where newer exports put it
    if alone.exists():
        return _read_text(alone)
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    template = _parse_json(path, _read_text(path)).get("chat_template")
    if isinstance(template, list):  # several, each with a name: searched as one
        return json.dumps(template, ensure_ascii=False)
    if template is None or isinstance(template, str):
        return template
    kind = type(template).__name__
    raise InvalidCheckpoint(f"{path}: chat_template: expected a string, found {kind}")


def _checked_text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise InvalidOption(f"{name}: expected a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidOption(
            f"{name}: expected valid Unicode, found the lone surrogate {text[error.start]!a} at "
            f"character {error.start}, which often comes from bytes that are not UTF-8"
        ) from None
    return text


def _render_chat(messages: Sequence[ChatMessage]) -> str:
    """The template's text, with _ESCAPED for the "<" of each marker that a content spells out."""
    checked = [check_message(index, message) for index, message in enumerate(messages)]
    roles = [role for role, _ in checked]
    if "user" not in roles:
        raise InvalidOption("messages: expected at least one of role 'user', found none")
    if "system" in roles[roles.index("user") :]:
        raise InvalidOption(
            "messages: role 'system' must come before the first 'user': the model has no such "
            "role, so later it would read as an answer"
        )

    text = ""
    for is_user, group in groupby(checked, key=lambda entry: entry[0] == "user"):
        contents = [content.strip() for _, content in group]
        if not is_user:
            contents = ["".join(contents)]  # escaped as one: together they may spell a marker
        for content in contents:
            escaped = _MARKER_START.sub(_ESCAPED, content)
            text += f"{_USER}{escaped}{_ASSISTANT}" if is_user else escaped
    return text


def check_message(index: int, message: object) -> tuple[str, str]:
    """Its role and content. Raises InvalidOption."""
    name = f"messages[{index}]"
    if not isinstance(message, dict):
        raise InvalidOption(f"{name}: expected a dict, found {type(message).__name__}")
    role: Any = message.get("role")
    if role not in get_args(Role):
        raise InvalidOption(f"{name}: role: expected one of {get_args(Role)}, found {role!r}")
    return role, _checked_text(message.get("content"), f"{name}: content")
