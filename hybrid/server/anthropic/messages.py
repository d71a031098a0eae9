"""POST /v1/messages: Anthropic's API for conversations, and how many tokens one has.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from hybrid import BatchedGeneration, GenerationOptions, ToolCall
from hybrid.server.answers import Answers
from hybrid.server.api_error import ApiError, wrong
from hybrid.server.events import logged, named_event
from hybrid.server.fields import Fields
from hybrid.server.openai.options import (
    MAX_MESSAGES,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOKENS,
)
from hybrid.server.openai.tools import MAX_TOOLS, checked_tools, new_id
from hybrid.server.parts import all_parts, parts_of
from hybrid.server.service import Model
from hybrid.text.chat import Chat
from predictors.schema import parse_json

_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class MessageRun:
    """A message while it is generated."""

    def __init__(self, model: Model, fields: Fields) -> None:
        """Submit what a request wants. Raises ApiError or HybridError."""
        self._model = model
        max_tokens = fields.integer("max_tokens", 1, MAX_TOKENS)
        if max_tokens is None:
            raise fields.needs("max_tokens")
        options = GenerationOptions(
            max_tokens=max_tokens,
            temperature=fields.number("temperature", 0, 100),
            top_p=fields.number("top_p", 0, 1),
            top_k=fields.integer("top_k", 0, 1 << 20),
            stop=fields.texts("stop_sequences", MAX_STOPS, MAX_STOP_LENGTH),
            **_tool_options(fields),
        )
        self.is_stream = fields.boolean("stream")
        generation = model.loop.submit_chat(
            read_messages(fields), tools=_read_tools(fields), options=options
        )
        self._generation, self._answers = generation, Answers("msg_", [generation])

    async def result(self) -> dict[str, Any]:
        """Return the whole response."""
        await self._answers.wait()
        content, calls = all_parts(self._generation)
        blocks: list[dict[str, Any]] = []
        if content or not calls:
            blocks.append({"type": "text", "text": content})
        blocks += [{**_block(call), "input": parse_json(call.arguments)} for call in calls]
        return self._message(blocks, self._reason(bool(calls)))

    def close(self) -> None:
        self._answers.close()

    async def events(self, ping_s: float) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        try:
            async for event in self._events(ping_s):
                yield event
        except Exception as error:
            yield named_event("error", logged(error).body_at("/messages"))

    async def _events(self, ping_s: float) -> AsyncIterator[bytes]:
        yield named_event("message_start", {"message": self._message([], None)})
        index, in_text, has_calls = -1, False, False
        async for part in parts_of(self._answers, ping_s):
            if part is None:
                yield named_event("ping", {})
                continue
            is_text = isinstance(part, str)
            if in_text and not is_text:
                yield named_event("content_block_stop", {"index": index})
                in_text = False
            if not in_text:
                index += 1
                block = {"type": "text", "text": ""} if is_text else _block(part)
                yield named_event("content_block_start", {"index": index, "content_block": block})
                in_text = is_text
            yield named_event("content_block_delta", {"index": index, "delta": _delta(part)})
            if isinstance(part, ToolCall):
                has_calls = True
                yield named_event("content_block_stop", {"index": index})
        if index < 0:  # an answer without a word is a text, too
            index, in_text = 0, True
            block = {"type": "text", "text": ""}
            yield named_event("content_block_start", {"index": 0, "content_block": block})
        if in_text:
            yield named_event("content_block_stop", {"index": index})
        end = {
            "stop_reason": self._reason(has_calls),
            "stop_sequence": self._generation.stop_string,
        }
        yield named_event("message_delta", {"delta": end, "usage": self._usage()})
        yield named_event("message_stop", {})

    def _message(self, content: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
        return {
            "id": self._answers.id,
            "type": "message",
            "role": "assistant",
            "model": self._model.engine.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": self._generation.stop_string,
            "usage": self._usage(),
        }

    def _reason(self, has_calls: bool) -> str:
        generation: BatchedGeneration = self._generation
        if generation.stop_string is not None:
            return "stop_sequence"
        if has_calls and generation.finish_reason == "stop":
            return "tool_use"
        return _REASONS.get(generation.finish_reason or "", "end_turn")

    def _usage(self) -> dict[str, int]:
        usage = self._answers.usage()
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion,
        }


def count_tokens(model: Model, fields: Fields) -> dict[str, int]:
    """Return the number of tokens of a conversation's prompt."""
    tokenizer = model.engine.tokenizer
    chat = Chat(read_messages(fields), _read_tools(fields))
    return {"input_tokens": len(tokenizer.encode_chat(tokenizer.with_tools(chat)))}


def read_messages(fields: Fields) -> list[Any]:
    """Return a request's messages as chat templates expect them. Raises ApiError."""
    given = fields.needed_items("messages", MAX_MESSAGES)
    messages: list[Any] = []
    system = fields.get("system")
    if system is not None:
        messages.append({"role": "system", "content": _text_of(system, "system")})
    for i, message in enumerate(given):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in (
            "user",
            "assistant",
            "system",
        ):
            raise wrong(name, "an object with the role user or assistant", message)
        messages += _converted(message, name)
    return messages


def _converted(message: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the messages that one with blocks stands for: results of tools are messages."""
    content, role = message.get("content"), message["role"]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise wrong(f"{name}.content", "a string or a list of blocks", content)
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for j, block in enumerate(content):
        where = f"{name}.content[{j}]"
        kind = block.get("type") if isinstance(block, dict) else None
        match kind:
            case "text":
                texts.append(_text_of([block], where))
            case "tool_use":
                call = {"name": block.get("name"), "arguments": block.get("input", {})}
                calls.append({"id": block.get("id"), "type": "function", "function": call})
            case "tool_result":
                if texts:
                    messages.append({"role": role, "content": "".join(texts)})
                    texts = []
                text = _text_of(block.get("content") or "", where)
                call_id = block.get("tool_use_id")
                messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "redacted_thinking":
                continue
            case "image" | "document":
                raise ApiError(400, f"{where}: image input is not supported", param=where)
            case _:
                raise wrong(where, "a block of type text, tool_use or tool_result", kind)
    if texts or calls or thoughts or not messages:
        last: dict[str, Any] = {"role": role, "content": "".join(texts)}
        more = {"tool_calls": calls, "reasoning_content": "\n".join(thoughts)}
        messages.append(last | {name: value for name, value in more.items() if value})
    return messages


def _text_of(content: Any, name: str) -> str:
    """Return the text of a string or of blocks of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(name, "a string or a list of blocks", content)
    texts = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in ("image", "document"):
            raise ApiError(400, f"{name}: image input is not supported", param=name)
        if kind != "text" or not isinstance(block.get("text"), str):
            raise wrong(name, "a block of type text", kind)
        texts.append(block["text"])
    return "".join(texts)


def _read_tools(fields: Fields) -> Sequence[Mapping[str, Any]] | None:
    tools = fields.items("tools", MAX_TOOLS)
    functions = []
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, dict) or tool.get("type", "custom") != "custom":
            raise wrong(f"tools[{i}]", "a tool with a name and an input_schema", tool)
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        functions.append({"type": "function", "function": function})
    return checked_tools(functions)


def _tool_options(fields: Fields) -> dict[str, Any]:
    choice = fields.object("tool_choice")
    if choice is None:
        return {}
    kind = choice.text("type", "auto")
    one = choice.boolean("disable_parallel_tool_use")
    if kind == "tool":
        return {"tool_choice": {"name": choice.text("name", "")}, "parallel_tool_calls": not one}
    if kind not in _CHOICES:
        raise wrong("tool_choice.type", "auto, any, tool or none", kind)
    return {"tool_choice": _CHOICES[kind], "parallel_tool_calls": not one}


def _block(part: str | ToolCall) -> dict[str, Any]:
    """Return the block of a call before its arguments come."""
    assert isinstance(part, ToolCall)
    return {"type": "tool_use", "id": new_id("toolu_"), "name": part.name, "input": {}}


def _delta(part: str | ToolCall) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text_delta", "text": part}
    return {"type": "input_json_delta", "partial_json": part.arguments}
