"""ChatTemplate: a conversation → the text that the model was trained to continue.

The template is a Jinja program, the model's own or a built-in one. It is rendered in a sandbox,
with the variables that transformers gives it (`apply_chat_template`), so the text is the same.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes

from hybrid.errors import InvalidCheckpoint, InvalidOption, one_line
from hybrid.text import sandbox
from hybrid.text.chat import Chat
from hybrid.text.markers import MarkedText, Markers

_END = "\udfff"  # where the text of a marked message ends; no text can contain it
_SPACE = "\u2003"  # behind that; no template writes it, and whoever strips a text strips it
# What templates write around messages: <|user|>, <用户>, [INST], <start_of_turn>.
_MARKER = re.compile(r"<[^\s<>]{1,60}>|\[/?[A-Z_]{2,40}\]")
# Methods of texts that templates find the parts of an answer with.
_SEARCHING = frozenset(
    ("count", "endswith", "find", "index", "lstrip", "partition", "replace", "rfind", "rpartition")
    + ("rsplit", "rstrip", "split", "startswith", "strip")
)
_USUAL_ROLES = frozenset(("assistant", "developer", "function", "model", "system", "tool", "user"))
_PROBE = "a probe of hybrid"


class _Marked(NamedTuple):
    """A rendered text, tainted, and where the text of one of its messages ends."""

    text: str
    end: int
    strips: bool  # whether the template strips what a message says


class ChatTemplate:
    """A compiled template. Immutable, so threads may share it."""

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        special: Sequence[str] = (),
        ordinary: Sequence[str] = (),
        name: str = "chat template",
    ) -> None:
        """`tokens`: the special tokens that templates may name, such as bos_token.

        A message cannot spell the `special` tokens, nor what the template writes around messages.
        What the template mentions besides or looks for in answers, such as <think>, only an answer
        may spell, because a model writes it itself. Of the `ordinary` added tokens those count that
        the template mentions. Raises InvalidCheckpoint if the template is broken.
        """
        self.name, self.source = name, source
        self._tokens = dict(tokens or {})
        try:
            self._template = sandbox.compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidCheckpoint(
                f"{name}: line {error.lineno}: {one_line(error.message)}"
            ) from error
        except Exception as error:  # Jinja makes Python code of it, which Python may refuse
            raise InvalidCheckpoint(f"{name}: cannot be used: {one_line(error)}") from error
        self.markers = Markers(())
        tree = _parse(source)
        self.knows_tools = any(name.name == "tools" for name in tree.find_all(nodes.Name))
        literals, around = "\0".join(_literals(tree)), "\0".join(self._probe())
        everything = literals + around
        written = {text for text in ordinary if text in everything and not text.isalnum()}
        written |= {*_MARKER.findall(literals), *_MARKER.findall(around)}
        tested = "\0".join(_tested(tree))
        own = {
            text
            for text in written - {*special}
            if text not in around or text in tested or _partner(text) in tested
        }
        self.markers = Markers({*special, *written}, of_answers=own)

    def _probe(self) -> list[str]:
        """Return what the template writes for some messages, such as <|user|> made of a role."""
        answered = [_USER, {"role": "assistant", "content": _PROBE}, _USER]
        texts = []
        for messages in ([_USER], answered, [{"role": "system", "content": _PROBE}, *answered]):
            with contextlib.suppress(InvalidOption):
                texts.append(self._render(messages, Chat(messages)))
        return texts

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template handles contents that are lists of parts."""
        parts = [{"type": "text", "text": _PROBE}]
        try:
            text = self._render([{"role": "user", "content": parts}], Chat([_USER]))
        except InvalidOption:
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    @functools.cached_property
    def after_answer(self) -> str:
        """The marker that the template writes behind an answer, or ""."""
        answered = Chat([_USER, {"role": "assistant", "content": _PROBE}], None, False)
        try:
            marked = self._render_marked(answered, 1)
        except InvalidOption:
            return ""
        if marked is None:
            return ""
        after = marked.text[marked.end :].lstrip()
        return next((text for text in self.markers.texts if after.startswith(text)), "")

    def render(self, chat: Chat) -> MarkedText:
        """Return the prompt. Raises InvalidOption if the template refuses the messages."""
        if chat.continues_last:
            marked = self._render_marked(chat, len(chat.messages) - 1)
            if marked is None:
                raise InvalidOption(
                    f"messages: {self.name} drops the last one, so it cannot be continued"
                )
            text = marked.text[: marked.end]
            # If the template strips contents, it would also have stripped what is before the mark.
            return self.markers.read(text.rstrip() if marked.strips else text)
        return self.markers.read(self._render(self._tainted(chat.messages), chat))

    def render_after(self, chat: Chat, n: int) -> MarkedText | None:
        """Return the part of the prompt that follows the text of the answer `messages[n]`.

        None if the text up to there is not the prompt for that answer and the answer itself. Some
        templates shorten earlier answers, for example.
        """
        answer = chat.messages[n].get("content")
        marked = self._render_marked(chat, n) if isinstance(answer, str) else None
        if marked is None or not isinstance(answer, str):
            return None
        earlier = replace(chat, messages=chat.messages[:n], add_generation_prompt=True)
        before = self._render(self._tainted(earlier.messages), earlier)
        said = self.markers.restore(marked.text[len(before) : marked.end])
        if not marked.text.startswith(before) or said.strip() != answer.strip():
            return None
        return self.markers.read(marked.text[marked.end :])

    def _render_marked(self, chat: Chat, n: int) -> _Marked | None:
        """Render with the end of a message's text marked; None if the template drops the text."""
        messages = self._tainted(chat.messages)
        _mark_end(messages[n])
        before, mark, after = self._render(messages, chat).rpartition(_END)
        if not mark:
            return None
        # A space that the template itself writes there hides that it strips, as in transformers.
        strips = not after.startswith((_SPACE, " "))
        return _Marked(before + after.removeprefix(_SPACE), len(before), strips)

    def _tainted(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self._taint_message(self._fit(message)) for message in messages]

    def _fit(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Join the parts of a message's content for templates that expect one text."""
        parts = message.get("content")
        if isinstance(parts, list) and not self.takes_parts:
            return {**message, "content": "\n".join([part["text"] for part in parts])}
        return message

    def _taint_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Taint all texts of a message but its role, which is a name."""
        role, is_answer = message["role"], message["role"] == "assistant"
        if role not in _USUAL_ROLES and self.markers.has_word(role):
            raise InvalidOption(f"messages: role {role!r}: it is a part of a control token")
        texts = {key: item for key, item in message.items() if key != "role"}
        tainted: dict[str, Any] = self.markers.taint_all(texts, is_answer=is_answer, is_said=True)
        return {"role": role, **tainted}

    def _render(self, messages: list[dict[str, Any]], chat: Chat) -> str:
        """Return the tainted text for messages that are tainted. Raises InvalidOption."""
        given = {
            **self._tokens,
            "documents": None,
            **self.markers.taint_all(chat.variables),
            "messages": messages,
            "tools": self.markers.taint_all(chat.tools),
            "add_generation_prompt": chat.add_generation_prompt and not chat.continues_last,
        }
        try:
            text = sandbox.render(self._template, given)
        except sandbox.TemplateRefusal as error:
            raise InvalidOption(
                f"messages: the model's chat template refuses them: {one_line(error)}"
            ) from None
        except sandbox.TemplateLimit as error:
            raise InvalidOption(f"{self.name}: was stopped: {error}") from None
        except UnicodeError:  # a lone surrogate stands for a character of an imitated marker
            raise InvalidOption(
                _lost("spell a marker of the chat template, and it encodes them")
            ) from None
        except Exception as error:  # a template may raise anything
            raise InvalidOption(
                f"messages: {self.name} fails on them: {type(error).__name__}: {one_line(error)}"
            ) from None
        if self.markers.is_escaped(text, given):
            raise InvalidOption(_lost("spell a marker of the chat template, and it rewrites them"))
        return text


_USER = {"role": "user", "content": _PROBE}


def _lost(why: str) -> str:
    return f"messages: they {why}, so the text could not be told from a marker; remove it"


def _mark_end(message: dict[str, Any]) -> None:
    """Mark the end of a message's text. The space behind the mark shows whether it is stripped."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END + _SPACE
        return
    if isinstance(content, list) and content:
        content[-1]["text"] += _END + _SPACE
        return
    raise InvalidOption("messages: the last one has no text that could be continued")


def _parse(source: str) -> nodes.Template:
    environment = jinja2.Environment(extensions=[sandbox.GenerationTag, "jinja2.ext.loopcontrols"])
    return environment.parse(source)


def _literals(tree: nodes.Template) -> list[str]:
    """Return the texts that the template itself contains."""
    return [node.data for node in tree.find_all(nodes.TemplateData)] + _constants(tree)


def _tested(tree: nodes.Template) -> list[str]:
    """Return the texts that the template looks for in others."""
    places: list[nodes.Node] = [*tree.find_all(nodes.Compare)]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEARCHING:
            places += call.args
    for applied in tree.find_all(nodes.Filter):
        places += applied.args if applied.name == "replace" else []
    return [text for place in places for text in _constants(place)]


def _constants(tree: nodes.Node) -> list[str]:
    found = [*tree.find_all(nodes.Const)]
    found += [tree] if isinstance(tree, nodes.Const) else []
    return [node.value for node in found if isinstance(node.value, str)]


def _partner(text: str) -> str:
    """Return the tag that ends what a tag begins, or begins what it ends."""
    return "<" + text[2:] if text.startswith("</") else "</" + text[1:]
