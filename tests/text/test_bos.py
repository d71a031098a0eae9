"""A text begins with what the model's tokenizer puts before it, as in transformers 5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import STORIES, write_model

import hybrid
from hybrid.errors import InvalidCheckpoint, InvalidOption
from hybrid.text.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
TEXT = "Once upon a time"


def template(before: list[str], after: list[str] | None = None, **ids: int) -> dict[str, Any]:
    """A post-processor that puts these tokens before and after a text."""
    ids = {"<s>": 1, "</s>": 2, "<unk>": 0} | ids

    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [*map(special, before), text, *map(special, after or [])]
    used = {name: ids[name] for name in (*before, *(after or []))}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [token], "tokens": [name]} for name, token in used.items()
        },
    }


NOTHING_CHANGED: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False}
NOTHING_CHANGED |= {"trim_offsets": False, "use_regex": False}
POST_PROCESSORS: dict[str, tuple[dict[str, Any] | None, tuple[int, ...]]] = {
    "bos": (template(["<s>"]), (1,)),
    "another": (template(["<unk>"]), (0,)),
    "two": (template(["<unk>", "<s>"]), (0, 1)),
    "none": (template([]), ()),
    "missing": (None, ()),
    "eos": (template([], ["</s>"]), ()),
    "both": (template(["<s>"], ["</s>"]), (1,)),
    "sequence": (
        {"type": "Sequence", "processors": [NOTHING_CHANGED, template(["<s>"])]},
        (1,),
    ),
    "bert": ({"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}, (1,)),
}


def write_tokenizer(
    folder: Path, post_processor: dict[str, Any] | None, settings: dict[str, Any] | None = None
) -> Path:
    layout = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    layout["post_processor"] = post_processor
    (folder / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def load(folder: Path, bos_id: int | None = 1, **options: Any) -> Tokenizer:
    return Tokenizer.from_folder(folder, vocab_size=4096, bos_id=bos_id, **options)


@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_the_post_processor_says_what_begins_a_text(tmp_path: Path, name: str) -> None:
    post_processor, expected = POST_PROCESSORS[name]
    tokenizer = load(write_tokenizer(tmp_path, post_processor))
    text = load(STORIES).encode(TEXT)[1:]
    assert tokenizer.bos == expected
    assert tokenizer.encode(TEXT) == [*expected, *text]
    assert tokenizer.encode("") == [*expected]
    assert tokenizer.encode_continuation(" upon") == load(STORIES).encode_continuation(" upon")


@pytest.mark.parametrize("name", ["eos", "both", "bert"])
def test_a_token_that_would_end_a_prompt_is_left_out_with_a_notice(
    tmp_path: Path, name: str
) -> None:
    post_processor, bos = POST_PROCESSORS[name]
    tokenizer = load(write_tokenizer(tmp_path, post_processor), bos[0] if bos else None)
    assert 2 not in tokenizer.encode(TEXT)
    (notice,) = tokenizer.notices
    assert "puts '</s>' (id 2) after a text" in notice


@pytest.mark.parametrize(
    ("name", "bos_id", "settings", "parts"),
    [
        ("bos", 1, {"add_bos_token": True}, None),
        ("none", None, {"add_bos_token": False}, None),
        ("bos", 1, {"add_bos_token": None}, None),
        ("bos", 1, None, None),
        ("bos", None, None, ["begins with '<s>' (id 1)", "config has no BOS"]),
        ("bos", 0, None, ["begins with '<s>' (id 1)", "config has '<unk>' (id 0) as BOS"]),
        ("none", 1, None, ["no BOS begins a text", "config has '<s>' (id 1) as BOS"]),
        ("bos", 1, {"add_bos_token": False}, ["begins with '<s>'", "has add_bos_token false"]),
        ("missing", 1, {"add_bos_token": True}, ["no BOS begins", "has add_bos_token true"]),
    ],
)
def test_files_that_disagree_are_reported(
    tmp_path: Path,
    name: str,
    bos_id: int | None,
    settings: dict[str, Any] | None,
    parts: list[str] | None,
) -> None:
    write_tokenizer(tmp_path, POST_PROCESSORS[name][0], settings)
    notices = load(tmp_path, bos_id).notices
    assert len(notices) == (0 if parts is None else 1)
    for part in parts or ():
        assert part in notices[0]
    assert load(tmp_path, bos_id, add_bos=False).notices == ()  # the user has decided


@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_a_user_may_choose(tmp_path: Path, name: str) -> None:
    post_processor, expected = POST_PROCESSORS[name]
    write_tokenizer(tmp_path, post_processor)
    assert load(tmp_path, add_bos=False).bos == ()
    assert load(tmp_path, add_bos=True).bos == (expected or (1,))


def test_bos_on_demand_is_the_tokenizers_before_the_configs(tmp_path: Path) -> None:
    for token in ("</s>", {"content": "</s>", "special": True}):
        write_tokenizer(tmp_path, None, {"bos_token": token})
        assert load(tmp_path, bos_id=1, add_bos=True).bos == (2,)
    write_tokenizer(tmp_path, None, {"bos_token": "<no such token>"})
    assert load(tmp_path, bos_id=1, add_bos=True).bos == (1,)
    with pytest.raises(InvalidOption, match=r"add_bos: .* names no token that begins a text"):
        load(tmp_path, bos_id=None, add_bos=True)


@pytest.mark.parametrize("token", ["\ud800", {"content": "a\udfff"}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_bos_that_is_not_unicode_is_refused(tmp_path: Path, name: str, token: object) -> None:
    write_tokenizer(tmp_path, None)
    (tmp_path / name).write_text(json.dumps({"bos_token": token}))
    with pytest.raises(InvalidCheckpoint, match=f"{name}.*: bos_token: expected valid") as raised:
        load(tmp_path)
    str(raised.value).encode()  # so that it can be printed


def test_a_post_processor_with_an_id_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template(["<s>"], **{"<s>": 5000}))
    with pytest.raises(InvalidCheckpoint, match="begins with id 5000, but the model's ids end at"):
        load(tmp_path)


def test_a_post_processor_without_its_token_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template(["<s>"]) | {"special_tokens": {}})
    with pytest.raises(InvalidCheckpoint, match="its post_processor cannot be used"):
        load(tmp_path)


def test_engine_and_command_follow_the_tokenizer(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vocab_size=4096)
    write_tokenizer(folder, None)
    with hybrid.load(folder) as engine:
        assert any("no BOS begins a text" in notice for notice in engine.notices)
        generation = engine.generate(TEXT, max_tokens=1)
        assert generation.prompt == load(STORIES).encode(TEXT)[1:]
        assert engine.generate("", max_tokens=1).prompt == [1]  # as generate() of transformers
    with hybrid.load(folder, add_bos=True) as engine:
        assert engine.generate(TEXT, max_tokens=1).prompt == load(STORIES).encode(TEXT)
    with (
        hybrid.load(folder, add_bos=False) as engine,
        pytest.raises(InvalidOption, match="no token that begins a text"),
    ):
        engine.generate("", max_tokens=1)


# transformers as a second opinion


def reference(folder: Path, **config: Any) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return transformers.AutoTokenizer.from_pretrained(folder)


NAMES = ["bos", "another", "two", "none", "missing", "both", "sequence"]
CASES = [(kind, name, None) for kind in (None, "LlamaTokenizer") for name in NAMES]
CASES += [("LlamaTokenizer", name, adds) for name in ("bos", "missing") for adds in (True, False)]


@pytest.mark.parametrize(("kind", "name", "adds_bos"), CASES)
def test_transformers_begins_texts_in_the_same_manner(
    tmp_path: Path, kind: str | None, name: str, adds_bos: bool | None
) -> None:
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    settings |= {} if kind is None else {"tokenizer_class": kind}
    settings |= {} if adds_bos is None else {"add_bos_token": adds_bos}
    write_tokenizer(tmp_path, POST_PROCESSORS[name][0], settings)
    ids = reference(tmp_path, bos_token_id=2)(TEXT)["input_ids"]
    assert (ids[-1] == 2) == (name == "both")
    assert load(tmp_path).encode(TEXT) == ids[: -1 if name == "both" else None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MiniCPM-S-1B-sft", "MiniCPM-2B", "MiniCPM3-4B"])
def test_published_tokenizers_encode_as_in_transformers(tmp_path: Path, name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the tokenizer of {name} is not on this machine")
    shutil.copy(SHARED / name / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path, vocab_size=130_000, bos_id=1)
    expected = reference(tmp_path)
    for text in ("Hello, world", "你好，世界", ""):
        assert tokenizer.encode(text) == expected(text)["input_ids"]
