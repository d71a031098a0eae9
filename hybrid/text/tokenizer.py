"""Tokenizer: converts text to token ids and back, streams text, applies MiniCPM's chat template.

The `tokenizers` library encodes: its normalizer, added tokens, pre-tokenizer and BPE apply to every
text. Decoding is done here, on bytes. If the last character of a run of byte tokens is incomplete,
the library decodes the whole run as U+FFFD. Text that was already streamed would then change. Here
only the incomplete character becomes one U+FFFD. Valid UTF-8 decodes as in the library.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import tokenizers

from hybrid.checkpoint.json_file import parse_object, read_object, read_text
from hybrid.checkpoint.name import model_name
from hybrid.errors import InvalidCheckpoint, InvalidOption, UnsupportedModel
from hybrid.text.added_tokens import add_tokens
from hybrid.text.bos import BosWishes, choose_bos

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
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
# Characters of Unicode's private use area. Vocabularies have no pieces with them, so the library
# encodes one of them as bytes, which join nothing that follows.
_PRIVATE_CHARACTERS = tuple(map(chr, range(0xE000, 0xE010)))

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
    bos: tuple[int, ...]  # what `encode` puts before a text
    empty_text: tuple[int, ...]  # what stands for an empty text; () if the model names no BOS
    notices: tuple[str, ...]  # one line each; front-ends show them
    has_chat_template: bool

    @classmethod
    def from_folder(
        cls, folder: Path, *, vocab_size: int, bos_id: int | None, add_bos: bool | None = None
    ) -> Tokenizer:
        """Read `tokenizer.json`, and the other files of a tokenizer that the folder has.

        `bos_id` is that of the config. `add_bos` says whether a text begins with BOS. If it is
        None, the post-processor in tokenizer.json decides, as in transformers 5.

        Raises InvalidCheckpoint if a file is missing, broken or has ids that the model lacks, and
        InvalidOption if `add_bos` is true and the model has no BOS. Raises UnsupportedModel if the
        folder has only `tokenizer.model`, or if the tokenizer is not BPE with SentencePiece's
        spaces and byte fallback.
        """
        return cls(folder, vocab_size, bos_id, add_bos)

    def __init__(
        self, folder: Path, vocab_size: int, bos_id: int | None, add_bos: bool | None
    ) -> None:
        settings = _read_settings(folder)
        bpe, layout, vocab, notices = _load_bpe(folder, settings, vocab_size)
        self.vocab_size = vocab_size
        bos = choose_bos(folder, bpe, vocab_size, BosWishes(bos_id, settings, add_bos))
        self.bos, self.empty_text = bos.ids, bos.empty_text
        template = _read_chat_template(folder, settings)
        self.has_chat_template, more = _find_chat_template(folder, template, layout, vocab)
        self.notices = (*notices, *bos.notices, *more)
        self._pieces = _piece_bytes(bpe, vocab, vocab_size)
        self._escaped_id = vocab["<0x3C>"]
        self._bpe = bpe
        self._before = self._find_text_before(folder, vocab)
        self._n_before = len(self._encode(self._before))

    def encode(self, text: str) -> list[int]:
        """Return BOS, if the model's texts begin with it, and the text's tokens.

        The text becomes ordinary tokens only, even if it contains the name of a special token.
        """
        return [*self.bos, *self._encode(_checked_text(text, "text"))]

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of text that follows other text, without BOS or a leading space."""
        return self._encode_after(_checked_text(text, "text"))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_after(self, text: str) -> list[int]:
        """Return the tokens that `text` has after other text."""
        return self._encode(self._before + text)[self._n_before :]

    def _find_text_before(self, folder: Path, vocab: dict[str, int]) -> str:
        """Return a text after which the library encodes any text as in the middle of one.

        Normalizers and pre-tokenizers of many kinds put a space before a text. So a text that
        follows other text is encoded behind a character that joins nothing, and that character's
        tokens are removed. "" if the library puts nothing before a text.
        """
        if self._join(self._encode("a")) == b"a":
            return ""
        joined = "".join([piece for piece in vocab if not _BYTE_PIECE.fullmatch(piece)])
        for character in _PRIVATE_CHARACTERS:
            last_byte = f"<0x{character.encode()[-1]:02X}>"
            alone, followed = self._encode(character), self._encode(character + "a")
            if (
                character not in joined
                and last_byte not in joined
                and followed[: len(alone)] == alone
                and self._join(followed[len(alone) :]) == b"a"
            ):
                return character
        raise UnsupportedModel(
            f"{folder / 'tokenizer.json'}: not supported: it puts something before every text, and "
            "hybrid finds no way to encode a text that follows another without that"
        )

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
        return [*self.bos, *self._encode(first), *self._encode_escaped(rest)]

    def encode_next_message(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids that follow an answer of the model: `<用户>question<AI>`, without BOS.

        The answer's own tokens stay as the model generated them, so the KV cache keeps all of them.
        """
        first, *rest = _render_chat(messages).split(_ESCAPED)
        return self._encode_after(first) + self._encode_escaped(rest)

    def _encode_escaped(self, parts: Sequence[str]) -> list[int]:
        """Encode texts, each with a "<" before it that does not begin a marker."""
        ids: list[int] = []
        for part in parts:
            ids.append(self._escaped_id)
            ids += self._encode_after(part)
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


class _Library(NamedTuple):
    """The library's tokenizer of a file."""

    bpe: tokenizers.Tokenizer
    layout: dict[str, Any]  # the file's content
    vocab: dict[str, int]
    notices: tuple[str, ...]


def _load_bpe(folder: Path, settings: dict[str, Any], vocab_size: int) -> _Library:
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "tokenizer.model").exists():
        raise UnsupportedModel(
            f"{model_name(folder)}: has a tokenizer.model, but no tokenizer.json, which hybrid "
            "needs; in a local copy of the model, write it once, with transformers and "
            "sentencepiece: AutoTokenizer.from_pretrained('.').save_pretrained('.')"
        )
    text = read_text(path)
    layout = parse_object(path, text, keeps_constants=True)
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
    notices = add_tokens(
        folder, bpe, settings, _read_optional(folder / "added_tokens.json"), vocab_size
    )
    bpe.encode_special_tokens = True  # "</s>" in a text is four characters, not an id
    bpe.no_truncation()
    bpe.no_padding()
    vocab = bpe.get_vocab()
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        raise InvalidCheckpoint(f"{path}: byte fallback lacks the piece <0x{missing[0]:02X}>")
    special = {token.content for token in bpe.get_added_tokens_decoder().values() if token.special}
    beyond = {piece: token for piece, token in vocab.items() if token >= vocab_size}
    for piece, token in beyond.items():
        if piece not in special:
            raise InvalidCheckpoint(
                f"{path}: piece {piece!r} has id {token}, but the model's ids end at "
                f"{vocab_size - 1}: the tokenizer and the weights are of different models"
            )
    if beyond:  # such as <pad>: no text becomes a special token, and the model cannot write these
        names = ", ".join(f"{piece!r} (id {token})" for piece, token in beyond.items())
        notices += (f"{model_name(folder)}: the model has no embedding of {names:.200}",)
    return _Library(bpe, layout, vocab, notices)


def _piece_bytes(bpe: tokenizers.Tokenizer, vocab: dict[str, int], vocab_size: int) -> list[bytes]:
    """Return the bytes that each id adds to a text; b"" for special tokens and unused ids."""
    pieces = [b""] * vocab_size
    for piece, token in vocab.items():
        if token >= vocab_size:
            continue
        byte = _BYTE_PIECE.fullmatch(piece)
        pieces[token] = bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
    for token, added in bpe.get_added_tokens_decoder().items():
        if added.special and token < vocab_size:
            pieces[token] = b""
    return pieces


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, or {} if the model has none.

    As in transformers, special_tokens_map.json goes before it if it does not describe its tokens.
    """
    settings = _read_optional(folder / "tokenizer_config.json")
    if settings.get("added_tokens_decoder") is None:
        settings |= _read_optional(folder / "special_tokens_map.json")
    return settings


def _read_optional(path: Path) -> dict[str, Any]:
    return read_object(path, keeps_constants=True) if path.exists() else {}


def _find_chat_template(
    folder: Path, template: str | None, layout: dict[str, Any], vocab: dict[str, int]
) -> tuple[bool, tuple[str, ...]]:
    """Return whether MiniCPM's template applies, and a notice if the model's own is not used."""
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
    return False, (f"{model_name(folder)}: {problem}; text is completed raw, without a template",)


def _read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Return the template's text, or None if the model has none. It is searched, but never run."""
    alone = folder / "chat_template.jinja"  # newer exports put it there
    if alone.exists():
        return read_text(alone)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates, each with a name: search them as one text
        return json.dumps(template, ensure_ascii=False)
    if template is None or isinstance(template, str):
        return template
    path, kind = folder / "tokenizer_config.json", type(template).__name__
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
