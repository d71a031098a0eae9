"""A tokenizer.model alone encodes as SentencePiece does, and a broken one is refused."""

from __future__ import annotations

import functools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from text.vocabularies import texts, windows

from hybrid.errors import HybridError, InvalidCheckpoint, UnsupportedModel
from hybrid.text.tokenizer import Tokenizer

MODELS: dict[str, dict[str, Any]] = {
    "BPE, as Llama's": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "BPE with whole pieces": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["<sep>", "\u2581\u2581", "hello"],
        "control_symbols": ["<ctrl>"],
    },
    "BPE, no prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "normalization_rule_name": "nfkc",
    },
    "Unigram, as T5's": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    "Unigram with bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "control_symbols": ["<ctrl>"],
    },
}


@functools.cache
def trained(name: str, folder: Path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece")
    corpus = folder / "corpus.txt"
    lines = [line for text in texts() for line in text[:30_000].splitlines() if line.strip()]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    home = folder / name.replace(" ", "_").replace(",", "")
    home.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(home / "tokenizer"),
        vocab_size=1500,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **MODELS[name],
    )
    return home


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("n", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(parent: Path, name: str, n: int) -> None:
    folder = trained(name, parent)
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = reference.vocab_size()
    tokenizer = Tokenizer.from_folder(folder, vocab_size=size, bos_id=1)
    assert tokenizer.bos == (reference.bos_id(),)
    for text in windows(n):
        # The `tokenizers` library finds Unigram's piece of unknown characters in a text.
        text = text.replace("\0", "").replace("▁", "_").replace("<unk>", "unk")
        ids = tokenizer.encode(text)[1:]
        expected = reference.encode(text)
        if ids != expected:  # of two splits that are equally likely, Unigram may take either
            assert "Unigram" in name
            scores = [math.fsum(map(reference.get_score, split)) for split in (ids, expected)]
            assert abs(scores[0] - scores[1]) < 1e-4
            continue
        if "\u2047" not in reference.decode(ids):  # its text for unknown characters
            assert tokenizer.decode(ids).strip(" ") == reference.decode(ids).strip(" ")


@pytest.mark.parametrize("name", MODELS)
def test_control_pieces_are_never_found_in_a_text(parent: Path, name: str) -> None:
    folder = trained(name, parent)
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = reference.vocab_size()
    tokenizer = Tokenizer.from_folder(folder, vocab_size=size, bos_id=1)
    control = {id for id in range(size) if reference.is_control(id)}
    for text in ("<s>", "a </s> b", "<ctrl>", "x<ctrl>y<s>"):
        assert control.isdisjoint(tokenizer.encode(text)[1:])


@pytest.mark.parametrize("adds_bos", [None, True, False])
def test_bos_follows_the_settings(parent: Path, tmp_path: Path, adds_bos: bool | None) -> None:
    folder = trained("BPE, as Llama's", parent)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    if adds_bos is not None:
        settings = json.dumps({"add_bos_token": adds_bos})
        (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = Tokenizer.from_folder(tmp_path, vocab_size=1500, bos_id=1)
    assert tokenizer.bos == (() if adds_bos is False else (1,))


def test_a_llama_has_the_ids_of_transformers(parent: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    pytest.importorskip("google.protobuf", reason="protobuf, with which transformers reads it")
    folder = trained("BPE, as Llama's", parent)
    reference = transformers.LlamaTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_folder(folder, vocab_size=1500, bos_id=1)
    for text in windows(100):
        # transformers gives a text that begins with a space no other one; SentencePiece does.
        text = text.replace("▁", "_").lstrip(" ").replace("<unk>", "unk")
        assert tokenizer.encode(text)[1:] == reference.encode(text, add_special_tokens=False)


# Broken files


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no pieces"),
        (b"pieces", "not a SentencePiece model"),
        (b"<!DOCTYPE html>", "not a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "not a SentencePiece"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "ends within a field"),
        (b"\xff" * 40, "more than 64 bits"),
        (b"\x0a\x02\x0a\x05", "ends within a field"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "not a SentencePiece model"),
        (b"\x0a\x03\x0a\x01a" * 2, "a piece twice"),
        (b"\x0a\x03\x0a\x01a\x12\x05\x18\x02\xca\x02\x00", "another type"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x02\x1a\x02\x10\x05", "another type"),
        (b"\x0a\xab\x02\x0a\xa8\x02" + b"a" * 296, "a piece of 296 characters"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match=rf"tokenizer\.model: .*{problem}"):
        Tokenizer.from_folder(tmp_path, vocab_size=4096, bos_id=1)


def test_tiktokens_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UnsupportedModel, match=r"tiktoken's; hybrid needs a tokenizer\.json"):
        Tokenizer.from_folder(tmp_path, vocab_size=4096, bos_id=1)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_kinds_are_named(tmp_path: Path, kind: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a b c\n" * 100)
    prefix = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=prefix, model_type=kind, vocab_size=6, minloglevel=2
    )
    with pytest.raises(UnsupportedModel, match=f"expected Unigram or BPE .*{kind}"):
        Tokenizer.from_folder(tmp_path, vocab_size=100, bos_id=1)


def test_damaged_files_end_in_an_error_of_ours(parent: Path, tmp_path: Path) -> None:
    data = (trained("BPE, as Llama's", parent) / "tokenizer.model").read_bytes()
    draw = random.Random(1)
    n_refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(damaged[: draw.randrange(len(damaged))])
        try:
            Tokenizer.from_folder(tmp_path, vocab_size=1500, bos_id=1)
        except HybridError:
            n_refused += 1
    assert n_refused > 20
