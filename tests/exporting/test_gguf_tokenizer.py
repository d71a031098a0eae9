"""A tokenizer.json as GGUF's keys encodes what it encoded, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from slow import slow_except
from text.vocabularies import (
    LAYOUTS,
    layout_of,
    n_ids,
    windows,
    with_tokens,
    write_layout,
    write_vocabulary,
)
from tiny_models import STORIES, add_marker_pieces, write_model

from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.gguf.reader import GgufFile
from hybrid.errors import UnsupportedModel
from hybrid.exporting.gguf_tokenizer import tokenizer_keys
from hybrid.exporting.merge_scores import merge_scores, never_made
from hybrid.notices import Notices
from hybrid.text.gguf_vocabulary import read_gguf_tokenizer
from hybrid.text.vocabulary_file import read_settings, read_vocabulary

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
SAYABLE = ("bundled", "gpt-2", "llama-3", "qwen-2", "smollm-2")


def keys_of(folder: Path, size: int, **config: Any) -> tuple[dict[str, Any], Notices]:
    """Return the keys of a folder's tokenizer, for a model with `size` ids."""
    files = {path: path.read_bytes() for path in folder.glob("tokenizer*")}
    write_model(folder, vocab_size=size, intermediate_size=8, **SMALL, **config)
    for path, content in files.items():
        path.write_bytes(content)
    notices = Notices()
    with open_checkpoint(folder) as checkpoint:
        return tokenizer_keys(folder, checkpoint.config, notices), notices


def compare(folder: Path, keys: dict[str, Any], size: int, n: int = 300) -> None:
    """Encode parts of texts with both tokenizers."""
    layout, settings = read_gguf_tokenizer(GgufFile(folder, None, 3, False, keys, {}))  # type: ignore[arg-type]
    result = read_vocabulary(folder, settings, size, layout).library
    original = read_vocabulary(folder, read_settings(folder)[0], size).library
    for text in windows(n):
        expected = original.encode(text, add_special_tokens=False).ids
        assert result.encode(text, add_special_tokens=False).ids == expected, text


@pytest.mark.parametrize("name", slow_except(SAYABLE, "bundled", "llama-3"))
def test_texts_become_the_same_ids(tmp_path, name):
    size = write_vocabulary(tmp_path, name)
    keys, notices = keys_of(tmp_path, size)
    assert not list(notices)
    assert len(keys["tokenizer.ggml.tokens"]) == size
    compare(tmp_path, keys, size)


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - set(SAYABLE)))
def test_what_gguf_cannot_say_is_refused(tmp_path, name):
    size = write_vocabulary(tmp_path, name)
    with pytest.raises(UnsupportedModel, match=r"GGUF cannot say .*; export it with --no-tok"):
        keys_of(tmp_path, size)


def test_a_pre_tokenizer_that_splits_a_piece_is_refused(tmp_path):
    """Digits are split before anything is merged, so that the piece "12" is never used."""
    layout = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    add_marker_pieces(layout)
    write_layout(tmp_path, layout)
    with pytest.raises(UnsupportedModel, match="pre_tokenizer splits the piece"):
        keys_of(tmp_path, n_ids(layout))


def test_special_tokens_and_templates_are_said(tmp_path):
    layout = with_tokens(json.loads(layout_of("gpt-2")), ["<|pad|>"], ["<think>"])
    size = write_layout(
        tmp_path,
        layout,
        pad_token="<|pad|>",
        chat_template=[
            {"name": "default", "template": "{{ 1 }}"},
            {"name": "tool_use", "template": "{{ 2 }}"},
        ],
    )
    keys, _ = keys_of(tmp_path, size + 3, eos_token_id=[2, 5, 6])
    names = keys["tokenizer.ggml.tokens"]
    kinds = dict(zip(names, keys["tokenizer.ggml.token_type"].tolist(), strict=True))
    assert (kinds["<|pad|>"], kinds["<think>"], kinds["a"]) == (3, 4, 1)
    assert names[size:] == [f"[PAD{id}]" for id in range(size, size + 3)]
    assert kinds[names[-1]] == 5
    ids = {"bos": 1, "eos": 2, "eot": 5, "eom": 6, "padding": names.index("<|pad|>")}
    for name, id in ids.items():
        assert keys[f"tokenizer.ggml.{name}_token_id"] == id
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == "{{ 1 }}"
    assert keys["tokenizer.chat_template.tool_use"] == "{{ 2 }}"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MiniCPM-S-1B-sft", "MiniCPM-2B"])
def test_minicpms_texts_become_the_same_ids(tmp_path, shared_data, name):
    source = shared_data / "tokenizers" / name / "tokenizer.json"
    layout = json.loads(source.read_text(encoding="utf-8"))
    size = write_layout(tmp_path, layout)
    keys, notices = keys_of(tmp_path, size)
    assert len(notices) == (name == "MiniCPM-2B")
    compare(tmp_path, keys, size, 2000)


# Scores


def test_a_piece_scores_by_the_merge_that_makes_it():
    """Of abc, a + bc comes about: b + c is merged first. So d + a is merged before abc is made."""
    merges = [("b", "c"), ("ab", "c"), ("d", "a"), ("a", "bc"), ("a", "b")]
    scores = merge_scores(merges, ["bc", "abc", "da", "ab", "a"])
    assert scores == {"bc": 0.0, "abc": -3.0, "da": -2.0, "ab": -4.0, "a": -5.0}


def test_a_piece_that_ends_as_two_symbols_is_found():
    merges = [("b", "c"), ("a", "bc")]
    assert never_made(merges, ["bc", "abc", "ab", "x", "wxyz"]) == ["ab"]
