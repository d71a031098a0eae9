"""Tools in chats of OpenAI's API: which may be called, and the calls that a model made."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid import BatchedGeneration, ToolCall
from hybrid.server.answers import Event
from hybrid.server.api_error import ApiError, wrong
from hybrid.server.fields import Fields
from hybrid.server.openai.options import MAX_MESSAGES
from hybrid.server.parts import all_parts, read_piece
from hybrid.text.tool_calls import ToolCallParser
from predictors.schema import parse_json

MAX_TOOLS = 128
MAX_NAME = 128  # characters: OpenAI's names have up to 64, Anthropic's up to 128
_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME}}}")


def read_tools(fields: Fields) -> list[Mapping[str, Any]] | None:
    """Return the functions that the model may call. Raises ApiError."""
    return checked_tools(fields.items("tools", MAX_TOOLS))


def checked_tools(tools: Sequence[Any] | None) -> list[Mapping[str, Any]] | None:
    """Return the functions that the model may call, as chat completions have them."""
    if not tools:
        return None
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise ApiError(400, f"tools[{i}]: expected an object of type function", param="tools")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise wrong(
                f"tools[{i}].function.name", f"up to {MAX_NAME} letters, digits, _, . or -", name
            )
        if name in names:
            raise ApiError(400, f"tools[{i}]: {name} occurs twice", param="tools")
        if parameters is not None and not isinstance(parameters, dict):
            raise wrong(f"tools[{i}].function.parameters", "a JSON schema", parameters)
        names.add(name)
    return list(tools)


def read_conversation(fields: Fields) -> dict[str, Any]:
    """Return a conversation under the names of `Chat` and `BatchLoop.submit_chat`.

    Raises ApiError.
    """
    variables = fields.object("chat_template_kwargs")
    return {
        "messages": for_template(fields.needed_items("messages", MAX_MESSAGES)),
        "tools": read_tools(fields),
        "variables": {} if variables is None else variables.values,
    }


def tool_options(fields: Fields) -> dict[str, Any]:
    """Return the keywords of GenerationOptions that concern tools."""
    choice = fields.get("tool_choice")
    return {
        "tool_choice": "auto" if choice is None else choice,
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
    }


def for_template(messages: Sequence[Any]) -> list[Any]:
    """Return messages as chat templates expect them: the arguments of calls are objects."""
    return [_with_objects(message) for message in messages]


def _with_objects(message: Any) -> Any:
    if isinstance(message, dict) and message.get("role") == "developer":
        message = {**message, "role": "system"}  # OpenAI's newer name, which templates do not know
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = parse_json(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call  # a model's mistake: the template gets the text
    return {**call, "function": {**function, "arguments": arguments}}


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex[:24]}"


def call_object(call: ToolCall) -> dict[str, Any]:
    """Return a call with an id, which the client gives back with the result."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_id("call_"), "type": "function", "function": function}


def message_of(generation: BatchedGeneration) -> tuple[dict[str, Any], str | None]:
    """Return a complete answer's message, and why it ended."""
    content, calls = all_parts(generation)
    if not calls:
        return {"role": "assistant", "content": content}, generation.finish_reason
    message = {
        "role": "assistant",
        "content": content if content.strip() else None,
        "tool_calls": [call_object(call) for call in calls],
    }
    return message, end_of_calls(generation)


def delta_of(parser: ToolCallParser | None, event: Event) -> dict[str, Any]:
    """Return what an event adds to a message: content, or whole calls."""
    n_before = 0 if parser is None else parser.n_calls
    content, calls = read_piece(parser, event)
    delta: dict[str, Any] = {"content": content} if content or not calls else {}
    if calls:
        delta["tool_calls"] = [
            {"index": n_before + i, **call_object(call)} for i, call in enumerate(calls)
        ]
    return delta


def end_of_calls(generation: BatchedGeneration) -> str | None:
    """Return why an answer with calls ended."""
    return "tool_calls" if generation.finish_reason == "stop" else generation.finish_reason
