"""Calls are read from what models write, in any pieces, and what is no call stays text."""

from __future__ import annotations

import json

import pytest

from hybrid.errors import InvalidOption
from hybrid.text.chat import Chat
from hybrid.text.tool_calls import (
    BareJson,
    PythonCalls,
    TaggedJson,
    ToolCallParser,
    ToolFormat,
    XmlCalls,
    described,
    format_of,
    read_wish,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "class": {"type": "string"},
                    "places": {"type": "array"},
                },
            },
        },
    }
]
FORMATS = {"tagged": TaggedJson, "bare": BareJson, "xml": XmlCalls, "python": PythonCalls}
P = "<|tool_call_start|>\n```python\n{}\n```\n<|tool_call_end|>"


def read(format: ToolFormat, text: str, size: int = 10**9) -> tuple[str, list[tuple[str, object]]]:
    """Return content and calls of a text that comes in pieces of `size` characters."""
    parser, content, calls = ToolCallParser(format), "", []
    for first in range(0, len(text), size):
        more, found = parser.push(text[first : first + size])
        content, calls = content + more, calls + found
    more, found = parser.finish()
    assert parser.n_calls == len(calls + found)
    named = [(call.name, json.loads(call.arguments)) for call in calls + found]
    return content + more, named


CASES = [
    # (format, what the model writes, content, calls)
    ("tagged", "Hello.", "Hello.", []),
    ("tagged", "a < b <tool", "a < b <tool", []),
    (
        "tagged",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Berlin"}}\n'
        "</tool_call>",
        "Let me see.\n",
        [("weather", {"city": "Berlin"})],
    ),
    (
        "tagged",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": "{\\"x\\": 1}"}</tool_call>\n',
        "",
        [("f", {}), ("g", {"x": 1})],
    ),
    (
        "tagged",  # a text inside looks like the end
        '<tool_call>{"name": "f", "arguments": {"x": "</tool_call> no"}}</tool_call> Done.',
        "Done.",
        [("f", {"x": "</tool_call> no"})],
    ),
    ("tagged", '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", {"a": 1})]),
    ("tagged", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("tagged", "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    ("tagged", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("bare", "Hello {there}.", "Hello {there}.", []),
    ("bare", '{"name": "weather", "parameters": {"x": [1, null]}}', "",
     [("weather", {"x": [1, None]})]),
    ("bare", ' \n{"name": "weather", "arguments": {}}', "", [("weather", {})]),
    ("bare", '{"name": "Mia", "parameters": {}}', '{"name": "Mia", "parameters": {}}', []),
    ("bare", '{"name": "weather", "age": 3}', '{"name": "weather", "age": 3}', []),
    ("bare", '<|python_tag|>{"name": "f", "parameters": {}}<|eom_id|>', "", [("f", {})]),
    (
        "bare",
        '{"name": "weather", "parameters": {}}; {"name": "weather", "parameters": {"days": 1}}',
        "",
        [("weather", {}), ("weather", {"days": 1})],
    ),
    ("bare", '{"color": "red"}', '{"color": "red"}', []),
    ("bare", '  {"name": "f"', '  {"name": "f"', []),
    (
        "xml",
        'Sure. <function name="weather"><param name="city">New York</param>'
        '<param name="days">3</param><param name="exact">true</param></function>',
        "Sure. ",
        [("weather", {"city": "New York", "days": 3, "exact": True})],
    ),
    (
        "xml",  # a template writes Python's words
        '<function name="weather"><param name="exact">True</param>'
        "<param name=\"places\">['a', 1]</param><param name=\"city\">5</param></function>",
        "",
        [("weather", {"exact": True, "places": ["a", 1], "city": "5"})],
    ),
    (
        "xml",
        '<function name="weather"><param name="city"><![CDATA[a</param></function>\n<b>]]></param>'
        '</function>\n<function name="other"></function>',
        "",
        [("weather", {"city": "a</param></function>\n<b>"}), ("other", {})],
    ),
    ("xml", '<function name="f"><param name="x">1</param>', "", [("f", {"x": 1})]),
    ("xml", '<function name="f"><param name="x">1', '<function name="f"><param name="x">1', []),
    ("xml", "<functional programming>", "<functional programming>", []),
    ("python", P.format('weather(city="Bonn", days=-2, exact=True)'), "",
     [("weather", {"city": "Bonn", "days": -2, "exact": True})]),
    ("python", P.format('weather(class_="a", places=[1, {"b": None}])'), "",
     [("weather", {"class": "a", "places": [1, {"b": None}]})]),
    ("python", P.format('weather("Bonn", 2)'), "", [("weather", {"city": "Bonn", "days": 2})]),
    ("python", "Hm.\n" + P.format("f()\ng(x=1.5)") + "\n", "Hm.\n", [("f", {}), ("g", {"x": 1.5})]),
    ("python", P.format('get-weather(city="Bonn")'), "", [("get-weather", {"city": "Bonn"})]),
    ("python", P.format("tools.weather(days=1)"), "", [("tools.weather", {"days": 1})]),
    ("python", "<|tool_call_start|>f(x=1)<|tool_call_end|>", "", [("f", {"x": 1})]),
    *(
        ("python", P.format(code), P.format(code), [])
        for code in (
            "import os",
            "f(x=os.getcwd())",
            "f(x=(lambda: 1)())",
            "f(*[1])",
            "f(**{'a': 1})",
            "f(1)",
            "x = f(a=1)",
            "f(a=1)(b=2)",
            "f(x='\\ud800')",
            "f(x={1, 2})",
            "f(",
            "",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_are_read_in_any_pieces(name, text, content, calls):
    for size in (10**9, 1, 2, 3, 7):
        assert read(FORMATS[name](TOOLS), text, size) == (content, calls), size


def test_a_call_without_end_does_not_grow_for_ever():
    parser = ToolCallParser(TaggedJson())
    for _ in range(300):
        assert parser.push("<tool_call>" + "[" * 1000) == ("", [])
    content, calls = parser.finish()
    assert calls == []
    assert len(content) == 300 * 1011


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_calls_are_text(name):
    format = FORMATS[name](TOOLS)
    deep = "[" * 20_000 + "]" * 20_000
    bodies = (deep, '{"name": "f", "arguments": ' + deep + "}", f"f(x={deep})", "\0", "9" * 9000)
    for body in bodies:
        content, calls = read(format, f"{format.begin}{body}{format.end}")
        assert not calls
        assert body.strip() in content


def test_the_template_shows_the_format():
    assert isinstance(format_of("x <|tool_call_start|> y"), PythonCalls)
    assert isinstance(format_of('<function name="..."><param name="x">'), XmlCalls)
    assert isinstance(format_of("<tool_call> ipython"), TaggedJson)
    assert isinstance(format_of("role == 'ipython'"), BareJson)
    assert isinstance(format_of("{{ messages }}"), TaggedJson)


def test_a_template_without_tools_gets_them_in_a_message():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    system, user, assistant, result = described(Chat(messages, TOOLS)).messages
    assert system["content"].startswith("Be kind.\n\n")
    assert '"name": "weather"' in system["content"]
    assert user == messages[1]
    said = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert assistant == {"role": "assistant", "content": said}
    assert read(TaggedJson(), said) == ("", [("f", {"x": 1})])
    assert result == {"role": "user", "content": "<tool_response>\n42\n</tool_response>"}
    first, _ = described(Chat(messages[1:2], TOOLS)).messages
    assert first["role"] == "system"


def test_choices():
    assert read_wish("auto") == (True, False, None)
    assert read_wish("none") == (False, False, None)
    assert read_wish("required") == (True, True, None)
    assert read_wish({"type": "function", "function": {"name": "f"}}) == (True, True, "f")
    for wrong in ("always", {}, {"function": {}}, {"function": 5}, 7, None):
        with pytest.raises(InvalidOption, match="tool_choice: expected"):
            read_wish(wrong)
