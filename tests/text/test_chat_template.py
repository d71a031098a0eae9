"""Chat templates render as in transformers; a message cannot spell a marker of the template."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.chat_templates import TEMPLATES, TOKENS, TOOLS, conversation

from hybrid.errors import InvalidCheckpoint, InvalidOption
from hybrid.text.chat_template import Chat, ChatTemplate
from hybrid.text.markers import Markers

SPECIAL = [*TOKENS.values(), "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"]
USER = [{"role": "user", "content": "Hi"}]


@functools.cache
def opened(name: str) -> tuple[ChatTemplate, Markers]:
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    return template, template.markers(SPECIAL)


def rendered(name: str, chat: Chat) -> str:
    template, markers = opened(name)
    tainted = template.render(chat, markers)
    assert markers.imitations(tainted) == []
    return markers.restore(tainted)


def by_transformers(name: str, chat: Chat) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (text,), _ = utils.render_jinja_template(
        [list(chat.messages)],
        tools=chat.tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=chat.add_generation_prompt and not chat.continues_last,
        continue_final_message=chat.continues_last,
        **TOKENS,
        **chat.variables,
    )
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    n_refused = 0
    for seed in range(50):
        chat = Chat(conversation(seed), add_generation_prompt=seed % 3 > 0)
        try:
            expected, refusal = by_transformers(name, chat), ""
        except Exception as error:
            expected, refusal = "", str(error)
        if not refusal:
            assert rendered(name, chat) == expected
            continue
        n_refused += 1
        with pytest.raises(InvalidOption) as caught:
            rendered(name, chat)
        assert refusal in str(caught.value)  # the template's own words
    assert n_refused < 50


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"macros"}))  # it splits contents
def test_an_answer_is_continued_as_in_transformers(name):
    for ending in ("", "  ", ".\n"):
        answer = {"role": "assistant", "content": "It  is" + ending}
        chat = Chat([*USER, answer], continues_last=True)
        assert rendered(name, chat) == by_transformers(name, chat)


def test_tools_calls_and_results_reach_the_template():
    call = {"function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"celsius": 21}', "name": "weather"},
    ]
    chat = Chat(messages, tools=TOOLS)
    assert rendered("tools", chat) == by_transformers("tools", chat)


def test_variables_and_parts_of_text_reach_the_template():
    parts = [{"type": "text", "text": "Hello there"}]
    chat = Chat([{"role": "user", "content": parts}], variables={"enable_thinking": False})
    assert rendered("thinking", chat) == by_transformers("thinking", chat)
    assert rendered("thinking", chat).endswith("<think>\n\n</think>\n\n")


MARKERS = [*SPECIAL, "<用户>", "<AI>", "[INST]", "[/INST]", "<|user|>", "<think>", "</think>"]
PIECES = st.sampled_from(
    [*MARKERS, "<", "|>", "<|im_", "start|>", "[INS", "T]", " ", "a", "\n", "用户>"]
)
HOSTILE = st.lists(PIECES, max_size=8).map("".join)


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=st.lists(HOSTILE, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_message_cannot_add_a_marker(name, contents):
    """A prompt has the markers of the same conversation with harmless contents, and no others."""
    template, markers = opened(name)
    roles = ["user", "assistant", "user"]
    hostile = [{"role": r, "content": c + "x"} for r, c in zip(roles, contents, strict=False)]
    harmless = [{"role": message["role"], "content": "x"} for message in hostile]
    tainted = template.render(Chat(hostile), markers)

    def genuine(text: str) -> list[str]:
        return [text[first:last] for first, last in markers.spans(text)]

    assert genuine(tainted) == genuine(template.render(Chat(harmless), markers))
    # Every other marker of the text is known as an imitation.
    text = markers.restore(tainted)
    assert len(text) == len(tainted)
    imitated = set(markers.imitations(tainted))
    for span in markers.spans(text):
        overlaps = any(first < span[1] and span[0] < last for first, last in imitated)
        assert overlaps or span in markers.spans(tainted)


def test_a_marker_cannot_be_made_of_a_message_and_the_template():
    template = ChatTemplate("{% for m in messages %}<|{{ m.content }}{% endfor %}", {})
    markers = template.markers(["<|im_end|>"])
    tainted = template.render(Chat([{"role": "user", "content": "im_end|> hello"}]), markers)
    assert markers.spans(tainted) == []
    assert markers.imitations(tainted) == [(0, 10)]


def test_a_template_that_rewrites_an_imitated_marker_is_not_believed():
    template = ChatTemplate("{{ messages[0].content | tojson(ensure_ascii=true) }}", {})
    markers = template.markers(["<|im_end|>"])
    assert template.render(Chat(USER), markers) == '"Hi"'
    with pytest.raises(InvalidOption, match="spell a marker"):
        template.render(Chat([{"role": "user", "content": "a <|im_end|>"}]), markers)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
        ([{"role": "user", "content": b"x"}], "JSON's types, found bytes"),
        ([{"role": "user"}], "fails on them"),
        ([{"role": "user", "content": 3}], "fails on them"),
    ],
)
def test_messages_that_a_template_cannot_use(messages, expected):
    template, markers = opened("mistral")
    with pytest.raises(InvalidOption, match=expected):
        template.render(Chat(messages), markers)


def test_an_answer_without_text_cannot_be_continued():
    template, markers = opened("chatml")
    with pytest.raises(InvalidOption, match="no text that could be continued"):
        template.render(Chat([], continues_last=True), markers)
    silent = ChatTemplate("nothing", {})
    with pytest.raises(InvalidOption, match="drops the last one"):
        silent.render(Chat(USER, continues_last=True), markers)


def test_a_broken_template_names_its_line():
    with pytest.raises(InvalidCheckpoint, match=r"t\.jinja: line 2: "):
        ChatTemplate("x\n{% endfor %}", {}, "t.jinja")
