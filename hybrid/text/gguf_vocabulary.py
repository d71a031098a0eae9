"""The tokenizer in a GGUF file, as the tokenizer.json and tokenizer_config.json of the same model.

The keys are llama.cpp's (`tokenizer.ggml.…`). A file holds the pieces and how they merge, but not
the rules that split a text into words. It only names them (`tokenizer.ggml.pre`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hybrid.checkpoint.gguf.architecture import special_token
from hybrid.checkpoint.gguf.reader import GgufFile, read_gguf
from hybrid.errors import InvalidCheckpoint, UnsupportedModel
from hybrid.text.sentencepiece import (
    BPE,
    MAX_PIECE,
    Piece,
    SentencePieceModel,
    beginning_with,
    layout_of,
)

_MAX_LISTED_PIECE = 1024  # characters, where merges are listed; Command-R has 512 spaces
# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# How the authors of models split texts into words, as their tokenizer.json files say.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MINICPM_5 = (r"\p{N}{1,3}", _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}+"))
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT_2: list[dict[str, Any]] = [_BYTES | {"use_regex": True}]
_DIGITS: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}, *_GPT_2]


def _by_regex(*patterns: str) -> list[dict[str, Any]]:
    """Split at what a pattern matches, and what is left or matched at the next one."""
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return [*splits, _BYTES | {"use_regex": False}]


# What llama.cpp does where a converter knew no better (src/llama-vocab.cpp): punctuation, the words
# of GPT-2, and digits by three.
_DEFAULT = (
    r"[\p{P}$+<=>^~|]+",
    r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    r"[0-9]{3}",
)

_SPLITTERS: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _by_regex(_LLAMA_3)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _by_regex(_LLAMA_3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _by_regex(_QWEN_2)),
    "minicpm5": _by_regex(*_MINICPM_5),
    "default": _by_regex(*_DEFAULT),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _GPT_2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
}
# Of these a text begins with BOS, unless the file says otherwise.
_AS_LLAMA_3 = ("llama3", "llama-v3", "llama-bpe", "falcon3")
_WHOLE = (*_AS_LLAMA_3, "minicpm5")  # of these a whole word that is a piece is taken as it is
_COMPOSED = ("qwen2", "deepseek-r1-qwen")  # whose texts are normalized to NFC


def read_gguf_tokenizer(source: Path | GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a tokenizer.json and of a tokenizer_config.json.

    Raises InvalidCheckpoint and UnsupportedModel.
    """
    file = read_gguf(source) if isinstance(source, Path) else source
    path = file.path
    pieces = _strings(file, "tokenizer.ggml.tokens")
    model = file.single("tokenizer.ggml.model")
    longest = max(map(len, pieces))
    if longest > (_MAX_LISTED_PIECE if model == "gpt2" else MAX_PIECE):
        raise InvalidCheckpoint(f"{path}: has a piece of {longest:,} characters")
    numbers = _numbers(file, "tokenizer.ggml.token_type", len(pieces), NORMAL)
    if numbers.dtype.kind not in "iu":
        raise InvalidCheckpoint(f"{path}: tokenizer.ggml.token_type: expected integers")
    kinds = numbers.tolist()
    if model == "llama":
        layout = _sentencepiece(file, pieces, kinds)
    elif model == "gpt2":
        layout = _byte_level(file, pieces, kinds)
    else:
        raise UnsupportedModel(
            f"{path}: not supported: a tokenizer of kind {model!r:.60}; expected llama or gpt2"
        )
    return layout, _settings(file, pieces)


def _sentencepiece(file: GgufFile, pieces: list[str], kinds: list[int]) -> dict[str, Any]:
    numbers = _numbers(file, "tokenizer.ggml.scores", len(pieces), 0.0)
    if not np.isfinite(numbers).all():
        raise InvalidCheckpoint(f"{file.path}: tokenizer.ggml.scores: expected finite numbers")
    scores = numbers.tolist()
    listed = [Piece(*entry) for entry in zip(pieces, scores, kinds, strict=True)]
    if len(set(pieces)) != len(pieces):
        raise InvalidCheckpoint(f"{file.path}: tokenizer.ggml.tokens has a piece twice")
    charsmap = file.metadata.get("tokenizer.ggml.precompiled_charsmap")
    if charsmap is not None and not isinstance(charsmap, np.ndarray):
        raise InvalidCheckpoint(f"{file.path}: tokenizer.ggml.precompiled_charsmap: no bytes")
    bos = special_token(file, "bos", len(pieces))
    normalizer = {
        2: b"" if charsmap is None else np.asarray(charsmap).astype(np.uint8).tobytes(),
        3: _flag(file, "add_space_prefix", default=True),
        4: _flag(file, "remove_extra_whitespaces", default=False),
    }
    trainer = {35: int(BYTE in kinds), 41: -1 if bos is None else bos}
    spm = SentencePieceModel(listed, trainer, normalizer)
    return layout_of(spm, BPE, adds_bos=_flag(file, "add_bos_token", default=True))


def _byte_level(file: GgufFile, pieces: list[str], kinds: list[int]) -> dict[str, Any]:
    name = file.single("tokenizer.ggml.pre")
    if name not in _SPLITTERS:
        raise UnsupportedModel(
            f"{file.path}: not supported: texts are split into words by the rules of {name!r:.60} "
            f"(tokenizer.ggml.pre), which hybrid does not know; it knows {', '.join(_SPLITTERS)}"
        )
    merges = [merge.partition(" ")[::2] for merge in _strings(file, "tokenizer.ggml.merges")]
    if not all(right and " " not in right for _, right in merges):
        raise InvalidCheckpoint(f"{file.path}: tokenizer.ggml.merges: expected pairs of pieces")
    added = [
        {"id": id, "content": pieces[id], "special": kinds[id] in (UNKNOWN, CONTROL)}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for id in range(len(pieces))
        if kinds[id] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    bos = special_token(file, "bos", len(pieces))
    adds_bos = _flag(file, "add_bos_token", default=name in _AS_LLAMA_3)
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if name in _COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITTERS[name]},
        "post_processor": None if bos is None or not adds_bos else beginning_with(pieces[bos], bos),
        "decoder": _BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": name in _WHOLE,
            "vocab": _vocab(file, pieces),
            "merges": merges,
        },
    }


def splitter_name(layout: dict[str, Any]) -> str | None:
    """Return a name (`tokenizer.ggml.pre`) for how a byte-level tokenizer.json splits texts.

    None: there is no name for it.
    """
    normalizer, splitter = layout.get("normalizer"), layout.get("pre_tokenizer") or {}
    steps = [_plain(step) for step in splitter.get("pretokenizers", [splitter])]
    for name, known in _SPLITTERS.items():
        same_words = [_plain(step) for step in known] == steps
        same_merges = bool(layout["model"].get("ignore_merges")) == (name in _AS_LLAMA_3)
        composes = {"type": "NFC"} if name in _COMPOSED else None
        if same_words and same_merges and composes == normalizer:
            return name
    return None


def _plain(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step without what concerns only the offsets of tokens."""
    defaults = {"use_regex": True} if step.get("type") == "ByteLevel" else {}
    return defaults | {key: value for key, value in step.items() if key != "trim_offsets"}


def _vocab(file: GgufFile, pieces: list[str]) -> dict[str, int]:
    vocab = {piece: id for id, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise InvalidCheckpoint(f"{file.path}: tokenizer.ggml.tokens has a piece twice")
    return vocab


def _settings(file: GgufFile, pieces: list[str]) -> dict[str, Any]:
    """Return the names of special tokens, and the chat templates."""
    settings: dict[str, Any] = {}
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for key, name in names.items():
        id = special_token(file, key, len(pieces))
        if id is not None:
            settings[f"{name}_token"] = pieces[id]
    templates = {}
    for key, value in file.metadata.items():
        if key == "tokenizer.chat_template" and isinstance(value, str):
            templates["default"] = value
        elif key.startswith("tokenizer.chat_template.") and isinstance(value, str):
            templates[key.removeprefix("tokenizer.chat_template.")] = value
    if templates:
        entries = [{"name": name, "template": text} for name, text in templates.items()]
        settings["chat_template"] = entries
    return settings


def _flag(file: GgufFile, name: str, *, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise InvalidCheckpoint(f"{file.path}: tokenizer.ggml.{name}: expected true or false")
    return value


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.metadata.get(key)
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise InvalidCheckpoint(f"{file.path}: {key}: expected an array of strings")
    return values


def _numbers(file: GgufFile, key: str, n: int, default: float) -> Any:
    values = file.metadata.get(key)
    if values is None:
        return np.full(n, default)
    if not isinstance(values, np.ndarray) or len(values) != n:
        raise InvalidCheckpoint(f"{file.path}: {key}: expected {n:,} numbers, one for each piece")
    return values
