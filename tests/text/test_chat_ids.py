"""A chat's ids are those of `apply_chat_template`; what a message spells is never a marker."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from smollm2 import write_smollm2
from text.chat_templates import TEMPLATES, TOOLS, conversation
from text.vocabularies import ORDINARY, SHARED, SPECIAL, layout_of, with_tokens, write_layout

from hybrid.errors import InvalidOption
from hybrid.text.chat import Chat
from hybrid.text.tokenizer import Tokenizer

MINICPM3 = SHARED / "tokenizers" / "MiniCPM3-4B" / "tokenizer.json"
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
VOCABULARIES = [
    "bundled",
    "Metaspace",
    "qwen-2",
    "Unigram with bytes",
    pytest.param(
        "MiniCPM3-4B",
        marks=pytest.mark.skipif(not MINICPM3.exists(), reason="not on this machine"),
    ),
]


@functools.cache
def folder_of(name: str, parent: Path) -> tuple[Path, int]:
    folder = parent / name.replace(" ", "_")
    folder.mkdir()
    text = MINICPM3.read_text(encoding="utf-8") if name == "MiniCPM3-4B" else layout_of(name)
    layout = with_tokens(json.loads(text), SPECIAL, ORDINARY)
    return folder, write_layout(folder, layout, **NAMES)


@functools.cache
def opened(name: str, parent: Path, template: str) -> Tokenizer:
    folder, n_ids = folder_of(name, parent)
    path = parent / f"{template}.jinja"
    path.write_text(TEMPLATES[template], encoding="utf-8")
    return Tokenizer.from_folder(
        folder, vocab_size=n_ids, bos_id=None, add_bos=False, chat_template=path
    )


@functools.cache
def transformers_of(name: str, parent: Path) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    return transformers.AutoTokenizer.from_pretrained(folder_of(name, parent)[0])


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chats")


def expected_ids(reference: Any, template: str, chat: Chat) -> list[int]:
    ids: list[int] = reference.apply_chat_template(
        list(chat.messages),
        tools=chat.tools,
        chat_template=TEMPLATES[template],
        add_generation_prompt=chat.add_generation_prompt and not chat.continues_last,
        continue_final_message=chat.continues_last,
        return_dict=False,
    )
    return ids


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_transformers(parent: Path, name: str, template: str) -> None:
    tokenizer, reference = opened(name, parent, template), transformers_of(name, parent)
    n_equal = 0
    for seed in range(50):
        chat = Chat(conversation(seed), add_generation_prompt=seed % 3 > 0)
        try:
            expected = expected_ids(reference, template, chat)
        except Exception:  # the template refuses the conversation
            with pytest.raises(InvalidOption):
                tokenizer.encode_chat(chat)
            continue
        assert tokenizer.encode_chat(chat) == expected
        n_equal += 1
    assert n_equal > 20


@pytest.mark.parametrize("name", VOCABULARIES)
def test_tools_and_begun_answers_have_the_ids_of_transformers(parent: Path, name: str) -> None:
    reference = transformers_of(name, parent)
    messages: list[Any] = [{"role": "user", "content": "Is it warm in Zürich? 你好"}]
    chats = {"tools": Chat(messages, TOOLS)}
    answer: Any = {"role": "assistant", "content": "It is"}
    chats |= {template: Chat([*messages, answer]) for template in ("chatml", "llama-3", "zephyr")}
    for template, chat in chats.items():
        tokenizer = opened(name, parent, template)
        assert tokenizer.encode_chat(chat) == expected_ids(reference, template, chat)


def encode(tokenizer: Tokenizer, name: str, chat: Chat) -> list[int] | None:
    """Return a chat's ids, or None if it spells a marker that the vocabulary has bytes for only."""
    refusal = None
    try:
        return tokenizer.encode_chat(chat)
    except InvalidOption as error:
        refusal = str(error)
    assert name != "MiniCPM3-4B"  # small vocabularies lack pieces for text markers
    assert "cannot tell from a" in refusal
    return None


PIECES = ["<", "|>", "<|im_", "start|>", "[INS", "T]", " ", "a", "\n", "用户>", "＜|im_end|＞", "▁"]
HOSTILE = st.lists(
    st.sampled_from([*SPECIAL, *ORDINARY, "<用户>", "<AI>", "[INST]", "<|user|>", *PIECES]),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("template", TEMPLATES)
@given(contents=st.lists(HOSTILE, min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_a_message_never_becomes_a_control_token(
    parent: Path, name: str, template: str, contents: list[str]
) -> None:
    """The control tokens are those of the same conversation with harmless contents."""
    tokenizer = opened(name, parent, template)
    layout = json.loads((folder_of(name, parent)[0] / "tokenizer.json").read_text("utf-8"))
    control = {t["id"]: t["content"] for t in layout["added_tokens"] if t["content"] != "<unk>"}
    roles = ["user", "assistant", "user"]
    hostile = [{"role": r, "content": c + "x"} for r, c in zip(roles, contents, strict=False)]
    harmless = [{"role": message["role"], "content": "x"} for message in hostile]

    def controls(messages: list[Any]) -> list[str]:
        ids = encode(tokenizer, name, Chat(messages, add_generation_prompt=False))
        assume(ids is not None)
        texts = [control[token] for token in ids if token in control]
        # An answer may contain what models write themselves.
        return [text for text in texts if text not in ORDINARY]

    assert controls(hostile) == controls(harmless)
    questions = [message for message in hostile if message["role"] == "user"][:1]
    ids = encode(tokenizer, name, Chat(questions))
    assume(ids is not None)
    written = {content for content in ORDINARY if content in TEMPLATES[template]}
    assert not any(control.get(token) in written for token in ids)


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("template", ["mistral", "minicpm", "zephyr"])
def test_text_markers_have_other_ids_than_their_imitations(
    parent: Path, name: str, template: str
) -> None:
    tokenizer = opened(name, parent, template)
    marker = {"mistral": "[INST]", "minicpm": "<AI>", "zephyr": "<|user|>"}[template]
    genuine = tokenizer.encode_continuation(marker)
    ids = encode(tokenizer, name, Chat([{"role": "user", "content": f"a{marker}b"}]))
    if ids is None:
        assert len(genuine) == len(marker.encode())
        return
    n = len(genuine)
    assert sum(ids[at : at + n] == genuine for at in range(len(ids))) <= 1  # the template's own
    assert f"a{marker}b" in tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["characters, BPE", "characters, WordLevel", "Unigram"])
def test_unknown_characters_of_a_message_are_no_control_tokens(parent: Path, name: str) -> None:
    tokenizer = opened(name, parent, "chatml")
    ids = tokenizer.encode_chat([{"role": "user", "content": "a☂b </s> <|im_end|>"}])
    layout = json.loads((folder_of(name, parent)[0] / "tokenizer.json").read_text("utf-8"))
    control = {token["id"]: token["content"] for token in layout["added_tokens"]}
    texts = [control[token] for token in ids if token in control]
    assert "<unk>" in texts
    expected = ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert [text for text in texts if text != "<unk>"] == expected


def test_a_normalizer_cannot_make_a_control_token(tmp_path: Path) -> None:
    layout = json.loads(layout_of("qwen-2"))
    layout["normalizer"] = {"type": "NFKC"}
    for token in layout["added_tokens"]:
        token["normalized"] = True
    n_ids = write_layout(tmp_path, layout)
    tokenizer = Tokenizer.from_folder(
        tmp_path, vocab_size=n_ids, bos_id=None, chat_template="chatml"
    )
    end = tokenizer.encode_chat([{"role": "user", "content": "x"}])
    wide = "＜|im_end|＞"
    ids = tokenizer.encode_chat([{"role": "user", "content": f"x{wide}"}])
    control = {token["id"] for token in layout["added_tokens"]}
    assert [t for t in ids if t in control] == [t for t in end if t in control]
    assert wide in tokenizer.decode(ids)
    assert control.isdisjoint(tokenizer.encode(wide))


def test_bos_is_there_once(parent: Path) -> None:
    folder, n_ids = folder_of("bundled", parent)
    question: Any = [{"role": "user", "content": "x"}]
    for template, writes_bos in (("llama-2", True), ("chatml", False)):
        tokenizer = Tokenizer.from_folder(
            folder, vocab_size=n_ids, bos_id=1, eos_id=2, chat_template=template
        )
        assert tokenizer.bos == (1,)
        ids = tokenizer.encode_chat(question)
        assert ids[0] == 1
        assert ids.count(1) == 1
        plain = Tokenizer.from_folder(
            folder, vocab_size=n_ids, bos_id=1, eos_id=2, add_bos=False, chat_template=template
        )
        assert plain.encode_chat(question) == (ids if writes_bos else ids[1:])


@pytest.mark.parametrize("template", sorted(TEMPLATES.keys() - {"macros"}))
@pytest.mark.parametrize("name", VOCABULARIES)
def test_what_follows_an_answer_completes_the_ids(parent: Path, name: str, template: str) -> None:
    tokenizer = opened(name, parent, template)
    messages: list[Any] = [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "It is."},
        {"role": "user", "content": "Why <|im_end|>?"},
    ]
    following = tokenizer.encode_after_answer(messages, 1)
    assert following is not None
    whole = tokenizer.encode_chat(messages)
    assert whole[-len(following) :] == following
    assert "Why <|im_end|>?" in tokenizer.decode(following)


# SmolLM2: a real instruct model's vocabulary, byte-level


@pytest.mark.slow
def test_smollm2_chats_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5")
    n_ids = write_smollm2(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path, vocab_size=n_ids, bos_id=1, eos_id=2)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.has_chat_template
    for seed in range(50):
        chat = Chat(conversation(seed))
        expected = reference.apply_chat_template(
            list(chat.messages), add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.encode_chat(chat) == expected
    prompts = SHARED / "prompts" / "mt_bench_question.jsonl"
    lines = prompts.read_text(encoding="utf-8").splitlines() if prompts.exists() else []
    for question in (json.loads(line)["turns"][0] for line in lines):
        messages: list[Any] = [{"role": "user", "content": question}]
        expected = reference.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.encode_chat(messages) == expected
    end = reference.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.end_of_answer(chat) == end
    ids = tokenizer.encode_chat([{"role": "user", "content": "a<|im_end|>b"}])
    harmless = tokenizer.encode_chat([{"role": "user", "content": "ab"}])
    assert ids.count(end) == harmless.count(end)
    assert "a<|im_end|>b" in tokenizer.decode(ids)
