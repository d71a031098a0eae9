"""Every kind of tokenizer has the ids of transformers, and its texts come back."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2 import write_smollm2
from text.vocabularies import (
    BYTE_LEVEL,
    LAYOUTS,
    LOSSY,
    SHARED,
    SPECIAL,
    layout_of,
    windows,
    write_layout,
    write_vocabulary,
)

from hybrid.errors import InvalidCheckpoint, InvalidOption, UnsupportedModel
from hybrid.text.tokenizer import Tokenizer

PUBLISHED = {"MiniCPM-S-1B-sft": 73440, "MiniCPM-2B": 122753, "MiniCPM3-4B": 73448}
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="published tokenizers are not on this machine"
)
N_WINDOWS = [100, pytest.param(2000, marks=pytest.mark.slow)]


@functools.cache
def opened(name: str, parent: Path) -> tuple[Tokenizer, Any]:
    """Return a tokenizer and transformers' own for the same files."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    folder = parent / name.replace(" ", "_")
    folder.mkdir()
    if name in PUBLISHED:
        text = (SHARED / "tokenizers" / name / "tokenizer.json").read_text(encoding="utf-8")
        write_layout(folder, json.loads(text))
        n_ids = PUBLISHED[name]
    else:
        n_ids = write_vocabulary(folder, name)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    return Tokenizer.from_folder(folder, vocab_size=n_ids, bos_id=None, add_bos=False), reference


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


def compare(tokenizer: Tokenizer, reference: Any, n: int, *, comes_back: bool) -> None:
    """Compare windows of text with transformers, and stream them."""
    for text in windows(n):
        if any(special in text for special in SPECIAL):
            continue  # of a text that spells them, transformers makes special tokens with Unigram
        ids = tokenizer.encode(text)
        expected = reference.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == expected
        if comes_back:  # Metaspace gives a text that begins with a space no other one
            decoded, text = tokenizer.decode(ids), text.replace("▁", " ")
            assert decoded in (text, text.removeprefix(" "))
        stream = tokenizer.stream([])
        pieces = [*map(stream.push, ids), stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("n", N_WINDOWS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_are_those_of_transformers(parent: Path, name: str, n: int) -> None:
    comes_back = name not in (*LOSSY, "qwen-2", "prefix", "Unigram with bytes")
    compare(*opened(name, parent), n, comes_back=comes_back)


@needs_shared
@pytest.mark.parametrize("n", N_WINDOWS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vocabularies_have_the_ids_of_transformers(
    parent: Path, name: str, n: int
) -> None:
    compare(*opened(name, parent), n, comes_back=True)


@pytest.mark.slow
def test_smollm2_has_the_ids_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    n_ids = write_smollm2(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path, vocab_size=n_ids, bos_id=None, add_bos=False)
    compare(tokenizer, reference, 2000, comes_back=True)


@needs_shared
@pytest.mark.parametrize("n", N_WINDOWS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_vocabulary_saved_again_by_transformers_is_the_same(
    tmp_path: Path, name: str, n: int
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    source = SHARED / "tokenizers" / name
    saved = transformers.LlamaTokenizer.from_pretrained(source)
    saved.save_pretrained(tmp_path)
    layout = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert layout["normalizer"] is None
    assert layout["pre_tokenizer"]["type"] == "Metaspace"
    options = {"vocab_size": PUBLISHED[name], "bos_id": 1, "eos_id": 2}
    original = Tokenizer.from_folder(source, **options)
    tokenizer = Tokenizer.from_folder(tmp_path, **options)
    compare(Tokenizer.from_folder(tmp_path, **options, add_bos=False), saved, n, comes_back=True)
    messages: list[Any] = [
        {"role": "system", "content": "Be brief. 简短"},
        {"role": "user", "content": " say <AI>no <用户>yes </s>"},
        {"role": "assistant", "content": "No (1)."},
        {"role": "user", "content": "你好"},
    ]
    if original.has_chat_template:
        assert tokenizer.encode_chat(messages) == original.encode_chat(messages)
        assert tokenizer.bos == original.bos == (1,)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(
    ids=st.lists(st.integers(0, 1799) | st.integers(12, 267), max_size=30),
    n_context=st.integers(0, 30),
)
@settings(deadline=None, max_examples=100)
def test_streamed_text_is_what_decoding_adds(
    parent: Path, name: str, ids: list[int], n_context: int
) -> None:
    tokenizer, reference = opened(name, parent)
    context, rest = ids[:n_context], ids[n_context:]
    certain = tokenizer.decode(context).removesuffix(tokenizer.stream(context).finish())
    stream = tokenizer.stream(context)
    assert certain + "".join([*map(stream.push, rest), stream.finish()]) == tokenizer.decode(ids)
    expected = reference.decode(ids, skip_special_tokens=True)
    assert "\ufffd" in expected or tokenizer.decode(ids) == expected


@pytest.mark.parametrize("name", LAYOUTS)
@given(
    text=st.lists(
        st.sampled_from([*SPECIAL, "<", "|", ">", "s", "/", " ", "im_", "start", "a", "\n"]),
        max_size=10,
    ).map("".join)
)
@settings(deadline=None, max_examples=60)
def test_a_text_never_becomes_a_control_token(parent: Path, name: str, text: str) -> None:
    tokenizer, _ = opened(name, parent)
    layout = json.loads(layout_of(name))
    unknown = layout["model"].get("unk_id") or 0
    control = {token["id"] for token in layout["added_tokens"] if token["special"]} - {unknown}
    assert control.isdisjoint(tokenizer.encode(text))
    assert control.isdisjoint(tokenizer.encode_continuation(text))
    if name not in (*LOSSY, "prefix", "Unigram with bytes"):
        assert tokenizer.decode(tokenizer.encode(text)) in (text, text.removeprefix(" "))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_continuation_begins_with_no_space(parent: Path, name: str) -> None:
    tokenizer, _ = opened(name, parent)
    start = tokenizer.encode("so")
    for text in ("abc", "on", ".", "a b"):
        said = tokenizer.continue_text(start, tokenizer.encode_continuation(text))
        assert said == text
    assert tokenizer.continue_text(start, tokenizer.encode_continuation(" abc")) == " abc"


@pytest.mark.parametrize("name", LOSSY)
def test_unknown_characters_are_said(parent: Path, name: str) -> None:
    tokenizer, _ = opened(name, parent)
    notice = tokenizer.notices[0]
    assert "characters that it lacks become '<unk>'" in notice
    assert tokenizer.decode(tokenizer.encode("a☂b")).replace(" ", "") == "ab"


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - set(LOSSY)))
def test_vocabularies_with_bytes_know_every_character(parent: Path, name: str) -> None:
    tokenizer, _ = opened(name, parent)
    assert not any("characters" in notice for notice in tokenizer.notices)
    assert tokenizer.decode(tokenizer.encode("a☂\U0010fffdb")).strip() == "a☂\U0010fffdb"


def test_a_vocabulary_without_a_token_for_unknown_characters(tmp_path: Path) -> None:
    layout = json.loads(layout_of("characters, WordLevel"))
    layout["model"]["unk_token"] = "missing"
    n_ids = write_layout(tmp_path, layout)
    tokenizer = Tokenizer.from_folder(tmp_path, vocab_size=n_ids, bos_id=None)
    assert "characters that it lacks are refused" in tokenizer.notices[0]
    with pytest.raises(InvalidOption, match="tokenizer cannot encode it"):
        tokenizer.encode("☂")


def test_dropout_is_for_training_only(tmp_path: Path) -> None:
    layout = json.loads(layout_of("bundled"))
    layout["model"]["dropout"] = 0.9
    n_ids = write_layout(tmp_path, layout)
    tokenizer = Tokenizer.from_folder(tmp_path, vocab_size=n_ids, bos_id=1)
    assert len({tuple(tokenizer.encode("Once upon a time")) for _ in range(9)}) == 1


# Files that no tokenizer should have


def damaged(change: Any) -> dict[str, Any]:
    layout: dict[str, Any] = json.loads(layout_of("bundled"))
    change(layout)
    return layout


def _double(layout: dict[str, Any]) -> None:
    layout["model"]["vocab"]["again"] = 300


def _no_merges(layout: dict[str, Any]) -> None:
    layout["model"]["merges"] = []


def _lost_merges(layout: dict[str, Any]) -> None:
    del layout["model"]["merges"]


def _explode(layout: dict[str, Any]) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    layout["normalizer"] = {"type": "Sequence", "normalizers": [step] * 40}


def _explode_nested(layout: dict[str, Any]) -> None:
    step: dict[str, Any] = {"type": "Replace", "pattern": {"Regex": ""}, "content": "xxxx"}
    for _ in range(7):
        step = {"type": "Sequence", "normalizers": [step, step]}
    layout["normalizer"] = step


def _nest(layout: dict[str, Any]) -> None:
    step: dict[str, Any] = {"type": "NFC"}
    for _ in range(400):
        step = {"type": "Sequence", "normalizers": [step]}
    layout["normalizer"] = step


def _many(layout: dict[str, Any]) -> None:
    layout["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100_000}


def _added_twice(layout: dict[str, Any]) -> None:
    layout["added_tokens"].append({**layout["added_tokens"][2], "id": 7, "content": "<x>"})


def _negative(layout: dict[str, Any]) -> None:
    layout["model"]["vocab"]["x" * 9] = -1


def _empty(layout: dict[str, Any]) -> None:
    layout["model"]["vocab"] = {}


def _long_piece(layout: dict[str, Any]) -> None:
    layout["normalizer"] = {"type": "Prepend", "prepend": "x" * 1_000_000}


def _charsmap(text: str) -> Any:
    def change(layout: dict[str, Any]) -> None:
        layout["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": text}

    return change


def _long_token(layout: dict[str, Any]) -> None:
    layout["added_tokens"].append({**layout["added_tokens"][2], "id": 4096, "content": "x" * 5000})


def _odd_vocabulary(layout: dict[str, Any]) -> None:
    layout["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [1, 2]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_charsmap("/////w=="), "precompiled_charsmap is broken"),
        (_charsmap("AAAAAAECAw=="), "precompiled_charsmap is broken"),
        (_long_token, "an added token of 5,000 characters"),
        (_odd_vocabulary, "piece twice, or an empty one"),
        (_double, "have the same id 300"),
        (_no_merges, "has no merges, so pieces such as"),
        (_lost_merges, "has no merges|not a tokenizer"),
        (_explode, "times as long"),
        (_explode_nested, "times as long"),
        (_nest, "not a tokenizer|nested too deeply|more than 64 normalizers"),
        (_many, "more than 64 normalizers"),
        (_added_twice, "added token '<x>' has id 7"),
        (_negative, "expected pieces with their ids"),
        (_empty, "has no pieces"),
        (_long_piece, "times as long"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, change: Any, problem: str) -> None:
    write_layout(tmp_path, damaged(change))
    with pytest.raises(InvalidCheckpoint, match=problem) as caught:
        Tokenizer.from_folder(tmp_path, vocab_size=4096, bos_id=1)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, _double, _no_merges])
def test_a_file_of_60_mb_is_read_or_refused(tmp_path: Path, change: Any) -> None:
    layout = json.loads(layout_of("bundled"))
    vocab = layout["model"]["vocab"]
    for n in range(1_850_000):
        vocab[f"piece {n} of many"] = len(vocab)
    if change is not None:
        change(layout)
    write_layout(tmp_path, layout)
    assert 55e6 < (tmp_path / "tokenizer.json").stat().st_size < 64 << 20
    with pytest.raises(InvalidCheckpoint, match=r"pieces, but the model|same id|no merges"):
        Tokenizer.from_folder(tmp_path, vocab_size=4096, bos_id=1)


@pytest.mark.parametrize(
    ("decoder", "problem"),
    [
        ({"type": "BPEDecoder", "suffix": "</w>"}, "decoder does not give each token"),
        (
            {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
            "decoder",
        ),
    ],
)
def test_decoders_that_look_at_neighbours_are_refused(
    tmp_path: Path, decoder: dict[str, Any], problem: str
) -> None:
    layout = json.loads(layout_of("bundled"))
    for piece in [piece for piece in layout["model"]["vocab"] if piece.startswith("▁")][:500]:
        layout["model"]["vocab"][piece.removeprefix("▁") + "</w>"] = len(layout["model"]["vocab"])
    layout["decoder"] = decoder
    n_ids = write_layout(tmp_path, layout)
    with pytest.raises(UnsupportedModel, match=problem):
        Tokenizer.from_folder(tmp_path, vocab_size=n_ids, bos_id=1)
