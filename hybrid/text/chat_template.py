"""ChatTemplate: a conversation → the text that the model was trained to continue.

The template is the model's own Jinja program. It is rendered in a sandbox, with the variables that
transformers gives it (`apply_chat_template`), so the text is the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes

from hybrid.errors import InvalidCheckpoint, InvalidOption
from hybrid.text import sandbox
from hybrid.text.markers import Markers

_END = "\udfff"  # where an answer that the model continues ends; no text can contain it
# What templates write around messages: <|user|>, <用户>, [INST], <start_of_turn>.
_MARKER = re.compile(r"<[^\s<>]{1,60}>|\[/?[A-Z_]{2,40}\]")
_BROKEN = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, as templates know it. All parts are JSON's types."""

    messages: Sequence[Mapping[str, Any]]  # each with a role, and content as text or parts
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas of functions
    add_generation_prompt: bool = True  # end with what begins an answer
    continues_last: bool = False  # end inside the last message, which the model continues
    variables: Mapping[str, Any] = field(default_factory=dict)  # more of the template's variables


class ChatTemplate:
    """A compiled template. Immutable, so threads may share it."""

    def __init__(self, source: str, tokens: Mapping[str, str], name: str = "chat template") -> None:
        """`tokens`: the special tokens that templates may name, such as bos_token.

        Raises InvalidCheckpoint if the template is broken.
        """
        self.source, self.name = source, name
        self._tokens = dict(tokens)
        try:
            self._template = sandbox.compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidCheckpoint(f"{name}: line {error.lineno}: {error.message}") from error
        except (sandbox.TemplateLimit, jinja2.TemplateError) as error:
            raise InvalidCheckpoint(f"{name}: cannot be used: {error}") from error
        self.literals = "\0".join(_literals(source))

    def markers(self, special: Sequence[str], ordinary: Sequence[str] = ()) -> Markers:
        """Return the texts that a message must not forge.

        `special` are the vocabulary's special tokens. Of its `ordinary` added tokens those count
        that the template writes itself.
        """
        written = [text for text in ordinary if text in self.literals]
        return Markers([*special, *written, *_MARKER.findall(self.literals)])

    def render(self, chat: Chat, markers: Markers) -> str:
        """Return the prompt, in which imitated markers are tainted (`Markers.restore`).

        Raises InvalidOption if the template refuses the messages, or fails on them.
        """
        messages = [_plain(message, f"messages[{n}]") for n, message in enumerate(chat.messages)]
        tools = None if chat.tools is None else _plain(chat.tools, "tools")
        variables = _plain(chat.variables, "variables")
        messages = [_taint_message(message, markers) for message in messages]
        if chat.continues_last:
            _mark_end(messages)
        given = {
            **self._tokens,
            "documents": None,
            **markers.taint_all(variables),
            "messages": messages,
            "tools": markers.taint_all(tools),
            "add_generation_prompt": chat.add_generation_prompt and not chat.continues_last,
        }
        try:
            text = sandbox.render(self._template, given)
        except sandbox.TemplateRefusal as error:
            raise InvalidOption(
                f"messages: the model's chat template refuses them: {error}"
            ) from None
        except sandbox.TemplateLimit as error:
            raise InvalidOption(f"{self.name}: was stopped: {error}") from None
        except UnicodeError:  # a lone surrogate stands for a character of an imitated marker
            raise InvalidOption(
                _lost("spell a marker of the chat template, and it encodes them")
            ) from None
        except _BROKEN as error:
            raise InvalidOption(
                f"messages: {self.name} fails on them: {type(error).__name__}: {error}"[:500]
            ) from None
        if re.search(r"\\u[dD][89a-fA-F]", text):
            raise InvalidOption(_lost("spell a marker of the chat template, and it rewrites them"))
        return _cut(text) if chat.continues_last else text


def _lost(why: str) -> str:
    return f"messages: they {why}, so the text could not be told from a marker; remove it"


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


def _taint_message(message: dict[str, Any], markers: Markers) -> dict[str, Any]:
    """Taint all texts of a message but its role and the types of its parts, which are names."""
    tainted = markers.taint_all({key: item for key, item in message.items() if key != "role"})
    tainted = {"role": message.get("role"), **tainted}
    if isinstance(tainted.get("content"), list):
        for part, given in zip(tainted["content"], message["content"], strict=True):
            if isinstance(part, dict) and "type" in given:
                part["type"] = given["type"]
    return tainted


def _mark_end(messages: list[dict[str, Any]]) -> None:
    """Mark the end of the last message's text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + _END + " "
        return
    if isinstance(content, list):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                part["text"] += _END + " "
                return
    raise InvalidOption("messages: the last one has no text that could be continued")


def _cut(text: str) -> str:
    """Cut a rendered text where the last message ends."""
    before, mark, after = text.rpartition(_END)
    if not mark:
        raise InvalidOption(
            "messages: the chat template drops the last one, so it cannot be continued"
        )
    # The space behind the mark is gone if the template strips contents. Then it would also have
    # stripped what is before the mark.
    return before if after.startswith(" ") else before.rstrip()


def _literals(source: str) -> list[str]:
    """Return the texts that the template itself contains."""
    tree = jinja2.Environment(extensions=[sandbox.GenerationTag, "jinja2.ext.loopcontrols"]).parse(
        source
    )
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return texts
