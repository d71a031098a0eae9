"""A model's tokenizer as keys of a GGUF file, the inverse of `hybrid.text.gguf_vocabulary`.

GGUF says less than a tokenizer.json: pieces with scores, or merges and the name of a rule that
splits texts into words. What it cannot say exactly is refused. The result is read back and compared
with the original on texts, and on every piece of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.checkpoint.gguf.reader import GgufFile
from hybrid.errors import HybridError, InvalidCheckpoint, UnsupportedModel
from hybrid.exporting.merge_scores import merge_scores, never_made
from hybrid.model.config import ModelConfig
from hybrid.notices import Notices, short_list
from hybrid.text.added_tokens import content_of
from hybrid.text.gguf_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_gguf_tokenizer,
    splitter_name,
)
from hybrid.text.template_files import own_templates
from hybrid.text.tokenizer import Tokenizer
from hybrid.text.vocabulary_file import (
    VocabularyFile,
    read_layout,
    read_settings,
    read_vocabulary,
)

_NORMALIZERS = {"Sequence", "Prepend", "Replace"}  # that only mark spaces
_ADVICE = "export it with --no-tokenizer, or --to hf"
_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? I'LL say: \"Yes!\"\n\n\tNext line.",
    "  two  spaces   and   three\r\nx = [1.5, 2e-10]; # 1234567 $%&*()_+{}|<>?~`^\\/@ \n \n",
    "你好，世界。今天天气怎么样？ Привет, мир! مرحبا ١٢٣ ①② ﬁ naïve café",
    "e\u0301 ½ Ａ\u3000한국어 \u200b\ufeff\xa0 ﷽",
    "🙂👩‍👩‍👧 def f(x):\n    return x**2\n\nvoid g() { i++; }  ",
)


def tokenizer_keys(folder: Path, config: ModelConfig, notices: Notices) -> dict[str, Any]:
    """Return the keys of a folder's tokenizer.

    Raises UnsupportedModel if GGUF cannot say what it does, and InvalidCheckpoint.
    """
    settings, _ = read_settings(folder)
    _, _, layout = read_layout(folder, settings)
    vocabulary = read_vocabulary(folder, settings, config.vocab_size)
    tokenizer = Tokenizer.from_folder(folder, vocab_size=config.vocab_size, bos_id=config.bos_id)
    keys = _pieces(vocabulary, config.vocab_size)
    if layout["model"].get("type", "BPE") != "BPE":
        raise _refused(folder, f"its kind is {layout['model']['type']!r:.40}")
    if layout["model"].get("byte_fallback"):
        keys |= _scores(folder, layout, vocabulary, keys, notices)
    else:
        keys |= _merges(folder, layout)
    keys |= _special(vocabulary, settings, config, tokenizer.bos, notices)
    keys |= _templates(folder, settings)
    _compare(folder, vocabulary, keys, config.vocab_size, notices)
    return keys


def _refused(folder: Path, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"{folder}: GGUF cannot say what its tokenizer does: {why}; {_ADVICE}")


def _pieces(vocabulary: VocabularyFile, size: int) -> dict[str, Any]:
    """Return the pieces by id and their kinds. Ids of the model without a piece get a name."""
    names = [f"[PAD{id}]" for id in range(size)]
    kinds = np.full(size, UNUSED, np.int32)
    for piece, id in vocabulary.pieces.items():
        if id < size:
            names[id], kinds[id] = piece, NORMAL
    for id, token in vocabulary.added.items():
        if id < size:
            kinds[id] = CONTROL if token.special else USER_DEFINED
    if vocabulary.unknown is not None and vocabulary.pieces.get(vocabulary.unknown, size) < size:
        kinds[vocabulary.pieces[vocabulary.unknown]] = UNKNOWN
    return {"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": kinds}


def _merge_list(layout: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [m.split(" ") if isinstance(m, str) else m for m in layout["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def _scores(
    folder: Path,
    layout: dict[str, Any],
    vocabulary: VocabularyFile,
    keys: dict[str, Any],
    notices: Notices,
) -> dict[str, Any]:
    """Return the keys of SentencePiece's BPE."""
    names, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    for byte in range(256):
        id = vocabulary.pieces.get(f"<0x{byte:02X}>")
        if id is None or id >= len(names):
            raise _refused(folder, f"it has no piece <0x{byte:02X}>")
        kinds[id] = BYTE
    normalizers = list(_steps(layout.get("normalizer"), "normalizers"))
    if others := {step.get("type") for step in normalizers} - _NORMALIZERS:
        raise _refused(folder, f"it normalizes texts by {', '.join(map(str, others))}")
    splitters = list(_steps(layout.get("pre_tokenizer"), "pretokenizers"))
    metaspace = next((step for step in splitters if step.get("type") == "Metaspace"), None)
    has_prefix = any(step.get("type") == "Prepend" for step in normalizers)
    if metaspace is not None:
        has_prefix = metaspace.get("prepend_scheme", "always") != "never"
    normal = [names[id] for id in np.flatnonzero(kinds == NORMAL)]
    _refuse_words(folder, vocabulary, splitters, normal)
    scores = merge_scores(_merge_list(layout), normal)
    if strange := never_made(_merge_list(layout), normal):
        notices.add(
            "llama.cpp merges to pieces that this tokenizer never makes, and may read texts with "
            f"them in another way: {short_list(strange)}"
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": np.array([scores.get(name, 0.0) for name in names], np.float32),
        "tokenizer.ggml.add_space_prefix": has_prefix,
    }


def _refuse_words(
    folder: Path, vocabulary: VocabularyFile, splitters: list[Any], normal: Sequence[str]
) -> None:
    """Refuse rules that split a piece: SentencePiece splits nothing. Others change nothing."""
    splitter = vocabulary.library.pre_tokenizer
    if not any(step.get("type") not in ("Sequence", "Metaspace") for step in splitters):
        return
    for piece in normal:
        if len(piece) > 1 and len(splitter.pre_tokenize_str(piece)) > 1:
            raise _refused(folder, f"its pre_tokenizer splits the piece {piece!r:.60}")


def _steps(layout: Any, inner: str) -> list[dict[str, Any]]:
    """Return a normalizer or a pre-tokenizer, and the parts of a sequence of them."""
    if not isinstance(layout, dict):
        return []
    return [layout, *(step for part in layout.get(inner) or [] for step in _steps(part, inner))]


def _merges(folder: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a byte-level BPE."""
    name = splitter_name(layout)
    if name is None:
        raise _refused(folder, "no name of llama.cpp stands for how it splits texts into words")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in _merge_list(layout)],
    }


def _special(
    vocabulary: VocabularyFile,
    settings: dict[str, Any],
    config: ModelConfig,
    bos: tuple[int, ...],
    notices: Notices,
) -> dict[str, Any]:
    """Return the keys of special tokens."""
    ids: dict[str, int | None] = {"bos": bos[0] if bos else config.bos_id}
    ids |= dict(zip(("eos", "eot", "eom"), config.eos_ids, strict=False))
    if len(config.eos_ids) > 3:
        notices.add(
            "GGUF has room for three tokens that end an answer; the others are left out: "
            + ", ".join(map(str, config.eos_ids[3:]))
        )
    named = {"unknown": vocabulary.unknown, "padding": content_of(settings.get("pad_token"))}
    ids |= {key: vocabulary.pieces.get(name) for key, name in named.items() if name}
    return {
        f"tokenizer.ggml.{key}_token_id": id
        for key, id in ids.items()
        if id is not None and id < config.vocab_size
    } | {"tokenizer.ggml.add_bos_token": bool(bos)}


def _templates(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    templates = own_templates(folder, settings)
    keys: dict[str, Any] = {
        f"tokenizer.chat_template.{name}": text
        for name, text in templates.items()
        if name != "default"
    }
    if keys:
        keys["tokenizer.chat_templates"] = [name for name in templates if name != "default"]
    if "default" in templates:
        keys["tokenizer.chat_template"] = templates["default"]
    return keys


def _compare(
    folder: Path, original: VocabularyFile, keys: dict[str, Any], size: int, notices: Notices
) -> None:
    """Raise UnsupportedModel if the keys encode a text in another way than the original does."""
    file = GgufFile(folder, None, 3, False, keys, {})  # type: ignore[arg-type]
    try:
        layout, settings = read_gguf_tokenizer(file)
        result = read_vocabulary(folder / "GGUF", settings, size, layout)
    except HybridError as error:
        raise InvalidCheckpoint(f"{error}; {_ADVICE}") from error
    special = {token.content for token in original.added.values() if token.special}
    kept = [piece.replace("▁", " ") for piece in original.pieces if piece not in special]
    texts = [*_TEXTS, *kept, *(f"a {piece}b" for piece in kept)]
    if (text := _first_difference(original, result, texts)) is not None:
        raise _refused(folder, f"{text!r:.60} would become other tokens")
    between = [f"a {token} b{token}c" for token in special]
    if (text := _first_difference(original, result, between)) is not None:
        notices.add(
            f"the tokenizer in the file reads spaces beside special tokens in another way than "
            f"tokenizer.json, as in {text!r:.60}"
        )


def _first_difference(
    original: VocabularyFile, result: VocabularyFile, texts: Sequence[str]
) -> str | None:
    pairs = zip(
        texts,
        original.library.encode_batch(list(texts), add_special_tokens=False),
        result.library.encode_batch(list(texts), add_special_tokens=False),
        strict=True,
    )
    return next((text for text, left, right in pairs if left.ids != right.ids), None)
