"""Grammars: answers of a given form. In each state of a grammar only some tokens may come next.

The package llguidance (extra `grammar`) computes which: https://github.com/guidance-ai/llguidance.
It compiles a JSON schema, a GBNF grammar or a regular expression together with the vocabulary.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import InvalidOption, MissingPackage, one_line
from hybrid.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA = 256 << 10  # characters of a schema or a grammar
MAX_REGEX = 16 << 10
_N_CACHED = 32  # compiled grammars
# Fuel bounds the work in compiling (about 20 ms) and the memory (40 MB). It does not bound the time
# of a mask: an ambiguous grammar needs more of it with every token. So that time is measured.
_MASKS_S, _MASK_S = 0.2, 0.004  # of CPU: for an answer's first masks, and for each of its tokens
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Between JSON's tokens: nothing, a space, or a line break with an indent. Without a bound a model
# may write spaces for ever.
JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,16})?"}


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer must look like."""

    kind: Literal["json_schema", "gbnf", "lark", "regex"]
    source: str  # of a schema: its JSON
    option: str  # that gives it, for messages


def form_of_schema(schema: Mapping[str, Any] | bool, option: str) -> Form:
    """Return the form of JSON values that a schema describes. Raises InvalidOption."""
    try:
        source = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        source.encode()
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"{option}: is no JSON schema: {one_line(error)}") from None
    return Form("json_schema", source, option)


def form_of_response(response_format: Mapping[str, Any]) -> Form | None:
    """Return the form that OpenAI's `response_format` means; None: any text.

    Raises InvalidOption.
    """
    if not isinstance(response_format, Mapping):
        raise InvalidOption(f"response_format: expected a mapping, found {response_format!r:.80}")
    kind, schema = response_format.get("type"), response_format.get("schema")
    match kind:
        case "text":
            return None
        case "json_object":
            schema = {"type": "object"} if schema is None else schema
        case "json_schema":
            inner = response_format.get("json_schema")
            if isinstance(inner, Mapping):
                schema = inner.get("schema")
                schema = closed(schema) if inner.get("strict") is True else schema
        case _:
            raise InvalidOption(
                "response_format: expected the type text, json_object or json_schema, found "
                f"{kind!r:.80}"
            )
    if not isinstance(schema, (Mapping, bool)):
        raise InvalidOption(f"response_format: expected a JSON schema, found {schema!r:.80}")
    return form_of_schema(schema, "response_format")


def closed(schema: Any) -> Any:
    """Return a schema whose objects have the properties that it names, and no others.

    JSON schemas allow any others by default, and a small model may not find an end of them.
    """
    if isinstance(schema, Mapping):
        inner = {key: closed(value) for key, value in schema.items()}
        if isinstance(inner.get("properties"), Mapping) and "patternProperties" not in inner:
            inner.setdefault("additionalProperties", False)
        return inner
    return [closed(value) for value in schema] if isinstance(schema, (list, tuple)) else schema


class Constraint:
    """A grammar's state in one answer. It has consumed the answer's tokens."""

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, form: Form, pretended_end: int | None
    ) -> None:
        self._matcher, self._vocab_size, self._form = matcher, vocab_size, form
        self._pretended_end = pretended_end
        self._spent_s, self._n_tokens = 0.0, 0

    def allowed(self) -> NDArray[np.bool_]:
        """Return (vocab,) which tokens may come next; those that end an answer if it may end.

        Raises InvalidOption if the grammar needs more work than its limits allow.
        """
        with self._limited():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if self._pretended_end is not None:
            allowed[self._pretended_end] = False
        return allowed

    def forced(self) -> list[int]:
        """Return the tokens that must come next, as far as there is no choice.

        Raises InvalidOption.
        """
        with self._limited():
            return self._matcher.compute_ff_tokens()

    def consume(self, tokens: Iterable[int]) -> None:
        """Note the next tokens of the answer. Raises InvalidOption."""
        following = list(tokens)
        self._n_tokens += len(following)
        with self._limited():
            self._matcher.consume_tokens(following)

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._matcher.is_stopped()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Raise InvalidOption if the work in this context fails, or takes too much time."""
        started = time.thread_time()
        yield
        self._spent_s += time.thread_time() - started
        if self._matcher.is_error():
            raise InvalidOption(
                f"{self._form.option}: the grammar cannot go on: "
                f"{one_line(self._matcher.get_error())}"
            )
        if self._spent_s > _MASKS_S + _MASK_S * self._n_tokens:
            raise InvalidOption(
                f"{self._form.option}: is too complex: {self._n_tokens} tokens took "
                f"{self._spent_s:.1f} s"
            )


class Grammar:
    """A compiled form."""

    def __init__(self, matcher: LLMatcher, *facts: Any) -> None:
        """`facts` are those that a Constraint needs besides."""
        self._matcher, self._facts = matcher, facts

    def begin(self) -> Constraint:
        """Return the state at the beginning of an answer."""
        return Constraint(self._matcher.deep_copy(), *self._facts)


class Grammars:
    """Compiles forms for one vocabulary, and remembers the latest. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, tuple(eos_ids)
        self._vocabulary: LLTokenizer | None = None
        # Is called before a form is compiled that is not known yet, and may raise.
        self.guard: Callable[[Form], None] = lambda form: None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Form, Grammar] = OrderedDict()

    def prepare(self) -> None:
        """Prepare the vocabulary. The first `compile` does so, too; 120,000 tokens take 1.5 s.

        Raises MissingPackage.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _read_vocabulary(self._tokenizer, self._eos_ids)

    def compile(self, form: Form) -> Grammar:
        """Raises InvalidOption if the form is wrong or too complex, and MissingPackage.

        A hostile schema may take minutes, without the GIL (hybrid/server/form_check.py).
        """
        most = MAX_REGEX if form.kind == "regex" else MAX_SCHEMA
        if len(form.source) > most:
            raise InvalidOption(
                f"{form.option}: expected at most {most:,} characters, found {len(form.source):,}"
            )
        self.prepare()
        with self._lock:
            if (known := self._compiled.get(form)) is not None:
                self._compiled.move_to_end(form)
                return known
        self.guard(form)
        grammar = self._compile(form)
        with self._lock:
            self._compiled[form] = grammar
            while len(self._compiled) > _N_CACHED:
                self._compiled.popitem(last=False)
        return grammar

    def _compile(self, form: Form) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        assert self._vocabulary is not None
        try:
            source = _to_llguidance(form)
        except ValueError as error:
            raise InvalidOption(f"{form.option}: {one_line(error)}") from None
        limits = LLParserLimits(**_LIMITS)
        matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidOption(f"{form.option}: {one_line(matcher.get_error())}")
        n = self._tokenizer.vocab_size
        return Grammar(matcher, n, form, None if self._eos_ids else n - 1)


def validate(form: Form) -> str:
    """Return what is wrong with a form for any vocabulary; "" if nothing is."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        source = _to_llguidance(form)
    except ValueError as error:
        return one_line(error)
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(
        source, limits=LLParserLimits(**_LIMITS)
    )
    return one_line(messages[0]) if is_wrong else ""


def _to_llguidance(form: Form) -> str:
    """Return a form in llguidance's own language. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    if form.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(form.source, overrides=JSON_OPTIONS)
    return grammar_from(form.kind, form.source)


def _read_vocabulary(tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ModuleNotFoundError as error:
        raise MissingPackage(
            "answers of a given form need the package llguidance; "
            "pip install 'hybrid-inference[grammar]'"
        ) from error
    n = tokenizer.vocab_size
    # llguidance wants an end. A model without one has its last id pretended to be one.
    return LLTokenizer(
        TokenizerWrapper(_Vocabulary(tokenizer, eos_ids)),
        n_vocab=n,
        eos_token=list(eos_ids) or [n - 1],
    )


class _Vocabulary:
    """What llguidance needs of a vocabulary."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_ids[0] if eos_ids else tokenizer.vocab_size - 1
        found = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        # What adds no text is special: a grammar names it by its id, or not at all.
        self.special_token_ids = [token for token, data in enumerate(found) if not data]
        self.special_token_ids += [token for token in eos_ids if found[token]]
        self.tokens = [data or f"<|{token}|>".encode() for token, data in enumerate(found)]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode_continuation(text.decode("utf-8", errors="replace"))
