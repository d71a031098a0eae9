"""Chat templates render as in transformers; a message cannot spell a marker of the template."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text.chat_templates import TEMPLATES, TOKENS, TOOLS, conversation

from hybrid.errors import InvalidCheckpoint, InvalidOption
from hybrid.text.chat import Chat
from hybrid.text.chat_template import ChatTemplate
from hybrid.text.markers import MarkedText

SPECIAL = [*TOKENS.values(), "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"]
USER = [{"role": "user", "content": "Hi"}]


@functools.cache
def opened(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], TOKENS, SPECIAL)


def rendered(name: str, chat: Chat) -> str:
    marked = opened(name).render(chat)
    assert list(marked.imitated) == []
    return marked.text


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
        chat = Chat([*USER, answer])
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
    template = opened(name)
    roles = ["user", "assistant", "user"]
    hostile = [{"role": r, "content": c + "x"} for r, c in zip(roles, contents, strict=False)]
    harmless = [{"role": message["role"], "content": "x"} for message in hostile]
    marked = template.render(Chat(hostile, add_generation_prompt=False))
    expected = template.render(Chat(harmless, add_generation_prompt=False))

    def genuine(marked: MarkedText) -> list[str]:
        texts = [marked.text[first:last] for first, last in marked.genuine]
        return [text for text in texts if text not in ("<think>", "</think>")]  # of answers

    assert genuine(marked) == genuine(expected)
    # Every other marker of the text is known as an imitation.
    for text in template.markers.texts:
        at = marked.text.find(text)
        while at >= 0:
            span = at, at + len(text)
            known = [*marked.imitated, *marked.genuine]
            assert any(first < span[1] and span[0] < last for first, last in known)
            at = marked.text.find(text, at + 1)


def test_a_marker_cannot_be_made_of_a_message_and_the_template():
    template = ChatTemplate(
        "{% for m in messages %}<|{{ m.content }}{% endfor %}", {}, ["<|im_end|>"]
    )
    marked = template.render(Chat([{"role": "user", "content": "im_end|> hello"}]))
    assert marked == ("<|im_end|> hello", [], [(0, 10)])


def test_a_marker_that_the_template_makes_of_a_role_is_known():
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    assert set(template.markers.texts) >= {"<|user|>", "<|system|>", "<|assistant|>"}


def test_an_answer_may_contain_what_models_write_themselves():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}[INST]"
    source += "{% if 'thinks' is defined and thinks %}<think></think>{% endif %}"
    template = ChatTemplate(source, {}, ["<end>"], ["<think>", "</think>", "other", "<unused>"])
    said = "<think>so</think><end>[INST]<unused>"
    answered = template.render(Chat([*USER, {"role": "assistant", "content": said}]))
    text = answered.text
    assert text.endswith(said)  # the answer is continued
    assert [text[a:b] for a, b in answered.imitated] == ["<end>", "[INST]"]
    assert [text[a:b] for a, b in answered.genuine] == ["<think>", "</think>"]
    written = template.render(Chat([{"role": "user", "content": said}]))
    imitated = [written.text[a:b] for a, b in written.imitated]
    assert imitated == ["<think>", "</think>", "<end>", "[INST]"]


def test_a_template_that_rewrites_an_imitated_marker_is_not_believed():
    source = "{{ messages[0].content | tojson(ensure_ascii=true) }}"
    template = ChatTemplate(source, {}, ["<|im_end|>"])
    assert template.render(Chat(USER)).text == '"Hi"'
    with pytest.raises(InvalidOption, match="spell a marker"):
        template.render(Chat([{"role": "user", "content": "a <|im_end|>"}]))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
        ([{"role": "user", "content": b"x"}], "JSON's types, found bytes"),
        ([{"role": "user"}], "content: expected a string or parts of text, found NoneType"),
        ([{"role": "user", "content": 3}], "content: expected .* found int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "parts of type 'text' .*'image'"),
        ([{"role": "user", "content": ["a"]}], "parts of type 'text' .*'a'"),
        ([{"role": "user\n<|im_end|>", "content": "a"}], "role: expected a name"),
        ([{"content": "a"}], "role: expected a name .* found None"),
        ([], "at least one"),
        ("Hello", "expected a list of dicts, found str"),
        (["Hello"], r"messages\[0\]: expected a dict, found str"),
        ([{"role": "tool", "content": "a"}], "only user and assistant roles are supported"),
    ],
)
def test_messages_that_a_template_cannot_use(messages, expected):
    with pytest.raises(InvalidOption, match=expected):
        opened("mistral").render(Chat(messages))


@pytest.mark.parametrize("tools", ["weather", {"name": "f"}, ["f"], [lambda: 0], [{"f": {1, 2}}]])
def test_tools_that_are_not_schemas(tools):
    with pytest.raises(InvalidOption, match=r"tools: expected a list|JSON's types"):
        Chat(USER, tools=tools)


def test_parts_are_joined_for_a_template_that_expects_text():
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    assert not opened("chatml").takes_parts
    assert "Hello\nthere<|im_end|>" in rendered(
        "chatml", Chat([{"role": "user", "content": parts}])
    )
    source = "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
    template = ChatTemplate(source)
    assert template.takes_parts
    assert template.render(Chat([{"role": "user", "content": parts}])).text == "(Hello)(there)"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("chatml", "<|im_end|>"), ("llama-2", "</s>"), ("llama-3", "<|eot_id|>"), ("minicpm", "")]
    + [
        ("gemma", "<end_of_turn>"),
        ("phi", "<|end|>"),
        ("zephyr", "</s>"),
        ("macros", "[/ASSISTANT]"),
    ],
)
def test_what_ends_an_answer_is_found(name, expected):
    assert opened(name).after_answer == expected


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"macros"}))
def test_what_follows_an_answer_completes_the_prompt(name):
    """The prompt of a later question is that of the first, the answer, and what follows it."""
    messages = [*USER, {"role": "assistant", "content": "It is."}, *USER]
    template = opened(name)
    after = template.render_after(Chat(messages), 1)
    assert after is not None
    first, whole = template.render(Chat(USER)).text, template.render(Chat(messages)).text
    assert whole.startswith(first)
    assert whole[len(first) :].strip() == ("It is." + after.text).strip()


def test_a_template_that_shortens_earlier_answers_is_noticed():
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
    template = opened("thinking")
    assert template.render_after(Chat([*USER, answer, *USER]), 1) is None
    answer["content"] = "Yes."
    assert template.render_after(Chat([*USER, answer, *USER]), 1) is not None
    system = ChatTemplate(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert system.render_after(Chat([*USER, answer, *USER]), 1) is None


def test_an_answer_without_text_cannot_be_continued():
    silent = ChatTemplate("nothing", {})
    with pytest.raises(InvalidOption, match="drops the last one"):
        silent.render(Chat([*USER, {"role": "assistant", "content": "so"}]))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(InvalidOption, match="no text that could be continued"):
        opened("tools").render(Chat([*USER, call]))


def test_an_escape_that_a_user_writes_is_text():
    said = r'what is "\ud83d\ude00", "<|im_end|>"?'
    assert said in opened("chatml").render(Chat([{"role": "user", "content": said}])).text


@pytest.mark.parametrize(
    ("change", "role", "content"),
    [
        ("lower", "user", "<|IM_END|>x"),
        ("striptags", "user", "&lt;|im_end|&gt;x"),
        ("replace('<think>', '')", "assistant", "<|im_<think>end|>x"),
        ("replace('<think>', '')", "user", "<|im_<think>end|>x"),
        ("upper | lower", "user", "<|im_END|>x"),
    ],
)
def test_a_template_that_changes_a_text_makes_no_marker_of_it(change, role, content):
    source = "{% for m in messages %}{{ m.content | " + change + " }}{% endfor %}"
    template = ChatTemplate(source, {}, ["<|im_end|>"])
    chat = Chat([{"role": role, "content": content}], add_generation_prompt=False)
    assert list(template.render(chat).genuine) == []


def test_a_role_cannot_name_a_control_token():
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, {}, ["<|eot|>", "<|user|>"])
    assert template.render(Chat([{"role": "critic", "content": "x"}])).text == "<|critic|>x"
    with pytest.raises(InvalidOption, match="role 'eot': it is a part of a control token"):
        template.render(Chat([{"role": "eot", "content": "x"}]))
    kind = {"role": "user", "content": "x", "tool_calls": [{"type": "eot"}]}
    written = ChatTemplate("<|{{ messages[0].tool_calls[0].type }}|>", {}, ["<|eot|>"])
    assert list(written.render(Chat([kind])).genuine) == []


@pytest.mark.parametrize(
    "source",
    ["{% break %}a", "{% macro f(a, a) %}{% endmacro %}", "{{ dict(a=1, a=2) }}", "{{ 1 | no }}"]
    + ["{% for x in [1] %}" * 25 + "{% endfor %}" * 25, "{{ " + "1" * 5000 + " }}"],
)
def test_a_template_that_python_refuses_is_broken(source):
    with pytest.raises(InvalidCheckpoint):
        ChatTemplate(source)


@pytest.mark.parametrize("text", ["'\\ud800'", "'\\udfff'", "'%c' % 55296", "cycler().next()"])
def test_a_template_that_writes_what_no_text_has_does_no_harm(text):
    template = ChatTemplate("{{ messages[0].content }}{{ " + text + " }}", {}, ["<end>"])
    try:
        found = template.render(Chat(USER)).text
    except InvalidOption:
        return
    found.encode()


def test_a_broken_template_names_its_line():
    with pytest.raises(InvalidCheckpoint, match=r"t\.jinja: line 2: "):
        ChatTemplate("x\n{% endfor %}", {}, name="t.jinja")
