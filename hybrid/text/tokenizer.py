"""Tokenizer: converts text to token ids and back, streams text, writes chats as prompts."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from hybrid.checkpoint.gguf.reader import GgufFile
from hybrid.errors import InvalidOption
from hybrid.text.added_tokens import content_of, is_text
from hybrid.text.bos import BosWishes, choose_bos
from hybrid.text.chat import Chat, ChatMessage, as_chat, checked_text
from hybrid.text.chat_template import ChatTemplate
from hybrid.text.template_files import Templates, choose_templates
from hybrid.text.tool_calls import ToolFormat, described, format_of
from hybrid.text.vocabulary import Vocabulary
from hybrid.text.vocabulary_file import read_settings


class TokenizerSummary(NamedTuple):
    """What kind of tokenizer a model has."""

    kind: str  # such as "byte-level BPE"
    n_ids: int  # of the vocabulary with its added tokens
    n_added: int
    own_templates: tuple[str, ...]  # names of the model's own chat templates
    template: str | None  # in use


class Tokenizer:
    """A model's vocabulary and chat template. Immutable, so threads may share it."""

    vocab_size: int
    bos: tuple[int, ...]  # what `encode` puts before a text
    empty_text: tuple[int, ...]  # what stands for an empty text; () if the model names no BOS
    notices: tuple[str, ...]  # one line each; front-ends show them

    @classmethod
    def from_folder(
        cls,
        source: Path | GgufFile,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_id: int | None = None,
        add_bos: bool | None = None,
        chat_template: str | Path | None = None,
    ) -> Tokenizer:
        """Read `tokenizer.json` or `tokenizer.model`, and the other files of a tokenizer.

        `source` is the model's folder, or a GGUF file, which holds all of them.

        `bos_id` and `eos_id` are those of the config. `add_bos` says whether a text begins with
        BOS. If it is None, the post-processor in tokenizer.json decides, as in transformers 5.
        `chat_template` names one of the model's templates, a built-in one or a file.

        Raises InvalidCheckpoint if a file is missing, broken or has ids that the model lacks, and
        InvalidOption if `add_bos` is true and the model has no BOS, or if there is no such chat
        template. Raises UnsupportedModel for kinds of tokenizers that hybrid does not run.
        """
        settings, layout = read_settings(source)
        folder = source if isinstance(source, Path) else source.path
        vocabulary = Vocabulary(folder, settings, vocab_size, layout)
        wishes = BosWishes(bos_id, settings, add_bos)
        bos = choose_bos(folder, vocabulary.library, vocab_size, wishes)
        tokens = _named_tokens(settings, vocabulary, {"bos_token": bos_id, "eos_token": eos_id})
        templates = choose_templates(folder, settings, vocabulary, tokens, chat_template)
        self = cls(vocabulary, templates)
        self.bos, self.empty_text = bos.ids, bos.empty_text
        # A GGUF file says itself whether texts begin with BOS. No other file could disagree.
        about_bos = bos.notices if layout is None else ()
        self.notices = (*vocabulary.notices, *about_bos, *templates.notices)
        return self

    def __init__(self, vocabulary: Vocabulary, templates: Templates) -> None:
        """`from_folder` makes the parts."""
        self.vocab_size = vocabulary.size
        self._vocabulary, self._templates = vocabulary, templates

    @property
    def has_chat_template(self) -> bool:
        return self._templates.default is not None

    @property
    def summary(self) -> TokenizerSummary:
        library, template = self._vocabulary.library, self._templates.default
        is_byte_level = "ByteLevel" in repr(library.decoder)
        return TokenizerSummary(
            "byte-level " * is_byte_level + type(library.model).__name__,
            library.get_vocab_size(with_added_tokens=True),
            len(library.get_added_tokens_decoder()),
            self._templates.own,
            None if template is None else template.name,
        )

    @property
    def longest_piece(self) -> int:
        """Characters of the longest piece: a text has no fewer tokens than it has such parts."""
        return self._vocabulary.longest_piece

    def token_text(self, token: int) -> str | None:
        """Return how the vocabulary spells a token, or None if it has none such."""
        spelled: str | None = self._vocabulary.library.id_to_token(token)
        return spelled

    def encode(self, text: str) -> list[int]:
        """Return BOS, if the model's texts begin with it, and the text's tokens.

        The text becomes ordinary tokens only, even if it contains the name of a special token.
        """
        return [*self.bos, *self._vocabulary.encode(checked_text(text, "text"))]

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of text that follows other text, without BOS or a leading space."""
        return self._vocabulary.encode_after(checked_text(text, "text"))

    def encode_chat(self, chat: Chat | Sequence[ChatMessage]) -> list[int]:
        """Return the prompt of a conversation, as the model's chat template writes it.

        If the last message is the assistant's, the model continues it. Otherwise the prompt ends
        with what begins an answer. The ids are those of transformers' `apply_chat_template`, behind
        BOS if the tokenizer begins texts with it and the template does not. What a message spells
        is never a marker: it gets other tokens, which decode to the same text.

        Raises InvalidOption if the model has no chat template, or if it refuses the messages.
        """
        chat = as_chat(chat)
        template = self._template(chat)
        ids = self._vocabulary.encode_marked(template.render(chat), template.markers.texts)
        return ids if tuple(ids[: len(self.bos)]) == self.bos else [*self.bos, *ids]

    def encode_after_answer(self, chat: Chat | Sequence[ChatMessage], n: int) -> list[int] | None:
        """Return the part of a prompt that follows the text of the answer `messages[n]`.

        The answer's own tokens can then stay as the model generated them. None if the template
        writes the messages up to there in another way than it wrote them for that answer. Raises
        InvalidOption as `encode_chat` does.
        """
        chat = as_chat(chat)
        template = self._template(chat)
        marked = template.render_after(chat, n)
        if marked is None:
            return None
        return self._vocabulary.encode_marked(marked, template.markers.texts, follows=True)

    def render_chat(self, chat: Chat | Sequence[ChatMessage]) -> str:
        """Return the text that `encode_chat` encodes, without a BOS that the template lacks."""
        chat = as_chat(chat)
        return self._template(chat).render(chat).text

    def end_of_answer(self, chat: Chat) -> int | None:
        """Return the special token that the template writes behind an answer, if it does."""
        after = self._template(chat).after_answer
        return self._vocabulary.token_id(after) if after in self._vocabulary.special else None

    def _template(self, chat: Chat) -> ChatTemplate:
        template = self._templates.default
        if chat.tools is not None and self._templates.with_tools is not None:
            template = self._templates.with_tools
        if template is None:
            raise InvalidOption(
                "the model has no chat template; choose one (chat_template), or use generate() to "
                "complete text"
            )
        return template

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without special tokens and without one leading space.

        Only vocabularies that put a space before a text have such a space.
        """
        return self._vocabulary.decode(ids)

    def continue_text(
        self,
        context: Sequence[int],
        tokens: Sequence[int],
        tool_format: ToolFormat | None = None,
    ) -> str:
        """Return the text that `tokens` add to that of `context`, as streaming them gives it."""
        detokenizer = self.stream(context, tool_format)
        return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.finish()

    def decode_token(self, token: int) -> str:
        """Return what one token adds to a text, with its space; U+FFFD for part of a character."""
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text, with its space; b"" for special tokens."""
        return self._vocabulary.join((token,))

    def stream(
        self, context: Sequence[int], tool_format: ToolFormat | None = None
    ) -> StreamingDetokenizer:
        """Return a detokenizer for the tokens that follow `context`.

        It also spells out the special tokens that are markers of tool calls in this format.
        """
        markers = {} if tool_format is None else self._marker_ids(tool_format.markers)
        spelled = {token: text.encode() for text, token in markers.items()}
        return StreamingDetokenizer(self._vocabulary, context, spelled)

    def tool_format(self, chat: Chat) -> ToolFormat:
        """Return how the model writes calls of a chat's tools, as its template shows.

        Raises InvalidOption if the model has no chat template.
        """
        return format_of(self._template(chat).source, chat.tools or ())

    def with_tools(self, chat: Chat) -> Chat:
        """Return the conversation with its tools in a message, if the template knows no tools."""
        if chat.tools is None or self._template(chat).knows_tools:
            return chat
        return described(chat)

    def spell_marker(self, text: str) -> str:
        """Return a marker of tool calls for a grammar: special tokens by their ids."""
        markers = self._marker_ids([text])
        return f"<[{markers[text]}]>" if text in markers else json.dumps(text)

    def _marker_ids(self, markers: Sequence[str]) -> dict[str, int]:
        """Return the ids of those markers that are special tokens, which texts leave out."""
        found = {}
        for text in {*markers} & {*self._vocabulary.special}:
            token = self._vocabulary.token_id(text)
            if token is not None:
                found[text] = token
        return found


class StreamingDetokenizer:
    """Converts tokens into text one by one, and never splits a character.

    All pushes and `finish` together give what `decode(context + tokens)` has beyond the *certain*
    text of the context. That is the context's text without a last character that is incomplete.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        context: Sequence[int],
        spelled: Mapping[int, bytes] = MappingProxyType({}),
    ) -> None:
        """`spelled` are the texts of special tokens, which are left out otherwise."""
        self._vocabulary, self._spelled = vocabulary, spelled
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        before = vocabulary.join(context)
        self._decoder.decode(before)
        self._drops_space = vocabulary.drops_space and not before

    def push(self, token: int) -> str:
        """Return the text that `token` makes certain; "" while a character is incomplete."""
        piece = self._spelled.get(token) or self._vocabulary.join((token,))
        return self._emit(piece, is_last=False)

    def finish(self) -> str:
        """Return what is left: U+FFFD for an incomplete character, else ""."""
        return self._emit(b"", is_last=True)

    def _emit(self, piece: bytes, *, is_last: bool) -> str:
        text = self._decoder.decode(piece, is_last)
        if self._drops_space and text:
            self._drops_space = False
            text = text.removeprefix(" ")
        return text


def _named_tokens(
    settings: dict[str, Any], vocabulary: Vocabulary, ids: Mapping[str, int | None]
) -> dict[str, str]:
    """Return the special tokens that templates may name, such as bos_token, as texts.

    tokenizer_config.json names them, or else `ids` of the config.
    """
    tokens = {}
    for name, id in ids.items():
        text = None if id is None else vocabulary.library.id_to_token(id)
        if text is not None:
            tokens[name] = text
    for name, value in settings.items():
        text = content_of(value)
        if name.endswith("_token") and text is not None and is_text(text):
            tokens[name] = text
    return tokens
