"""Tokenizer: converts text to token ids and back, streams text, applies MiniCPM's chat template.

The `tokenizers` library does the BPE. Decoding is done here, on bytes. If the last character of a
run of byte tokens is incomplete, the library decodes the whole run as U+FFFD. Text that was already
streamed would then change. Here only the incomplete character becomes one U+FFFD. Valid UTF-8
decodes as in the library.
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
from hybrid.files import read_bytes

# The layout of a converted SentencePiece vocabulary, which all supported models have.
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
_MAX_FILE_BYTES = 64 << 20  # a tokenizer of 250,000 pieces has 20 MB
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")

_USER, _ASSISTANT = "<用户>", "<AI>"
_MARKER_START = re.compile("<(?=用户>|AI>)")
# Replaces the "<" of a marker that a message contains. Checked text has no lone surrogate.
_ESCAPED = "\ud800"

Role = Literal["system", "user", "assistant"]


class ChatMessage(TypedDict):
    """One message of a conversation."""

    role: Role
    content: str


class Tokenizer:
    """A model's vocabulary and chat template. Immutable, so threads may share it."""

    vocab_size: int
    notices: tuple[str, ...]  # one line each; front-ends show them
    has_chat_template: bool

    @classmethod
    def from_folder(cls, folder: Path, *, vocab_size: int, bos_id: int | None) -> Tokenizer:
        """Read `tokenizer.json`, and the kind of the chat template if there is one.

        Raises InvalidCheckpoint if a file is missing, broken or has ids that the model lacks.
        Raises UnsupportedModel if it is not BPE with SentencePiece's spaces and byte fallback.
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
        # Encodes text that follows other text: the same BPE, but it puts no "▁" before the text.
        self._continuation = tokenizers.Tokenizer(bpe.model)
        self._continuation.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        self._continuation.pre_tokenizer = bpe.pre_tokenizer

    def encode(self, text: str) -> list[int]:
        """Return BOS, if the model has one, and the text's tokens.

        The text becomes ordinary tokens only, even if it contains the name of a special token.
        """
        checked = _checked_text(text, "text")
        return self._bos + self._bpe.encode(checked, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of text that follows other text, without BOS or a leading space."""
        return self._continuation.encode(_checked_text(text, "text")).ids

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of `<用户>question<AI>answer<用户>question<AI>`.

        Contents are stripped, and system text comes first. Text without markers has the same ids as
        the whole string. A marker inside a content gets other ids that decode to the same text, so
        a user cannot forge a message. If the last message is the assistant's, the model continues
        it.

        Raises InvalidOption if the model has no known chat template, or for invalid messages.
        """
        if not self.has_chat_template:
            raise InvalidOption(
                "the model has no chat template that hybrid knows; use generate() to complete text"
            )
        first, *rest = _render_chat(messages).split(_ESCAPED)
        ids = self._bos + self._bpe.encode(first, add_special_tokens=False).ids
        return ids + self._encode_escaped(rest)

    def encode_next_message(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids that follow an answer of the model: `<用户>question<AI>`, without BOS.

        The answer's own tokens stay as the model generated them, so the KV cache keeps all of them.
        """
        first, *rest = _render_chat(messages).split(_ESCAPED)
        return self._continuation.encode(first).ids + self._encode_escaped(rest)

    def _encode_escaped(self, parts: Sequence[str]) -> list[int]:
        """Encode texts, each with a "<" before it that does not begin a marker."""
        ids: list[int] = []
        for part in parts:
            ids.append(self._escaped_id)
            ids += self._continuation.encode(part).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without special tokens and without one leading space."""
        return self._join(ids).decode("utf-8", errors="replace").removeprefix(" ")

    def continue_text(self, context: Sequence[int], tokens: Sequence[int]) -> str:
        """Return the text that `tokens` add to that of `context`, as streaming them gives it."""
        detokenizer = self.stream(context)
        return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.finish()

    def decode_token(self, token: int) -> str:
        """Return what one token adds to a text, with its space; U+FFFD for part of a character."""
        return self._join((token,)).decode("utf-8", errors="replace")

    def stream(self, context: Sequence[int]) -> StreamingDetokenizer:
        """Return a detokenizer for the tokens that follow `context`."""
        return StreamingDetokenizer(self, context)

    def _join(self, ids: Sequence[int]) -> bytes:
        strange = [token for token in ids if not 0 <= token < self.vocab_size]
        if strange:
            raise InvalidOption(f"token id {strange[0]}: expected 0 to {self.vocab_size - 1}")
        return b"".join([self._pieces[token] for token in ids])


class StreamingDetokenizer:
    """Converts tokens into text one by one, and never splits a character.

    All pushes and `finish` together give what `decode(context + tokens)` has beyond the *certain*
    text of the context. That is the context's text without a last character that is incomplete.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        before = tokenizer._join(context)
        self._decoder.decode(before)
        self._is_at_start = not before  # decode() removes the space before a text's first word

    def push(self, token: int) -> str:
        """Return the text that `token` makes certain; "" while a character is incomplete."""
        return self._emit(self._tokenizer._join((token,)), is_last=False)

    def finish(self) -> str:
        """Return what is left: U+FFFD for an incomplete character, else ""."""
        return self._emit(b"", is_last=True)

    def _emit(self, piece: bytes, *, is_last: bool) -> str:
        text = self._decoder.decode(piece, is_last)
        if self._is_at_start and text:
            self._is_at_start = False
            text = text.removeprefix(" ")
        return text


def _load_bpe(path: Path, vocab_size: int) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the library's tokenizer and the JSON that it was made from."""
    text = _read_text(path)
    layout = _parse_json(path, text)
    model = layout.get("model")
    if not isinstance(model, dict):
        raise InvalidCheckpoint(f"{path}: expected an object `model`, found {model!r:.40}")
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
        raise InvalidCheckpoint(f"{path}: not a tokenizer: {error}; download it again") from error
    vocab = bpe.get_vocab()
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        raise InvalidCheckpoint(f"{path}: byte fallback lacks the piece <0x{missing[0]:02X}>")
    largest = max(vocab, key=vocab.__getitem__)
    if vocab[largest] >= vocab_size:
        raise InvalidCheckpoint(
            f"{path}: piece {largest!r} has id {vocab[largest]}, but the model's ids end at "
            f"{vocab_size - 1}: the tokenizer and the weights are of different models"
        )
    return bpe, layout


def _piece_bytes(bpe: tokenizers.Tokenizer, vocab: dict[str, int], vocab_size: int) -> list[bytes]:
    """Return the bytes that each id adds to a text; b"" for special tokens and unused ids."""
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
        text = read_bytes(path, _MAX_FILE_BYTES).decode("utf-8")
        return text.replace("\r\n", "\n").replace("\r", "\n")  # as files are read in text mode
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(
            f"{path}: missing or not text: {error}; download it again"
        ) from error


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path}: not JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _find_chat_template(
    folder: Path, layout: dict[str, Any], vocab: dict[str, int]
) -> tuple[bool, tuple[str, ...]]:
    """Return whether MiniCPM's template applies, and a notice if the model's own is not used."""
    template = _read_chat_template(folder)
    if template is None:
        is_minicpm = "用户" in vocab
    else:
        is_minicpm = _USER in template and _ASSISTANT in template
    # Without a piece for "<", real markers would use the same byte token as escaped ones.
    can_escape = "<" in vocab and layout.get("normalizer") == _NORMALIZER
    if is_minicpm and can_escape:
        return True, ()
    if template is None and not is_minicpm:
        return False, ()
    problem = "hybrid does not know the chat template (it knows MiniCPM's)"
    if is_minicpm:
        problem = "the vocabulary cannot tell the chat template's markers from a user's text"
    return False, (f"{folder.name}: {problem}; text is completed raw, without a template",)


def _read_chat_template(folder: Path) -> str | None:
    """Return the template's text, or None if the model has none. It is searched, but never run."""
    alone = folder / "chat_template.jinja"  # newer exports put it there
    if alone.exists():
        return _read_text(alone)
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    template = _parse_json(path, _read_text(path)).get("chat_template")
    if isinstance(template, list):  # several templates, each with a name: search them as one text
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
    """Return the chat's text, with _ESCAPED for the "<" of each marker inside a content."""
    checked = [check_message(index, message) for index, message in enumerate(messages)]
    roles = [role for role, _ in checked]
    if "user" not in roles:
        raise InvalidOption("messages: expected at least one with role 'user', found none")
    if "system" in roles[roles.index("user") :]:
        raise InvalidOption(
            "messages: role 'system' must come before the first 'user': the model has no such "
            "role, so a later one would read as an answer"
        )

    text = ""
    for is_user, group in groupby(checked, key=lambda entry: entry[0] == "user"):
        contents = [content.strip() for _, content in group]
        if not is_user:
            contents = ["".join(contents)]  # escape them joined: together they may form a marker
        for content in contents:
            escaped = _MARKER_START.sub(_ESCAPED, content)
            text += f"{_USER}{escaped}{_ASSISTANT}" if is_user else escaped
    return text


def check_message(index: int, message: object) -> tuple[str, str]:
    """Return a message's role and content. Raises InvalidOption if it is not a valid message."""
    name = f"messages[{index}]"
    if not isinstance(message, dict):
        raise InvalidOption(f"{name}: expected a dict, found {type(message).__name__}")
    role: Any = message.get("role")
    if role not in get_args(Role):
        raise InvalidOption(f"{name}: role: expected one of {get_args(Role)}, found {role!r}")
    return role, _checked_text(message.get("content"), f"{name}: content")
