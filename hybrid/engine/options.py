"""LoadOptions and GenerationOptions: everything that a caller may choose, said once.

The library, the commands and later a server accept the same two classes. Each checks what does not
depend on the model when it is made, so that a mistake is reported before a model is downloaded.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex, TypedDict, TypeVar, get_args

import numpy as np

from hybrid.checkpoint.gguf.activation import parse_activation
from hybrid.errors import ContextOverflow, InvalidOption
from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.text.chat import checked_text
from hybrid.text.generation_config import GenerationDefaults
from hybrid.text.grammar import Form, form_of_response
from hybrid.text.sampling import SamplingParams
from hybrid.text.token_rules import TokenRules
from hybrid.text.tool_calls import ToolWish, read_wish

Quant = Literal["bf16", "f16", "q8", "q4"]
DeviceName = Literal["auto", "cpu", "cuda"]
KvName = Literal["fp16", "bf16"]
Speculate = Literal["ngram"]
PredictorName = Path | Literal["auto", "exact", "own"]

DEFAULT_CONTEXT = 4096  # positions, or the model's maximum if that is smaller
DEFAULT_RECALL = 0.99
DEFAULT_MAX_TOKENS = 256  # of an answer, if neither the caller nor the model limits it
MAX_LOGPROBS = 100
MAX_THREADS = 1024

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """What the user wants of a GPU. Raises InvalidOption for values that exclude each other."""

    device: DeviceName = "auto"
    vram_budget: int | None = None  # bytes of the whole process; None: all free VRAM
    plan: Path | None = None
    kv: KvName = "fp16"  # of the KV cache; the GPU has fp16 only

    def __post_init__(self) -> None:
        _check_choice("device", self.device, get_args(DeviceName))
        _check_choice("kv", self.kv, get_args(KvName))
        if self.vram_budget is not None:
            checked_count("vram_budget", self.vram_budget, least=0)
        if self.plan is not None and self.vram_budget is not None:
            raise InvalidOption(
                "plan and vram_budget exclude each other: a plan has its own budget"
            )
        if self.device == "cpu" and (self.plan is not None or self.vram_budget):
            raise InvalidOption("device cpu takes no plan and no vram_budget")
        if self.kv != "fp16" and self.needs_gpu:
            raise InvalidOption(
                f"kv {self.kv} is for the CPU, because the GPU's KV cache is fp16: it takes no "
                "device cuda, no plan and no vram_budget"
            )

    @property
    def needs_gpu(self) -> bool:
        """Whether the user names something that only a GPU has."""
        return self.device == "cuda" or self.plan is not None or bool(self.vram_budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded; `hybrid.load` describes each option. Raises InvalidOption."""

    threads: int | None = None  # None: one per core that the process may use
    quant: Quant | None = None  # None: that of most weights of a GGUF file, else q8
    kv: KvName = "fp16"  # of the KV cache
    context_size: int | None = None  # tokens; None: 4096, or the model's maximum if that is less
    mmap: bool | None = None  # None: only if the weights do not fit into memory
    mlock: bool = False
    profile: Path | Literal["auto", "none"] = "auto"
    predictor: PredictorName = "exact"
    recall: float = DEFAULT_RECALL
    preview_head: bool = False
    device: DeviceName = "auto"
    vram_budget: int | None = None  # bytes
    plan: Path | None = None
    add_bos: bool | None = None  # begin texts with BOS; None: as the model's tokenizer does
    chat_template: str | Path | None = None  # a name or a file; None: the model's own
    activation: str | None = None  # of a GGUF file: silu, relu, fatrelu:T; None: by its name
    offline: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None:
            checked_count("threads", self.threads, MAX_THREADS)
        if self.quant is not None:
            _check_choice("quant", self.quant, get_args(Quant))
        if not 0.0 < self.recall < 1.0:
            raise InvalidOption(f"recall: expected a value between 0 and 1, found {self.recall}")
        if self.add_bos not in (None, True, False):
            raise InvalidOption(f"add_bos: expected None, True or False, found {self.add_bos!r}")
        if self.activation is not None:
            parse_activation(self.activation)
        if self.chat_template is not None and not isinstance(self.chat_template, (str, Path)):
            raise InvalidOption(
                f"chat_template: expected a name or a file, found {self.chat_template!r:.60}"
            )
        request = self.device_request
        if self.predictor == "own" and request.needs_gpu:
            raise InvalidOption(
                "predictor own is for the CPU, because the GPU runs hybrid's own predictors only: "
                "it takes no device cuda, no plan and no vram_budget"
            )
        if self.quant == "f16" and request.needs_gpu:
            raise InvalidOption(
                "quant f16 is for the CPU, because the GPU has no kernels for it: it takes no "
                "device cuda, no plan and no vram_budget; use quant bf16, q8 or q4"
            )

    @property
    def format(self) -> Format | Literal["auto"]:
        return "auto" if self.quant is None else Format[self.quant]

    @property
    def device_request(self) -> DeviceRequest:
        return DeviceRequest(self.device, self.vram_budget, self.plan, self.kv)


class AnswerLimits(NamedTuple):
    """What bounds an answer."""

    max_tokens: int | None  # None: only the context
    stop: tuple[str, ...]  # the text ends before the first of these
    rules: TokenRules
    is_models: bool = False  # whether max_tokens comes from the model's generation_config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How an answer is generated. Raises InvalidOption.

    Where an option is not given, the model's generation_config.json decides, then hybrid.
    """

    max_tokens: int | Literal["auto"] | None = "auto"  # None: until the answer or the context ends
    temperature: float | None = None  # 0: always the likeliest token
    top_k: int | None = None  # 0: all
    top_p: float | None = None  # 1: all
    min_p: float | None = None  # 0: all
    repeat_penalty: float | None = None  # for tokens of prompt and answer; 1: off
    presence_penalty: float = 0.0  # subtracted from the logits of the answer's tokens
    frequency_penalty: float = 0.0  # the same, as often as the answer has the token
    logit_bias: Mapping[int, float] | None = None  # what is added to tokens' logits: -100 to 100
    # The form of the answer, at most one of three: OpenAI's {"type": "json_schema", "json_schema":
    # {"schema": …}} or {"type": "json_object"}, a grammar in llama.cpp's GBNF, an expression.
    response_format: Mapping[str, Any] | None = None
    grammar: str | None = None
    regex: str | None = None
    # Of a chat's tools: "auto", "none", "required", or {"function": {"name": …}}.
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True  # whether a required call may be followed by others
    stop: str | Sequence[str] | None = None  # the text ends before the first of these; (): none
    logprobs: int | None = None  # log-probability of each token, and of so many likeliest ones
    prompt_logprobs: int | None = None  # the same for the prompt, no part of which is then reused
    layer_activity: bool = False  # report which share of each layer fires, pass by pass
    seed: int | None = None  # None or -1: random
    speculate: Speculate | None = None  # compute guesses along: the same text, faster if it repeats
    context_shift: bool = False  # drop the oldest half of a full context; else the answer ends
    n_keep: int | None = None  # first tokens that a shift keeps, besides BOS; None: system prompt

    def __post_init__(self) -> None:
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise InvalidOption(f"logit_bias: expected a mapping, found {self.logit_bias!r:.60}")
        self.sampling(SamplingParams())
        _ = self.form, self.tool_wish
        if isinstance(self.max_tokens, str):
            _check_choice("max_tokens", self.max_tokens, ("auto",))
        elif self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", checked_count("max_tokens", self.max_tokens))
        if self.n_keep is not None:
            object.__setattr__(self, "n_keep", checked_count("n_keep", self.n_keep, least=0))
        for name in ("context_shift", "layer_activity", "parallel_tool_calls"):
            if (value := getattr(self, name)) not in (True, False):
                raise InvalidOption(f"{name}: expected True or False, found {value!r}")
        if self.speculate is not None:
            _check_choice("speculate", self.speculate, get_args(Speculate))
        if self.stop is not None:
            object.__setattr__(self, "stop", checked_stop(self.stop))
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, checked_count(name, value, MAX_LOGPROBS, least=0))

    @property
    def form(self) -> Form | None:
        """What the answer must look like."""
        given = {
            name: value
            for name in ("response_format", "grammar", "regex")
            if (value := getattr(self, name)) is not None
        }
        if len(given) > 1:
            raise InvalidOption(f"{' and '.join(given)} exclude each other")
        if self.grammar is not None:
            return Form("gbnf", checked_text(self.grammar, "grammar"), "grammar")
        if self.regex is not None:
            return Form("regex", checked_text(self.regex, "regex"), "regex")
        return None if self.response_format is None else form_of_response(self.response_format)

    @property
    def tool_wish(self) -> ToolWish:
        """Which tools the answer may call, and whether it must."""
        return read_wish(self.tool_choice)

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """Return the defaults with the options that were given."""
        names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(
            defaults,
            **given,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((self.logit_bias or {}).items()),
            seed=self.seed,
        )

    def limits(self, defaults: GenerationDefaults, n_prompt: int) -> AnswerLimits:
        """Return what bounds the answer to a prompt of so many tokens. Raises InvalidOption."""
        max_tokens, is_models = self.max_tokens, False
        if max_tokens == "auto":
            is_models = defaults.limits_answers
            max_tokens = defaults.max_answer(n_prompt, DEFAULT_MAX_TOKENS)
        if max_tokens is not None and max_tokens < 1:
            raise InvalidOption(
                f"the prompt has {n_prompt} tokens, and the model's generation_config.json allows "
                f"{defaults.max_length} for prompt and answer; choose max_tokens"
            )
        stop = defaults.stop if self.stop is None else checked_stop(self.stop)
        return AnswerLimits(max_tokens, stop, defaults.rules, is_models)


# The same fields as keywords of `hybrid.load`, `Engine.generate` and `Engine.chat`, for type
# checkers. tests/engine/test_options.py compares them with the classes.


class LoadKeywords(TypedDict, total=False):
    threads: int | None
    quant: Quant | None
    kv: KvName
    context_size: int | None
    mmap: bool | None
    mlock: bool
    profile: Path | Literal["auto", "none"]
    predictor: PredictorName
    recall: float
    preview_head: bool
    device: DeviceName
    vram_budget: int | None
    plan: Path | None
    add_bos: bool | None
    chat_template: str | Path | None
    activation: str | None
    offline: bool


class GenerationKeywords(TypedDict, total=False):
    max_tokens: int | Literal["auto"] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    response_format: Mapping[str, Any] | None
    grammar: str | None
    regex: str | None
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    stop: str | Sequence[str] | None
    logprobs: int | None
    prompt_logprobs: int | None
    layer_activity: bool
    seed: int | None
    speculate: Speculate | None
    context_shift: bool
    n_keep: int | None


def spelling_out(options: type) -> Callable[[Function], Function]:
    """Return a decorator for a function whose `**keywords` are fields of a class of options.

    `help` and `inspect` then list the fields as keyword-only parameters with their defaults.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        listed = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for field in fields(options)
        ]

        listed_signature = signature.replace(parameters=[*own, *listed])
        function.__signature__ = listed_signature  # type: ignore[attr-defined]
        return function

    return decorate


def checked_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Return a prompt of token ids as a list. Raises InvalidOption."""
    expected = f"text, or token ids from 0 to {vocab_size - 1}"
    if isinstance(prompt, (bytes, bytearray, memoryview)) or not isinstance(prompt, Iterable):
        raise InvalidOption(f"prompt: expected {expected}, found {type(prompt).__name__}")
    ids = []
    for token in prompt:
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
            raise InvalidOption(f"prompt: expected {expected}, found {token!r}")
        if not 0 <= token < vocab_size:
            raise InvalidOption(f"prompt: expected {expected}, found {token}")
        ids.append(int(token))
    return ids


def check_prompt(ids: Sequence[int], n_context: int, max_context: int) -> None:
    """Raises InvalidOption for a prompt without tokens, ContextOverflow for one too long."""
    if not ids:
        raise InvalidOption("prompt: it is empty, and this model has no token that begins a text")
    if len(ids) > n_context:
        advice = "shorten the prompt"
        if n_context < max_context:
            advice += f" or choose a larger context (up to {max_context})"
        raise ContextOverflow(
            f"the prompt has {len(ids)} tokens, the context holds {n_context}; {advice}",
            n_tokens=len(ids),
            n_context=n_context,
        )


def checked_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    try:
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
    except TypeError:
        raise InvalidOption(f"stop: expected a string or several strings, found {stop!r}") from None
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidOption(f"stop: expected non-empty strings, found {string!r}")
        if not string.isascii() and string != string.encode(errors="ignore").decode():
            raise InvalidOption(f"stop: expected valid Unicode, found a lone surrogate: {string!a}")
    return strings


def checked_context(context_size: int | None, config: ModelConfig) -> int:
    """Return the positions of a context; None takes the default. Raises InvalidOption."""
    if context_size is None:
        context_size = min(config.max_context, DEFAULT_CONTEXT)
    return checked_count("context_size", context_size, config.max_context)


def checked_count(
    name: str, value: SupportsIndex, largest: int | None = None, *, least: int = 1
) -> int:
    """Return `value` as an integer from `least` to `largest`. Raises InvalidOption."""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if count < least or (largest is not None and count > largest):
        expected = f"an integer, {least} or more"
        if largest is not None:
            expected = f"an integer from {least} to {largest}"
        raise InvalidOption(f"{name}: expected {expected}, found {value!r}")
    return count


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidOption(f"{name}: expected one of {', '.join(choices)}, found {value!r}")
