"""Vocabularies of every kind, trained in the tests, and texts to compare them on."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from tiny_models import STORIES, added_token
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROOT = Path(__file__).parents[2]

# Regular expressions that the models' authors publish.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")

SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<|end|>"]
ORDINARY = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


MIXED = "naïve café 🙂👩‍👩‍👧 ﷽ 你好，世界。今天天气怎么样？ Привет, мир! ١٢٣ ①② ﬁ\r\n\t  x=1;\n"


@functools.cache
def training() -> list[str]:
    """Return what vocabularies are trained on: the same on every machine and at every commit."""
    story = (ROOT / "tests" / "data" / "held_out_story.txt").read_text(encoding="utf-8")
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return [*story.splitlines(), *licence.splitlines(), *[MIXED] * 5]


@functools.cache
def texts() -> tuple[str, ...]:
    """Texts of several languages and kinds; more of them where the shared data is."""
    found = [(ROOT / "README.md").read_text(encoding="utf-8")]
    found.append((ROOT / "tests" / "data" / "held_out_story.txt").read_text(encoding="utf-8"))
    found.append((ROOT / "hybrid" / "run.py").read_text(encoding="utf-8"))
    found.append(MIXED * 20)
    folder = SHARED / "text"
    paths = [*sorted(folder.glob("*.txt")), *sorted((folder / "calibration").glob("*.txt"))]
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as file:
            found.append(file.read(1 << 20))
    return tuple(found)


def windows(n: int, seed: int = 0) -> list[str]:
    """Return random parts of the texts, which may begin and end within a word."""
    draw = random.Random(seed)
    parts = []
    for _ in range(n):
        text = draw.choice(texts())
        at, length = draw.randrange(len(text)), draw.choice((1, 5, 40, 200, 600))
        parts.append(text[at : at + length])
    return parts


@functools.cache
def kinds_of_text() -> tuple[str, ...]:
    """Return the shared data's English, Chinese and code, and emoji: plain and joined ones."""
    folder = SHARED / "text"
    names = ("fairytales.txt", "chinese_mengxue.txt", "calibration/code.txt")
    draw = random.Random(0)
    pictures = [
        *map(chr, range(0x1F300, 0x1F650)),
        "👩\u200d👩\u200d👧",
        "👍🏽",
        "🇨🇳",
        "☺\ufe0f",
        " ",
    ]
    emoji = "".join(draw.choices(pictures, k=10_000))
    return *[(folder / name).read_text(encoding="utf-8") for name in names], emoji


def mixed_windows(n: int) -> list[str]:
    """Return texts that each join parts of one to four of these kinds."""
    draw = random.Random(1)
    found = []
    for _ in range(n):
        parts = []
        for text in draw.sample(kinds_of_text(), draw.randint(1, 4)):
            at, length = draw.randrange(len(text)), draw.choice((5, 40, 200))
            parts.append(text[at : at + length])
        found.append(draw.choice(("", " ", "\n")).join(parts))
    return found


def byte_level(kind: str) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE: gpt-2, llama-3, qwen-2 or smollm-2."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-3"))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in ("llama-3", "qwen-2"):
        pattern = Regex(LLAMA_3 if kind == "llama-3" else QWEN_2)
        split = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind == "smollm-2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        split = pre_tokenizers.Sequence([digits, split])
    if kind == "qwen-2":
        library.normalizer = normalizers.NFC()
    if kind == "prefix":
        split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.pre_tokenizer = split
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    library.train_from_iterator(training(), trainer)
    layout: dict[str, Any] = json.loads(library.to_str())
    return layout


def unigram(*, has_bytes: bool) -> dict[str, Any]:
    """Return the tokenizer.json of a Unigram vocabulary, as T5's or with byte fallback."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if has_bytes else []
    trainer = trainers.UnigramTrainer(
        vocab_size=1200, special_tokens=SPECIAL + pieces, unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(training(), trainer)
    layout: dict[str, Any] = json.loads(library.to_str())
    layout["added_tokens"] = [t for t in layout["added_tokens"] if t["content"] in SPECIAL]
    if has_bytes:
        layout["model"]["byte_fallback"] = True
        spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        steps = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
        layout["decoder"] = {"type": "Sequence", "decoders": steps}
    return layout


def characters(kind: str) -> dict[str, Any]:
    """Return the tokenizer.json of a vocabulary of single characters: BPE or WordLevel."""
    letters = sorted({*"".join(training())} - {"☂"})
    vocab = {piece: id for id, piece in enumerate([*SPECIAL, *letters])}
    if kind == "BPE":
        library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    else:
        library = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    library.decoder = decoders.Fuse()
    library.add_special_tokens(SPECIAL)
    layout: dict[str, Any] = json.loads(library.to_str())
    return layout


def sentencepiece_bpe(**changes: Any) -> dict[str, Any]:
    """Return the bundled tokenizer.json with changes."""
    layout: dict[str, Any] = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    return layout | changes


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
LAYOUTS = {
    "bundled": sentencepiece_bpe,
    "Metaspace": lambda: sentencepiece_bpe(
        normalizer=None, pre_tokenizer=METASPACE | {"prepend_scheme": "first"}
    ),
    "gpt-2": lambda: byte_level("gpt-2"),
    "llama-3": lambda: byte_level("llama-3"),
    "qwen-2": lambda: byte_level("qwen-2"),
    "smollm-2": lambda: byte_level("smollm-2"),
    "prefix": lambda: byte_level("prefix"),
    "Unigram": lambda: unigram(has_bytes=False),
    "Unigram with bytes": lambda: unigram(has_bytes=True),
    "characters, BPE": lambda: characters("BPE"),
    "characters, WordLevel": lambda: characters("WordLevel"),
}
BYTE_LEVEL = ("gpt-2", "llama-3", "qwen-2", "smollm-2", "prefix")
LOSSY = ("Unigram", "characters, BPE", "characters, WordLevel")  # no bytes for unknown characters


@functools.cache
def layout_of(name: str) -> str:
    """Return a layout as the text of a tokenizer.json."""
    return json.dumps(LAYOUTS[name](), ensure_ascii=False)


def n_ids(layout: dict[str, Any]) -> int:
    ids = [token["id"] for token in layout["added_tokens"]]
    return max(len(layout["model"]["vocab"]), max(ids, default=-1) + 1)


def write_vocabulary(folder: Path, name: str, **settings: Any) -> int:
    """Write a layout's files and return how many ids it has."""
    return write_layout(folder, json.loads(layout_of(name)), **settings)


def write_layout(folder: Path, layout: dict[str, Any], **settings: Any) -> int:
    """Write a tokenizer whose file decides what it does. Return how many ids it has."""
    (folder / "tokenizer.json").write_text(json.dumps(layout, ensure_ascii=False), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    settings |= {"clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return n_ids(layout)


def with_tokens(layout: dict[str, Any], special: list[str], ordinary: list[str]) -> dict[str, Any]:
    """Return a layout with further added tokens, behind the ids that it has."""
    known = {token["content"] for token in layout["added_tokens"]}
    id = n_ids(layout)
    more = []
    for content in [*special, *ordinary]:
        if content not in known:
            more.append(added_token(content, id=id, special=content in special))
            id += 1
    return {**layout, "added_tokens": [*layout["added_tokens"], *more]}
