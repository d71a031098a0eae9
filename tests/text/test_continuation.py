"""Text that follows other text has the ids that it has in the middle of one text.

This holds for every layout of a tokenizer: whatever its normalizer, pre-tokenizer and added tokens
do, `encode(a + b)` is `encode(a)` and `encode_continuation(b)`, unless pieces join a and b.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import STORIES, add_marker_pieces, added_token

from hybrid.errors import UnsupportedModel
from hybrid.text.tokenizer import Tokenizer

PREPEND: dict[str, Any] = {"type": "Prepend", "prepend": "▁"}
REPLACE: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def sequence(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(normalizers)}


def metaspace(scheme: str, *, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


LAYOUTS: dict[str, dict[str, Any]] = {
    "bundled": {},
    "no pre-tokenizer": {"pre_tokenizer": None},
    "no prefix": {"normalizer": REPLACE},
    "Metaspace first": {"normalizer": None, "pre_tokenizer": metaspace("first", split=False)},
    "Metaspace always": {"normalizer": None, "pre_tokenizer": metaspace("always", split=True)},
    "Metaspace never": {"normalizer": None, "pre_tokenizer": metaspace("never", split=True)},
    "old Metaspace": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
    },
    "lower case": {"normalizer": sequence({"type": "Lowercase"}, PREPEND, REPLACE)},
    "no accents": {
        "normalizer": sequence({"type": "NFD"}, {"type": "StripAccents"}, PREPEND, REPLACE)
    },
    "NFKC": {"normalizer": sequence({"type": "NFKC"}, PREPEND, REPLACE)},
    "many spaces": {
        "normalizer": sequence(
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, PREPEND, REPLACE
        )
    },
}


ADDED = [
    added_token("<tool>", id=4096),
    added_token("<call>", id=4097, normalized=True),
    added_token("<left>", id=4098, lstrip=True),
    added_token("<right>", id=4099, rstrip=True),
    added_token("word", id=4100, single_word=True),
    added_token("<end>", id=4101, special=True),
]
FOLLOWING = st.lists(
    st.sampled_from(
        [*(token["content"] for token in ADDED), *("a", "upon", "Once", "É", "ﬁ", "你", "🙂")]
        + [" ", "  ", "\n", ".", "▁", "</s>", "\u0301"]
    ),
    max_size=8,
).map("".join)


@cache
def written(layout: str, has_added: bool, folder: Path) -> tuple[Tokenizer, Any]:
    """Return a tokenizer and the library's own for the same file."""
    content = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    content |= LAYOUTS[layout]
    content["added_tokens"] += ADDED if has_added else []
    folder = folder / f"{layout} {has_added}"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    return Tokenizer.from_folder(folder, vocab_size=4200, bos_id=1), library


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.mark.parametrize("has_added", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(following=FOLLOWING)
def test_a_continuation_is_the_rest_of_a_text(
    parent: Path, layout: str, has_added: bool, following: str
) -> None:
    tokenizer, library = written(layout, has_added, parent)
    before = "Once upon☂"  # no piece has ☂, so nothing joins it
    ids = library.encode(before + following, add_special_tokens=False).ids
    n = len(library.encode(before, add_special_tokens=False).ids)
    assert tokenizer.encode_continuation(following) == ids[n:]
    whole = library.encode(following, add_special_tokens=False).ids
    assert tokenizer.encode(following) == [1, *whole]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_continuation_begins_with_no_space(parent: Path, layout: str) -> None:
    tokenizer, _ = written(layout, False, parent)
    start = tokenizer.encode("x.")
    for text in ("abc", "upon", ".", "\n"):
        said = tokenizer.continue_text(start, tokenizer.encode_continuation(text))
        assert said == text
    assert tokenizer.continue_text(start, tokenizer.encode_continuation(" abc")) == " abc"
    assert tokenizer.encode_continuation("") == []


@pytest.mark.parametrize(
    ("layout", "expected"), [("lower case", "once é ﬁ"), ("no accents", "Once E ﬁ")]
)
def test_normalizers_are_followed(parent: Path, layout: str, expected: str) -> None:
    tokenizer, _ = written(layout, False, parent)
    assert tokenizer.decode(tokenizer.encode("Once É ﬁ")) == expected
    ids = tokenizer.encode_continuation(" Once É ﬁ")
    assert tokenizer.decode([1, *ids]) == expected


def test_a_message_has_the_same_ids_in_every_place_of_a_chat(tmp_path: Path) -> None:
    layout = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    add_marker_pieces(layout)
    first_id = len(layout["model"]["vocab"])
    for id, token in enumerate(ADDED[:5], first_id):
        layout["added_tokens"].append({**token, "id": id})
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    chat = Tokenizer.from_folder(tmp_path, vocab_size=4200, bos_id=1)
    for content in ("<tool> one", "a <call> two", "<left><right> b", "a word"):
        earlier: list[Any] = [{"role": "user", "content": "hi"}]
        answer: Any = {"role": "assistant", "content": "yes."}
        message: Any = {"role": "user", "content": content}
        whole = chat.encode_chat([*earlier, answer, message])
        following = chat.encode_after_answer([*earlier, answer, message], 1)
        assert following is not None
        assert whole == chat.encode_chat([*earlier, answer]) + following
        assert any(first_id <= token < first_id + 5 for token in whole)


def test_a_vocabulary_that_joins_everything_is_refused(tmp_path: Path) -> None:
    layout = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges = layout["model"]["vocab"], layout["model"]["merges"]
    for byte in range(256):
        piece = f"<0x{byte:02X}>"
        vocab[piece + "a"] = len(vocab)
        merges.append([piece, "a"])
    for piece in "\n\t|~^☂":  # some are pieces
        vocab.setdefault(piece, len(vocab))
        vocab[piece + "a"] = len(vocab)
        merges.append([piece, "a"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match="puts something before every text"):
        Tokenizer.from_folder(tmp_path, vocab_size=5000, bos_id=1)
