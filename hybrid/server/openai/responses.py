"""POST /v1/responses: OpenAI's newer API for conversations. Nothing is stored.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from itertools import count
from typing import Any

from hybrid import GenerationOptions, ToolCall
from hybrid.server.answers import Answers
from hybrid.server.api_error import ApiError, wrong
from hybrid.server.events import PING, logged, named_event
from hybrid.server.fields import Fields
from hybrid.server.openai.options import MAX_MESSAGES, MAX_SEED, MAX_TOKENS, limit_of_chat
from hybrid.server.openai.tools import (
    MAX_TOOLS,
    checked_tools,
    for_template,
    new_id,
    tool_options,
)
from hybrid.server.parts import all_parts, parts_of
from hybrid.server.service import Model

_TEXT_PARTS = ("input_text", "output_text", "text")


class ResponseRun:
    """A response while it is generated."""

    def __init__(self, model: Model, fields: Fields) -> None:
        """Submit what a request wants. Raises ApiError or HybridError."""
        self._model, self._fields = model, fields
        if fields.has("previous_response_id"):
            raise ApiError(
                400,
                "previous_response_id: nothing is stored here; send the whole conversation",
                param="previous_response_id",
            )
        max_tokens = fields.integer("max_output_tokens", 1, MAX_TOKENS)
        options = GenerationOptions(
            max_tokens=limit_of_chat(model, max_tokens),
            temperature=fields.number("temperature", 0, 100),
            top_p=fields.number("top_p", 0, 1),
            seed=fields.integer("seed", -1, MAX_SEED),
            response_format=_response_format(fields),
            **tool_options(fields),
        )
        self.is_stream = fields.boolean("stream")
        generation = model.loop.submit_chat(
            for_template(read_input(fields)), tools=_read_tools(fields), options=options
        )
        self._generation, self._answers = generation, Answers("resp_", [generation])

    async def result(self) -> dict[str, Any]:
        """Return the whole response."""
        await self._answers.wait()
        content, calls = all_parts(self._generation)
        items = [_message(new_id("msg_"), content)] if content.strip() or not calls else []
        items += [_function_call(new_id("fc_"), call) for call in calls]
        return self._response(items)

    def close(self) -> None:
        self._answers.close()

    async def events(self, ping_s: float) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        numbers = count()

        def event(name: str, data: dict[str, Any]) -> bytes:
            return named_event(name, {"sequence_number": next(numbers), **data})

        try:
            async for name, data in self._events(ping_s):
                yield PING if name is None else event(name, data)
        except Exception as error:
            known = logged(error)
            fields = {"code": known.code, "message": known.message, "param": known.param}
            yield event("error", fields)

    async def _events(self, ping_s: float) -> AsyncIterator[tuple[str | None, dict[str, Any]]]:
        yield "response.created", {"response": self._response(None)}
        yield "response.in_progress", {"response": self._response(None)}
        items: list[dict[str, Any]] = []
        text, id = "", ""  # of the message that is open
        async for part in parts_of(self._answers, ping_s):
            if part is None:
                yield None, {}
                continue
            place = {"output_index": len(items)}
            if isinstance(part, ToolCall):
                if id:
                    for event in _end_of_message(id, text, place):
                        yield event
                    items.append(_message(id, text))
                    text = id = ""
                    place = {"output_index": len(items)}
                item = _function_call(new_id("fc_"), part)
                for event in _events_of_call(item, place):
                    yield event
                items.append(item)
                continue
            if not id:
                id = new_id("msg_")
                for event in _begin_of_message(id, place):
                    yield event
            text += part
            delta = {"item_id": id, "content_index": 0, "delta": part, "logprobs": []}
            yield "response.output_text.delta", {**place, **delta}
        if not items and not id:  # an answer without a word
            id = new_id("msg_")
            for event in _begin_of_message(id, {"output_index": 0}):
                yield event
        if id:
            for event in _end_of_message(id, text, {"output_index": len(items)}):
                yield event
            items.append(_message(id, text))
        response = self._response(items)
        extra = {"timings": self._answers.timings()}
        yield f"response.{response['status']}", {"response": response, **extra}

    def _response(self, items: list[dict[str, Any]] | None) -> dict[str, Any]:
        """Return the response with its items; None while it is in progress."""
        fields, is_over = self._fields, items is not None
        is_cut = is_over and self._generation.finish_reason == "length"
        usage = self._answers.usage()
        return {
            "id": self._answers.id,
            "object": "response",
            "created_at": self._answers.created,
            "status": ("incomplete" if is_cut else "completed") if is_over else "in_progress",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "error": None,
            "instructions": fields.get("instructions"),
            "max_output_tokens": fields.get("max_output_tokens"),
            "metadata": fields.get("metadata") or {},
            "model": self._model.engine.name,
            "output": items or [],
            "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": fields.get("temperature"),
            "text": fields.get("text") or {"format": {"type": "text"}},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": fields.get("tools") or [],
            "top_p": fields.get("top_p"),
            "truncation": "disabled",
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.completion,
            }
            if is_over
            else None,
        }


def read_input(fields: Fields) -> list[Any]:
    """Return a request's messages as chat completions have them. Raises ApiError."""
    given, instructions = fields.get("input"), fields.text("instructions")
    if given is None:
        raise fields.needs("input")
    messages: list[Any] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for i, item in enumerate(fields.items("input", MAX_MESSAGES) or ()):
        converted = _converted(item, f"input[{i}]")
        if converted is None:
            continue
        # Calls that follow each other are those of one message.
        calls = converted.get("tool_calls")
        if calls and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(calls)
        else:
            messages.append(converted)
    return messages


def _converted(item: Any, name: str) -> dict[str, Any] | None:
    if not isinstance(item, dict):
        raise wrong(name, "an object", item)
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if not isinstance(role, str):
                raise wrong(f"{name}.role", "a string", role)
            role = "system" if role == "developer" else role
            return {"role": role, "content": _text_of(item.get("content"), f"{name}.content")}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            content = _text_of(item.get("output"), f"{name}.output")
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
        case "reasoning":
            return None
        case kind:
            raise wrong(f"{name}.type", "message, function_call or function_call_output", kind)


def _text_of(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(name, "a string or a list of parts", content)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise wrong(name, "parts of text", kind)
        texts.append(part["text"])
    return "".join(texts)


def _response_format(fields: Fields) -> Mapping[str, Any] | None:
    """Return `text.format`, whose schema stands beside its type, as chat completions have it."""
    text = fields.object("text")
    form = None if text is None else text.object("format")
    if form is None:
        return None
    values = form.values
    if values.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": values}
    return values


def _read_tools(fields: Fields) -> list[Mapping[str, Any]] | None:
    functions = []
    for i, tool in enumerate(fields.items("tools", MAX_TOOLS) or ()):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise wrong(f"tools[{i}]", "a tool of type function", tool)
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        functions.append({"type": "function", "function": function})
    return checked_tools(functions)


def _message(id: str, text: str, status: str = "completed") -> dict[str, Any]:
    content = [_part(text)] if status == "completed" else []
    message = {"id": id, "type": "message", "role": "assistant", "status": status}
    return {**message, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _function_call(id: str, call: ToolCall) -> dict[str, Any]:
    return {
        "id": id,
        "type": "function_call",
        "call_id": new_id("call_"),
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


_Events = list[tuple[str, dict[str, Any]]]


def _begin_of_message(id: str, place: dict[str, int]) -> _Events:
    part = {"item_id": id, "content_index": 0, "part": _part("")}
    return [
        ("response.output_item.added", {**place, "item": _message(id, "", "in_progress")}),
        ("response.content_part.added", {**place, **part}),
    ]


def _end_of_message(id: str, text: str, place: dict[str, int]) -> _Events:
    where = {**place, "item_id": id, "content_index": 0}
    return [
        ("response.output_text.done", {**where, "text": text, "logprobs": []}),
        ("response.content_part.done", {**where, "part": _part(text)}),
        ("response.output_item.done", {**place, "item": _message(id, text)}),
    ]


def _events_of_call(item: dict[str, Any], place: dict[str, int]) -> _Events:
    where = {**place, "item_id": item["id"]}
    begun = {**item, "arguments": "", "status": "in_progress"}
    arguments = item["arguments"]
    return [
        ("response.output_item.added", {**place, "item": begun}),
        ("response.function_call_arguments.delta", {**where, "delta": arguments}),
        (
            "response.function_call_arguments.done",
            {**where, "name": item["name"], "arguments": arguments},
        ),
        ("response.output_item.done", {**place, "item": item}),
    ]
