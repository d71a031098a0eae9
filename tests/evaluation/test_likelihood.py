"""What stands for an empty text is the tokenizer's, wherever a likelihood needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import change_json, write_model

import hybrid
from hybrid.errors import InvalidOption
from hybrid.evaluation import Fp32Engine
from hybrid.evaluation.likelihood import encode_pair, prefix_token


def model(folder: Path, **config: Any) -> Path:
    """Write a model whose tokenizer.json puts <s> (id 1) before a text."""
    path = write_model(folder / "model", vocab_size=4096) / "config.json"
    change_json(path, **config)
    return path.parent


@pytest.mark.parametrize("bos_id", [None, 0, 1])
def test_a_text_without_context_begins_as_an_empty_prompt(
    tmp_path: Path, bos_id: int | None
) -> None:
    folder = model(tmp_path, bos_token_id=bos_id)
    with hybrid.load(folder, threads=1) as engine:
        assert prefix_token(engine) == 1
        assert encode_pair(engine, "", "Once")[0] == [1]
        assert engine.generate("", max_tokens=1).prompt == [1]
    assert prefix_token(Fp32Engine(folder)) == 1


def test_a_bos_that_is_named_but_not_added_stands_for_an_empty_text(tmp_path: Path) -> None:
    folder = model(tmp_path, bos_token_id=0)
    change_json(folder / "tokenizer.json", post_processor=None)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with hybrid.load(folder, threads=1) as engine:
        assert engine.tokenizer.bos == ()
        assert encode_pair(engine, "", "Once")[0] == [1]


@pytest.mark.parametrize(("bos_id", "expected"), [(1, 1), (0, 0), (None, 2)])
def test_without_bos_the_config_says_what_begins_a_text(
    tmp_path: Path, bos_id: int | None, expected: int
) -> None:
    folder = model(tmp_path, bos_token_id=bos_id)
    with hybrid.load(folder, threads=1, add_bos=False) as engine:
        assert encode_pair(engine, "", "Once")[0] == [expected]


def test_a_model_that_names_no_such_token_has_no_likelihood_without_context(
    tmp_path: Path,
) -> None:
    folder = model(tmp_path, bos_token_id=None, eos_token_id=None)
    with (
        hybrid.load(folder, threads=1, add_bos=False) as engine,
        pytest.raises(InvalidOption, match="no token that begins or ends a text"),
    ):
        prefix_token(engine)
