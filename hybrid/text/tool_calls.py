"""Tool calls: how a model writes that it wants a function called, read from its text.

Each family of chat templates has a format of its own, and a template shows which one it is. What a
model writes is only parsed, never executed.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hybrid.errors import InvalidOption
from hybrid.text.chat import Chat
from predictors.schema import parse_json

MAX_CALL = 256 << 10  # characters of a call that is read; a longer one stays text
Tool = Mapping[str, Any]  # as in OpenAI's API: {"type": "function", "function": {...}}


class ToolCall(NamedTuple):
    """A function that the model wants called."""

    name: str
    arguments: str  # a JSON object


class ToolWish(NamedTuple):
    """What a caller wants of a chat's tools."""

    is_allowed: bool = True
    is_required: bool = False
    name: str | None = None  # of the only one that may be called


def read_wish(choice: str | Mapping[str, Any]) -> ToolWish:
    """Return what OpenAI's `tool_choice` means. Raises InvalidOption."""
    if choice in ("auto", "none", "required"):
        return ToolWish(is_allowed=choice != "none", is_required=choice == "required")
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidOption(
            'tool_choice: expected "auto", "none", "required" or the name of a function as '
            f'{{"type": "function", "function": {{"name": "..."}}}}, found {choice!r:.80}'
        )
    return ToolWish(is_required=True, name=name)


class ToolFormat:
    """How calls are written: between markers. Subclasses read what is between them."""

    begin: str
    end: str
    markers: tuple[str, ...]  # texts that may be special tokens of a vocabulary

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        """`tools` are the functions that may be called, which may say more of arguments' types."""
        self.parameters = {name: parameters for name, parameters in map(function_of, tools)}

    def find(self, text: str, *, is_start: bool) -> int:
        """Return where a call begins, or -1. `is_start`: the answer begins with this text."""
        return text.find(self.begin)

    def held(self, text: str, *, is_start: bool) -> int:
        """Return how many of the last characters may be the beginning of a call."""
        most = min(len(self.begin) - 1, len(text))
        return next((n for n in range(most, 0, -1) if self.begin.startswith(text[-n:])), 0)

    def parse(self, text: str) -> list[ToolCall]:
        """Return the calls in a text from `begin` to `end`, which may lack its end.

        Raises ValueError if it is no call.
        """
        raise NotImplementedError


class TaggedJson(ToolFormat):
    """Hermes, Qwen and other ChatML models: <tool_call>{"name": …, "arguments": …}</tool_call>."""

    begin, end = "<tool_call>", "</tool_call>"
    markers = (begin, end)

    def parse(self, text: str) -> list[ToolCall]:
        inner = text.removeprefix(self.begin).removesuffix(self.end).strip()
        return [_call_of(parse_json(inner), "arguments")]


class BareJson(ToolFormat):
    """Llama 3: the whole answer is {"name": …, "parameters": …}, perhaps after <|python_tag|>."""

    begin, end = "<|python_tag|>", "<|eom_id|>"
    markers = (begin,)

    def find(self, text: str, *, is_start: bool) -> int:
        if is_start and text.lstrip().startswith("{"):
            return 0
        return text.find(self.begin)

    def held(self, text: str, *, is_start: bool) -> int:
        if is_start and not text.strip():
            return len(text)
        return super().held(text, is_start=is_start)

    def parse(self, text: str) -> list[ToolCall]:
        decoder, calls = json.JSONDecoder(), list[ToolCall]()
        left = text.strip().removeprefix(self.begin).removesuffix(self.end).strip()
        while left:
            value, end = decoder.raw_decode(left)
            call = _call_of(value, "parameters")
            # An answer may be another JSON object that has a name, too.
            is_marked = self.begin in text or call.name in self.parameters
            if not is_marked or not {*value} <= {"type", "name", "parameters", "arguments"}:
                raise ValueError("some other object")
            calls.append(call)
            left = left[end:].lstrip("; \n\t")
        return calls


class XmlCalls(ToolFormat):
    """MiniCPM5: <function name="f"><param name="x">value</param></function>."""

    begin, end = "<function", "</function>"
    markers = ("<function", "</function>", "<param", "</param>")

    _OPEN = re.compile(r'<function\s+name="([^"]{1,200})"\s*>\s*')
    _PARAM = re.compile(r'<param\s+name="([^"]{1,200})"\s*>(<!\[CDATA\[)?')

    def parse(self, text: str) -> list[ToolCall]:
        opened = self._OPEN.match(text)
        if opened is None:
            raise ValueError("no name")
        name, at, arguments = opened[1], opened.end(), dict[str, Any]()
        types = (self.parameters.get(name) or {}).get("properties") or {}
        while param := self._PARAM.match(text, at):
            close = "]]></param>" if param[2] else "</param>"
            end = text.find(close, param.end())
            if end < 0:
                raise ValueError("a parameter without its end")
            arguments[param[1]] = _typed(text[param.end() : end], types.get(param[1]))
            at = end + len(close)
            while at < len(text) and text[at].isspace():
                at += 1
        if text[at:].strip() not in ("", self.end):
            raise ValueError("something that is no parameter")
        return [ToolCall(name, _to_json(arguments))]


class PythonCalls(ToolFormat):
    """MiniCPM3: Python calls with keywords, between <|tool_call_start|> and <|tool_call_end|>."""

    begin, end = "<|tool_call_start|>", "<|tool_call_end|>"
    markers = (begin, end)

    _FENCE = re.compile(r"\A\s*```(?:python|py)?[ \t]*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
    _NAME = re.compile(r"\s*([A-Za-z_][\w.-]*)\(")

    def parse(self, text: str) -> list[ToolCall]:
        code = text.removeprefix(self.begin).removesuffix(self.end)
        if fenced := self._FENCE.match(code):
            code = fenced[1]
        code = code.strip()
        calls = [self._call(statement) for statement in _statements(code)]
        named = self._NAME.match(code)
        if None in calls and named is not None:  # one call, of a name such as get-weather
            (statement,) = _statements("call" + code[named.end() - 1 :]) or (None,)
            only = None if statement is None else self._call(statement)
            calls = [None if only is None else ToolCall(named[1], only.arguments)]
        found = [call for call in calls if call is not None]
        if not found or len(found) < len(calls):
            raise ValueError("something that is no call")
        return found

    def _call(self, statement: ast.stmt) -> ToolCall | None:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, (ast.Name, ast.Attribute)):
            return None
        name, arguments = ast.unparse(call.func), dict[str, Any]()
        names = [*((self.parameters.get(name) or {}).get("properties") or {})]
        if len(call.args) > len(names):
            return None  # without a schema a value has no name
        for key, value in zip(names, call.args, strict=False):
            arguments[key] = ast.literal_eval(value)
        for argument in call.keywords:
            if argument.arg is None:
                return None
            arguments[unescaped(argument.arg)] = ast.literal_eval(argument.value)
        return ToolCall(name, _to_json(arguments))


def escaped(name: str) -> str:
    """Return the name of a parameter in Python: keywords get a _ behind them."""
    return name + "_" if keyword.iskeyword(name) else name


def unescaped(name: str) -> str:
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


class ToolCallParser:
    """Separates an answer, piece by piece, into what it says and what it wants called."""

    def __init__(self, format: ToolFormat) -> None:
        self._format = format
        self._text, self._is_call = "", False  # what was not returned, and whether a call began
        self._is_start = self._skips_space = True
        self._n_seen = 0  # characters of a call in which no end was found
        self.n_calls = 0

    def push(self, piece: str) -> tuple[str, list[ToolCall]]:
        """Return the content and the calls that a piece makes certain."""
        self._text += piece
        content, calls = "", list[ToolCall]()
        while True:
            if self._is_call:
                found = self._take_calls()
                if found is None:
                    return content, calls
                calls += found
                self._is_call, self._skips_space = False, True
                continue
            at = self._format.find(self._text, is_start=self._is_start)
            n = len(self._text) if at < 0 else at
            if at < 0:
                n -= self._format.held(self._text, is_start=self._is_start)
            content += self._take_content(n)
            if at < 0:
                return content, calls
            self._is_call, self._n_seen = True, 0

    def finish(self, piece: str = "") -> tuple[str, list[ToolCall]]:
        """Return what a last piece makes certain, and what is left. A call without end counts."""
        content, calls = self.push(piece)
        text, self._text = self._text, ""
        if self._is_call and len(text) <= MAX_CALL:
            last = _parsed(self._format, text)
            if last is not None:
                self.n_calls += len(last)
                return content, calls + last
        if self._skips_space and not self._is_call:
            text = text.lstrip() if self.n_calls else text
        return content + text, calls

    def _take_calls(self) -> list[ToolCall] | None:
        """Return the calls at the beginning of the text, if their end is there."""
        end, text = self._format.end, self._text
        if len(text) > MAX_CALL:
            return None
        while (at := text.find(end, max(self._n_seen - len(end) + 1, 0))) >= 0:
            self._n_seen = at + len(end)
            calls = _parsed(self._format, text[: self._n_seen])
            if calls is not None:
                self._text = text[self._n_seen :]
                self.n_calls += len(calls)
                return calls
        self._n_seen = len(text)
        return None

    def _take_content(self, n: int) -> str:
        content, self._text = self._text[:n], self._text[n:]
        if self._skips_space and self.n_calls:  # between calls there are line breaks
            content = content.lstrip()
        if content:
            self._is_start = self._skips_space = False
        return content


def function_of(tool: Tool) -> tuple[str, Mapping[str, Any]]:
    """Return a function's name and the JSON schema of its parameters."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        return "", {}
    parameters = function.get("parameters")
    return str(function.get("name", "")), parameters if isinstance(parameters, Mapping) else {}


def described(chat: Chat) -> Chat:
    """Return a conversation for a template that knows no tools: its messages say all of them.

    The format is that of Hermes (https://github.com/NousResearch/Hermes-Function-Calling).
    """
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in chat.tools or ())
    note = _NOTE.replace("TOOLS", tools)
    messages = [_in_words(message) for message in chat.messages]
    if messages[0]["role"] == "system" and isinstance(messages[0].get("content"), str):
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{note}"}
    else:
        messages.insert(0, {"role": "system", "content": note})
    return replace(chat, messages=messages)


_NOTE = """\
You may call these functions:
<tools>
TOOLS
</tools>
To call one, write only:
<tool_call>
{"name": "function-name", "arguments": {"parameter": "value"}}
</tool_call>"""


def _in_words(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message whose calls, or whose result of one, are its text."""
    if message["role"] == "tool":
        result = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
        return {"role": "user", "content": result}
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    written = [message["content"]] if isinstance(message.get("content"), str) else []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        shown = {"name": function.get("name"), "arguments": function.get("arguments")}
        body = json.dumps(shown, ensure_ascii=False)
        written.append(f"{TaggedJson.begin}\n{body}\n{TaggedJson.end}")
    return {"role": message["role"], "content": "\n".join(written)}


def format_of(source: str, tools: Sequence[Tool] = ()) -> ToolFormat:
    """Return the format of the calls of models with this chat template."""
    if PythonCalls.begin in source:
        return PythonCalls(tools)
    if "<function" in source and "<param" in source:
        return XmlCalls(tools)
    if TaggedJson.begin not in source and ("python_tag" in source or "ipython" in source):
        return BareJson(tools)
    return TaggedJson(tools)


def _parsed(format: ToolFormat, text: str) -> list[ToolCall] | None:
    try:
        return format.parse(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _statements(code: str) -> list[ast.stmt]:
    if not code or len(code) > MAX_CALL:
        raise ValueError("no code")
    try:
        return ast.parse(code).body
    except SyntaxError:
        return [ast.Pass()]  # no call


def _call_of(value: Any, key: str) -> ToolCall:
    """Return the call that a JSON value is. Raises ValueError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("no name")
    other = {"arguments": "parameters", "parameters": "arguments"}[key]
    arguments = value.get(key, value.get(other, {}))
    if isinstance(arguments, str):
        arguments = parse_json(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments that are no object")
    return ToolCall(value["name"], _to_json(arguments))


def _typed(text: str, schema: object) -> Any:
    """Return the value of an XML parameter by its schema's type; without one, JSON if it is."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return text
    for read in (parse_json, ast.literal_eval):
        try:
            return parse_json(_to_json(read(text.strip())))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _to_json(arguments: Any) -> str:
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # a lone surrogate is a ValueError
    return text
