"""The file of a vocabulary, tokenizer.json or tokenizer.model, opened and checked.

The `tokenizers` library accepts files that cannot be meant: two pieces with one id, pieces that no
merge makes, normalizers that double a text forty times. They are refused here, in one line each.
"""

from __future__ import annotations

import base64
import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from hybrid.checkpoint.foreign import is_gguf
from hybrid.checkpoint.gguf.reader import GgufFile
from hybrid.checkpoint.json_file import parse_object, read_object, read_text
from hybrid.checkpoint.name import model_name
from hybrid.errors import InvalidCheckpoint, UnsupportedModel, one_line
from hybrid.text.added_tokens import add_tokens
from hybrid.text.gguf_vocabulary import read_gguf_tokenizer
from hybrid.text.sentencepiece import convert

_MAX_ADDED = 1000  # characters of an added token
_MAX_NORMALIZERS = 64
_MAX_GROWTH = 64  # how many times as long a normalized text may be


class VocabularyFile(NamedTuple):
    """A checked file, in the library."""

    path: Path
    library: tokenizers.Tokenizer
    pieces: dict[str, int]  # all ids, those of added tokens too
    added: dict[int, tokenizers.AddedToken]
    decoder: Any  # as tokenizer.json has it
    unknown: str | None  # the piece of unknown characters
    notices: tuple[str, ...]


def read_vocabulary(
    folder: Path, settings: dict[str, Any], size: int, layout: dict[str, Any] | None = None
) -> VocabularyFile:
    """Open a model's tokenizer. `settings`: of tokenizer_config.json; `size`: the model's ids.

    `layout` is the tokenizer of a GGUF file. Raises InvalidCheckpoint and UnsupportedModel.
    """
    path, text = folder, ""
    if layout is None:
        path, text, layout = read_layout(folder, settings)
    pieces = _check_layout(path, layout, size)
    library = _open_library(path, text or layout)
    legacy = read_optional(folder / "added_tokens.json")
    notices = add_tokens(folder, library, settings, legacy, size)
    _check_added(path, layout, library)
    added = library.get_added_tokens_decoder()
    pieces = pieces | {token.content: id for id, token in added.items()}
    notices += _check_ids(path, folder, pieces, added, size)
    unknown = _unknown_token(layout)
    return VocabularyFile(path, library, pieces, added, layout.get("decoder"), unknown, notices)


def read_optional(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or {} if there is none. Raises InvalidCheckpoint."""
    return read_object(path, keeps_constants=True) if path.exists() else {}


def read_settings(model: Path | GgufFile) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the content of tokenizer_config.json, or {} if the model has none.

    As in transformers, special_tokens_map.json goes before it if it does not describe its tokens.
    A GGUF file has both in its metadata, and the tokenizer too: the second value is what
    tokenizer.json would hold. Raises InvalidCheckpoint and UnsupportedModel.
    """
    if not isinstance(model, Path) or is_gguf(model):
        with _collector_paused():
            layout, settings = read_gguf_tokenizer(model)
        return settings, layout
    settings = read_optional(model / "tokenizer_config.json")
    if settings.get("added_tokens_decoder") is None:
        settings |= read_optional(model / "special_tokens_map.json")
    return settings, None


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Let Python look for no cyclic garbage, of which a vocabulary has none.

    It would walk over half a million new tuples again and again: a fifth of the time to load.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_layout(folder: Path, settings: dict[str, Any]) -> tuple[Path, str, dict[str, Any]]:
    """Return a tokenizer's file, its text as tokenizer.json has it, and its content.

    Raises InvalidCheckpoint and UnsupportedModel.
    """
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "tokenizer.model").exists():
        path = folder / "tokenizer.model"
        text = convert(path, adds_bos=settings.get("add_bos_token") is not False)
        return path, text, parse_object(path, text)
    text = read_text(path)
    return path, text, parse_object(path, text, keeps_constants=True)


def _open_library(path: Path, source: str | dict[str, Any]) -> tokenizers.Tokenizer:
    """Open a tokenizer.json, or what it would hold."""
    try:
        if isinstance(source, str):
            library = tokenizers.Tokenizer.from_str(source)
        else:
            library = _from_layout(source)
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise InvalidCheckpoint(
            f"{path}: not a tokenizer: {one_line(error)}; download it again"
        ) from None
    library.no_truncation()
    library.no_padding()
    if getattr(library.model, "dropout", None) is not None:
        library.model.dropout = None  # it is for training, and makes encoding random
    return library


def is_library_error(error: BaseException) -> bool:
    """Return whether the `tokenizers` library may have raised an exception.

    It raises nothing more specific than Exception, and its own mistakes are no Exceptions at all.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _from_layout(layout: dict[str, Any]) -> tokenizers.Tokenizer:
    """Make a BPE tokenizer. Its vocabulary is handed over as it is, not as JSON."""
    model = dict(layout["model"])
    vocab, merges, kind = model.pop("vocab"), model.pop("merges"), model.pop("type")
    empty = {**model, "type": kind, "vocab": {}, "merges": []}
    # Without a vocabulary, the library cannot look up the post-processor's tokens, and need not.
    library = tokenizers.Tokenizer.from_str(
        json.dumps({**layout, "model": empty, "added_tokens": []})
    )
    unknown = model.pop("unk_token", None)
    options = model if unknown is None else {**model, "unk_token": unknown}
    library.model = tokenizers.models.BPE(vocab=vocab, merges=merges, **options)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    library.add_tokens(
        [
            tokenizers.AddedToken(token["content"], **{flag: token[flag] for flag in flags})
            for token in layout["added_tokens"]
        ]
    )
    return library


def _check_layout(path: Path, layout: dict[str, Any], size: int) -> dict[str, int]:
    """Return the model's pieces. Raises InvalidCheckpoint and UnsupportedModel."""
    model = layout.get("model")
    if not isinstance(model, dict):
        raise InvalidCheckpoint(f"{path}: expected an object `model`, found {model!r:.40}")
    kind = model.get("type")
    if kind == "WordPiece" or (kind is None and "max_input_chars_per_word" in model):
        raise UnsupportedModel(
            f"{path}: not supported: WordPiece, a tokenizer of encoders such as BERT"
        )
    _check_normalizers(path, layout.get("normalizer"))
    listed = model.get("vocab")
    if isinstance(listed, list):
        entries = [entry for entry in listed if isinstance(entry, list) and entry]
        pieces = {str(entry[0]): id for id, entry in enumerate(entries)}
        if len(pieces) != len(listed):
            raise InvalidCheckpoint(f"{path}: model.vocab has a piece twice, or an empty one")
    elif isinstance(listed, dict) and all(type(id) is int and id >= 0 for id in listed.values()):
        pieces = listed
    else:
        raise InvalidCheckpoint(f"{path}: model.vocab: expected pieces with their ids")
    if not pieces:
        raise InvalidCheckpoint(f"{path}: model.vocab has no pieces")
    if len(set(pieces.values())) != len(pieces):
        owner: dict[int, str] = {}
        for piece, id in pieces.items():
            if owner.setdefault(id, piece) != piece:
                raise InvalidCheckpoint(
                    f"{path}: the pieces {owner[id]!r:.40} and {piece!r:.40} have the same id {id}"
                )
    if len(pieces) > 4 * size + 1000:
        raise InvalidCheckpoint(
            f"{path}: has {len(pieces):,} pieces, but the model has {size:,} ids: the tokenizer "
            "and the weights are of different models"
        )
    is_bpe = kind == "BPE" or (kind is None and "merges" in model)
    if is_bpe and not model.get("merges") and not model.get("ignore_merges"):
        long = next((p for p in pieces if len(p) > 1 and not re.fullmatch("<.*>", p)), None)
        if long is not None:
            raise InvalidCheckpoint(
                f"{path}: has no merges, so pieces such as {long!r:.40} could never be used; "
                "download it again"
            )
    return pieces


def _check_normalizers(path: Path, normalizer: Any) -> None:
    """Refuse normalizers that could make a text so long that it does not fit in memory."""
    growth, left, n = 1.0, [normalizer], 0
    while left:
        step = left.pop()
        if not isinstance(step, dict):
            continue
        n += 1
        inner = step.get("normalizers")
        left += inner if isinstance(inner, list) else []
        content = str(step.get("content", step.get("prepend", "")))
        pattern = step.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        replaced = replaced if isinstance(replaced, str) else None
        if step.get("type") == "Replace":  # a regular expression may match between characters
            growth *= max(1.0, len(content) / len(replaced) if replaced else 1 + len(content))
        if n > _MAX_NORMALIZERS:
            raise InvalidCheckpoint(f"{path}: has more than {_MAX_NORMALIZERS} normalizers")
        if step.get("type") == "Precompiled":
            _check_charsmap(path, step.get("precompiled_charsmap"))
        if growth > _MAX_GROWTH or len(content) > _MAX_GROWTH:
            raise InvalidCheckpoint(
                f"{path}: its normalizers could make a text more than {_MAX_GROWTH} times as long"
            )


def _check_charsmap(path: Path, text: Any) -> None:
    """Refuse a map of characters that ends within its trie, which the library does not survive."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        data = b""
    n = int.from_bytes(data[:4], "little")
    if not 0 < n <= len(data) - 4 or n % 4:
        raise InvalidCheckpoint(f"{path}: precompiled_charsmap is broken; download it again")


def _check_added(path: Path, layout: dict[str, Any], library: tokenizers.Tokenizer) -> None:
    """The library gives a token another id if its own is taken."""
    longest = max((len(t.content) for t in library.get_added_tokens_decoder().values()), default=0)
    if longest > _MAX_ADDED:
        raise InvalidCheckpoint(f"{path}: has an added token of {longest:,} characters")
    listed = layout.get("added_tokens")
    for token in listed if isinstance(listed, list) else []:
        id = library.token_to_id(token["content"])
        if id != token["id"]:
            raise InvalidCheckpoint(
                f"{path}: the added token {token['content']!r:.60} has id {token['id']}, but the "
                f"vocabulary gives it {id}; download it again"
            )


def _check_ids(
    path: Path, folder: Path, vocab: dict[str, int], added: dict[int, Any], size: int
) -> tuple[str, ...]:
    """Return a notice of special tokens that the model has no embedding of."""
    special = {token.content for token in added.values() if token.special}
    beyond = {piece: token for piece, token in vocab.items() if token >= size}
    for piece, token in beyond.items():
        if piece not in special:
            raise InvalidCheckpoint(
                f"{path}: piece {piece!r} has id {token}, but the model's ids end at {size - 1}: "
                "the tokenizer and the weights are of different models"
            )
    if not beyond:
        return ()  # such as <pad>: no text becomes a special token, and the model cannot write it
    names = ", ".join(f"{piece!r} (id {token})" for piece, token in beyond.items())
    return (f"{model_name(folder)}: the model has no embedding of {names:.200}",)


def _unknown_token(layout: dict[str, Any]) -> str | None:
    """Return the piece of unknown characters."""
    model = layout["model"]
    if isinstance(model.get("unk_token"), str):
        return str(model["unk_token"])
    id, listed = model.get("unk_id"), model["vocab"]
    if isinstance(id, int) and isinstance(listed, list) and 0 <= id < len(listed):
        return str(listed[id][0])
    return None
