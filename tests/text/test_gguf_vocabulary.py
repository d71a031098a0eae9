"""A vocabulary in a GGUF file has the ids of the same one in tokenizer.json."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_files import vocabulary_of, write_gguf
from smollm2 import smollm2_gguf, write_smollm2
from text.fetch_vocabularies import vocabularies_folder
from text.vocabularies import (
    LAYOUTS,
    SHARED,
    layout_of,
    mixed_windows,
    n_ids,
    windows,
    write_layout,
)
from tiny_models import CHATML, write_model

from hybrid.checkpoint.gguf.reader import read_gguf
from hybrid.errors import InvalidCheckpoint, UnsupportedModel
from hybrid.text.tokenizer import Tokenizer

PUBLISHED = {"MiniCPM-S-1B-sft": 73440, "MiniCPM-2B": 122753, "MiniCPM3-4B": 73448}
# Vocabularies of the tests, and what GGUF calls the way that they split texts.
PRE = {"bundled": None, "gpt-2": "gpt-2", "llama-3": "llama-bpe", "qwen-2": "qwen2"}
PRE |= {"smollm-2": "smollm"}
N_WINDOWS = [100, pytest.param(2000, marks=pytest.mark.slow)]


@cache
def tiny(folder: Path) -> Path:
    return write_model(
        folder / "model",
        vocab_size=64,
        architectures=["LlamaForCausalLM"],
        hidden_act="silu",
        hidden_act_param=None,
        tie_word_embeddings=True,
    )


def pair(
    folder: Path, layout: dict[str, Any], pre: str | None, **metadata: Any
) -> tuple[Tokenizer, Tokenizer]:
    """Return the tokenizer of a GGUF file, and that of the same tokenizer.json."""
    path = write_gguf(
        folder / "x.gguf", tiny(folder), vocabulary=vocabulary_of(layout, pre), metadata=metadata
    )
    write_layout(folder, layout)
    options = {"vocab_size": n_ids(layout), "bos_id": 1, "eos_id": 2}
    return Tokenizer.from_folder(path, **options), Tokenizer.from_folder(folder, **options)


def compare(found: Tokenizer, expected: Tokenizer, n: int) -> None:
    for text in windows(n):
        assert found.encode_continuation(text) == expected.encode_continuation(text)
        ids = found.encode(text)
        assert ids[len(found.bos) :] == expected.encode(text)[len(expected.bos) :]
        assert found.decode(ids) == expected.decode(ids)


@pytest.mark.parametrize("n", N_WINDOWS)
@pytest.mark.parametrize("name", PRE)
def test_ids_are_those_of_the_tokenizers_own_file(tmp_path: Path, name: str, n: int) -> None:
    assert name in LAYOUTS
    layout = json.loads(layout_of(name))
    found, expected = pair(tmp_path, layout, PRE[name])
    compare(found, expected, n)
    assert all("comes without a chat template" in line for line in found.notices)


@pytest.mark.parametrize("n", N_WINDOWS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_minicpms_vocabularies_have_their_ids(tmp_path: Path, name: str, n: int) -> None:
    path = SHARED / "tokenizers" / name / "tokenizer.json"
    if not path.exists():
        pytest.skip("not on this machine")
    found, expected = pair(tmp_path, json.loads(path.read_text(encoding="utf-8")), None)
    assert found.bos == expected.bos == (1,)
    compare(found, expected, n)
    library = tokenizers.Tokenizer.from_file(str(path))
    library.encode_special_tokens = True  # "<unk>" in a text is five characters
    for text in mixed_windows(n):
        assert found.encode(text) == library.encode(text).ids


def compare_published(path: Path) -> None:
    """Compare the ids of texts with those that lie beside a vocabulary."""
    n_ids = len(read_gguf(path).metadata["tokenizer.ggml.tokens"])
    tokenizer = Tokenizer.from_folder(path, vocab_size=n_ids, bos_id=None, add_bos=False)
    texts = path.with_suffix(".gguf.inp").read_bytes().decode()
    lines = path.with_suffix(".gguf.out").read_text().splitlines()
    assert len(lines) > 40
    for text, line in zip(texts.split("\n__ggml_vocab_test__\n"), lines, strict=False):
        assert tokenizer.encode(text) == [int(id) for id in line.split()], text


def test_a_published_vocabulary_has_the_published_ids() -> None:
    path = SHARED / "gguf-vocab" / "ggml-vocab-llama-spm.gguf"
    if not path.exists():
        pytest.skip("not on this machine")
    compare_published(path)


# The vocabularies that llama.cpp tests itself with, and what those are that hybrid refuses.
READ = ["llama-spm", "phi-3", "llama-bpe", "qwen2", "gpt-2", "mpt", "starcoder", "refact"]
READ += ["command-r"]
REFUSED = {
    "bert-bge": "a tokenizer of kind 'bert'",
    "nomic-bert-moe": "a tokenizer of kind 't5'",
    "gemma-4": "a tokenizer of kind 'gemma4'",
    "deepseek-coder": "by the rules of 'deepseek-coder'",
    "deepseek-llm": "by the rules of 'deepseek-llm'",
    "falcon": "by the rules of 'falcon'",
    "qwen35": "by the rules of 'qwen35'",
    "gpt-neox": "by the rules of None",
    "aquila": "by the rules of None",
}


def llama_cpp_vocabulary(name: str) -> Path:
    path = vocabularies_folder() / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip("needs python tests/text/fetch_vocabularies.py (77 MB)")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_the_vocabularies_of_llama_cpp_have_its_ids(name: str) -> None:
    compare_published(llama_cpp_vocabulary(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_other_vocabularies_of_llama_cpp_are_refused_by_name(name: str) -> None:
    path = llama_cpp_vocabulary(name)
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        Tokenizer.from_folder(path, vocab_size=300_000, bos_id=None)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("minicpm5", ["a", " ", "123", "45", "b", " cd", "'ll", "1", ".", "\n\n", "x"]),
        ("default", ["a", ",", " ", "123", "45", "==", "b", " cd", "'", "ll", "^", " ", " x"]),
    ],
)
def test_texts_are_split_as_the_file_says(tmp_path: Path, pre: str, words: list[str]) -> None:
    found, _ = pair(tmp_path, json.loads(layout_of("llama-3")), pre)
    expected = [id for word in words for id in found.encode_continuation(word)]
    assert found.encode_continuation("".join(words)) == expected


@pytest.mark.parametrize(("value", "expected"), [(None, (1,)), (True, (1,)), (False, ())])
def test_bos_follows_the_file(tmp_path: Path, value: bool | None, expected: Any) -> None:
    found, _ = pair(
        tmp_path, json.loads(layout_of("bundled")), None, **{"tokenizer.ggml.add_bos_token": value}
    )
    assert found.bos == expected
    assert found.notices == ()


def test_a_space_before_a_text_follows_the_file(tmp_path: Path) -> None:
    layout = json.loads(layout_of("bundled"))
    found, usual = pair(tmp_path, layout, None, **{"tokenizer.ggml.add_space_prefix": False})
    assert found.encode("upon")[1:] == usual.encode_continuation("upon")
    assert found.decode(found.encode(" upon")) == " upon"


def test_chat_templates_come_from_the_file(tmp_path: Path) -> None:
    layout = json.loads(layout_of("qwen-2"))
    templates = {"tokenizer.chat_template": CHATML, "tokenizer.chat_template.tool_use": "{{ 1 }}"}
    keys = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    found, _ = pair(tmp_path, layout, "qwen2", **templates, **keys)
    question: Any = [{"role": "user", "content": "Hi"}]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert found.render_chat(question) == expected
    assert found.decode(found.encode_chat(question)) == "user\nHi\nassistant\n"


@pytest.mark.parametrize(
    ("keys", "error", "problem"),
    [
        ({"tokenizer.ggml.pre": "bloom"}, UnsupportedModel, "by the rules of 'bloom'"),
        ({"tokenizer.ggml.merges": ["ab"]}, InvalidCheckpoint, "expected pairs"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, InvalidCheckpoint, "numbers|twice"),
        ({"tokenizer.ggml.add_bos_token": 1}, InvalidCheckpoint, "expected true or false"),
    ],
)
def test_broken_vocabularies_are_refused(
    tmp_path: Path, keys: Any, error: type[Exception], problem: str
) -> None:
    layout = json.loads(layout_of("gpt-2"))
    with pytest.raises(error, match=problem):
        pair(tmp_path, layout, "gpt-2", **keys)


@pytest.mark.slow
def test_smollm2_has_the_ids_of_its_repository(tmp_path: Path) -> None:
    n = write_smollm2(tmp_path)
    found = Tokenizer.from_folder(smollm2_gguf(), vocab_size=n, bos_id=1, eos_id=2)
    expected = Tokenizer.from_folder(tmp_path, vocab_size=n, bos_id=1, eos_id=2)
    compare(found, expected, 2000)
    question: Any = [{"role": "user", "content": "Hi <|im_end|>"}]
    assert found.encode_chat(question) == expected.encode_chat(question)
    assert re.match("<.im_start.>system\n", found.render_chat(question))
