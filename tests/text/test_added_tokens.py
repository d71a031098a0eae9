"""Tokens that only tokenizer_config.json or added_tokens.json list are added as in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import STORIES, added_token, change_json

from hybrid.errors import InvalidCheckpoint
from hybrid.text.tokenizer import Tokenizer

TEXTS = ["a <tool> b", "<tool>", "x<tool>y<call> z", "no tokens", "<tool><end>", "upon <call>"]


TOOL, CALL = added_token("<tool>"), added_token("<call>", normalized=True, lstrip=True)
FILES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "settings": ({"added_tokens_decoder": {"4097": CALL, "4096": TOOL}}, None),
    "legacy": ({}, {"<call>": 4097, "<tool>": 4096}),
    "both": ({"added_tokens_decoder": {"4096": TOOL}}, {"<call>": 4097}),
    "a piece": ({"added_tokens_decoder": {"4095": added_token("PIECE")}}, None),
    "special": ({"added_tokens_decoder": {"4096": added_token("<tool>", special=True)}}, None),
    "special by name": ({"pad_token": "<tool>"}, {"<tool>": 4096, "<call>": 4097}),
}


def write(folder: Path, settings: dict[str, Any], legacy: dict[str, Any] | None) -> Path:
    text = (STORIES / "tokenizer.json").read_text(encoding="utf-8")
    pieces = {token: piece for piece, token in json.loads(text)["model"]["vocab"].items()}
    content = json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    shutil.copy(STORIES / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(content.replace("PIECE", pieces[4095]))
    if legacy is not None:
        (folder / "added_tokens.json").write_text(json.dumps(legacy))
    return folder


def load(folder: Path, vocab_size: int = 4200) -> Tokenizer:
    return Tokenizer.from_folder(folder, vocab_size=vocab_size, bos_id=1)


@pytest.mark.parametrize("name", FILES)
def test_texts_have_the_ids_of_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    write(tmp_path, *FILES[name])
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load(tmp_path)
    assert tokenizer.notices == ()
    for text in TEXTS:
        # Here the name of a special token in a text is text.
        assert tokenizer.encode(text) == reference(text, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize(("name", "n_tokens"), [("settings", 2), ("legacy", 2), ("both", 1)])
def test_listed_tokens_are_one_token_each(tmp_path: Path, name: str, n_tokens: int) -> None:
    tokenizer = load(write(tmp_path, *FILES[name]))
    ids = tokenizer.encode("x <tool> <call>")
    assert len({4096, 4097} & set(ids)) == n_tokens
    assert "<tool>" in tokenizer.decode(ids)
    assert 4096 in tokenizer.encode_continuation(" <tool>")


def test_a_special_token_is_hidden_and_never_read_from_a_text(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, *FILES["special"]))
    assert 4096 not in tokenizer.encode("<tool>")
    assert tokenizer.decode([1, 4096]) == ""


@pytest.mark.parametrize(
    ("legacy", "names"),
    [
        ({"[PAD]": 4096}, "'[PAD]' (id 4096)"),
        ({"<a>": 4097, "<b>": 9999}, "'<a>' (id 4097), '<b>' (id 9999)"),
    ],
)
def test_tokens_that_the_model_lacks_are_left_out_with_a_notice(
    tmp_path: Path, legacy: dict[str, Any], names: str
) -> None:
    tokenizer = load(write(tmp_path, {}, legacy), vocab_size=4096)
    assert tokenizer.notices == (
        f"{tmp_path.name}: tokens that the model does not have are left out: {names}",
    )
    assert tokenizer.encode("a [PAD] <b>") == load(STORIES).encode("a [PAD] <b>")


def test_the_special_tokens_map_names_bos(tmp_path: Path) -> None:
    write(tmp_path, {}, None)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "</s>"}}')
    change_json(tmp_path / "tokenizer.json", post_processor=None)
    tokenizer = Tokenizer.from_folder(tmp_path, vocab_size=4200, bos_id=1, add_bos=True)
    assert tokenizer.bos == (2,)


@pytest.mark.parametrize(
    ("settings", "legacy", "problem"),
    [
        ({"added_tokens_decoder": []}, None, "tokenizer_config.json: added_tokens_decoder: "),
        ({"added_tokens_decoder": {"x": TOOL}}, None, "added_tokens_decoder: x: expected an added"),
        ({"added_tokens_decoder": {"5": "<tool>"}}, None, "added_tokens_decoder: 5: expected"),
        ({"added_tokens_decoder": {"5": TOOL | {"lstrip": 1}}}, None, "added_tokens_decoder: 5: "),
        ({"added_tokens_decoder": {"5": {"content": ""}}}, None, "added_tokens_decoder: 5: "),
        ({}, {"<tool>": "4096"}, "added_tokens.json: <tool>: expected an added token, found '40"),
        (
            {"added_tokens_decoder": {"4096": added_token("\ud800")}},
            None,
            r"added_tokens_decoder: 4096: expected an added token, found .*'\\ud800'",
        ),
        ({}, {"\ud800": 4096}, r"added_tokens.json: \\ud800: expected an added token, found 4096"),
        ({}, {"a\nb": 0.5}, "added_tokens.json: a b: expected an added token, found 0.5"),
        ({}, {"<tool>": -1}, "added_tokens.json: <tool>: expected an added token, found -1"),
    ],
)
def test_what_is_no_token_is_refused(
    tmp_path: Path, settings: dict[str, Any], legacy: dict[str, Any] | None, problem: str
) -> None:
    write(tmp_path, settings, legacy)
    with pytest.raises(InvalidCheckpoint, match=problem) as raised:
        load(tmp_path)
    str(raised.value).encode()  # so that it can be printed
