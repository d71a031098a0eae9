"""Chat: a conversation as chat templates know it, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from hybrid.errors import InvalidOption

_ROLE = re.compile("[A-Za-z][A-Za-z0-9_-]{0,39}")  # templates write it as it is


class TextPart(TypedDict):
    """A part of a message's content."""

    type: str  # "text"
    text: str


class _Message(TypedDict):
    role: str


class ChatMessage(_Message, total=False):
    """One message of a conversation. The model's template decides which roles and fields it knows.

    Usual roles are system, user, assistant and tool.
    """

    content: str | Sequence[TextPart] | None
    name: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str
    reasoning_content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, as templates know it: JSON's types only, copied from what a caller gave.

    Raises InvalidOption for anything else.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas of functions
    add_generation_prompt: bool = True  # end with what begins an answer, or within a begun one
    variables: Mapping[str, Any] = field(default_factory=dict)  # more of the template's variables

    def __post_init__(self) -> None:
        messages, tools = self.messages, self.tools
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
            raise InvalidOption(
                f"messages: expected a list of dicts, found {type(messages).__name__}"
            )
        if not messages:
            raise InvalidOption("messages: expected at least one, found none")
        checked = [_checked_message(message, n) for n, message in enumerate(messages)]
        object.__setattr__(self, "messages", checked)
        if tools is not None:
            if not isinstance(tools, (list, tuple)) or not all(
                isinstance(tool, Mapping) for tool in tools
            ):
                raise InvalidOption("tools: expected a list of JSON schemas of functions")
            object.__setattr__(self, "tools", _plain(tools, "tools"))
        if not isinstance(self.variables, Mapping):
            raise InvalidOption("variables: expected a dict of the template's variables")
        object.__setattr__(self, "variables", _plain(self.variables, "variables"))

    @property
    def continues_last(self) -> bool:
        """Whether the last message is an answer that the model is to continue."""
        return self.add_generation_prompt and self.messages[-1]["role"] == "assistant"

    def answered(self, text: str) -> Chat:
        """Return the conversation with an answer, or with the rest of one that it began."""
        last = self.messages[-1]
        if self.continues_last and isinstance(last.get("content"), str):
            last = {**last, "content": last["content"] + text}
            return replace(self, messages=[*self.messages[:-1], last])
        return replace(self, messages=[*self.messages, {"role": "assistant", "content": text}])


def as_chat(chat: Chat | Sequence[ChatMessage]) -> Chat:
    """Return a conversation. Raises InvalidOption."""
    return chat if isinstance(chat, Chat) else Chat(chat)


def _checked_message(message: object, n: int) -> dict[str, Any]:
    """Return a copy of a message without keys of None. Raises InvalidOption."""
    name = f"messages[{n}]"
    if not isinstance(message, Mapping):
        raise InvalidOption(f"{name}: expected a dict, found {type(message).__name__}")
    copy: dict[str, Any] = _plain(message, name)
    role, content = copy.get("role"), copy.get("content")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InvalidOption(
            f"{name}: role: expected a name such as 'user', 'assistant' or 'system', "
            f"found {role!r:.60}"
        )
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(part.get("text"), str):
                raise InvalidOption(
                    f"{name}: content: hybrid reads parts of type 'text' with a text, found "
                    f"{kind!r:.60}"
                )
    elif not isinstance(content, str) and (content is not None or set(copy) <= {"role", "content"}):
        raise InvalidOption(
            f"{name}: content: expected a string or parts of text, found {type(content).__name__}"
        )
    return copy


def _plain(value: Any, name: str) -> Any:
    """Return a copy of JSON data without keys of null. Raises InvalidOption for anything else."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return checked_text(value, name)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidOption(f"{name}: expected texts as keys")
        return {
            checked_text(key, name): _plain(item, f"{name}: {key}")
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{n}]") for n, item in enumerate(value)]
    raise InvalidOption(f"{name}: expected JSON's types, found {type(value).__name__}")


def checked_text(text: object, name: str) -> str:
    """Return a text that is valid Unicode. Raises InvalidOption."""
    if not isinstance(text, str):
        raise InvalidOption(f"{name}: expected a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidOption(
            f"{name}: expected valid Unicode, found the lone surrogate {text[error.start]!a} at "
            f"character {error.start}, which often comes from bytes that are not UTF-8"
        ) from None
    return text
