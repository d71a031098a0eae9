"""The options that all endpoints of OpenAI's API share, and those that local servers add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hybrid.server.api_error import wrong
from hybrid.server.fields import Fields
from hybrid.server.service import Model

MAX_CHOICES = 16
MAX_MESSAGES = 4096
MAX_TOKENS = 1 << 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_BIASES = 1024
MAX_SEED = 2**63 - 1


def sampling_options(fields: Fields, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Return the keywords of GenerationOptions that decide how tokens are chosen.

    `top_k`, `min_p`, `repeat_penalty` (or `repetition_penalty`) and `ignore_eos` are not OpenAI's,
    but other servers have them.
    """
    biases = _logit_bias(fields)
    if fields.boolean("ignore_eos"):
        biases = {**(biases or {}), **dict.fromkeys(eos_ids, -100.0)}
    penalty = "repeat_penalty" if fields.has("repeat_penalty") else "repetition_penalty"
    return {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", 0, 1 << 20),
        "min_p": fields.number("min_p", 0, 1),
        "repeat_penalty": fields.number(penalty, 0.1, 10),
        "presence_penalty": fields.number("presence_penalty", -2, 2) or 0.0,
        "frequency_penalty": fields.number("frequency_penalty", -2, 2) or 0.0,
        "logit_bias": biases,
        "stop": fields.texts("stop", MAX_STOPS, MAX_STOP_LENGTH),
        "layer_activity": fields.boolean("layer_activity"),
    }


def form_options(fields: Fields) -> dict[str, Any]:
    """Return the keywords of GenerationOptions that decide an answer's form.

    `grammar`, `regex` and `json_schema` are not OpenAI's, but other servers have them.
    """
    response_format, schema = fields.get("response_format"), fields.get("json_schema")
    if schema is not None and response_format is None:
        response_format = {"type": "json_schema", "schema": schema}
    return {
        "response_format": response_format,
        "grammar": fields.text("grammar"),
        "regex": fields.text("regex"),
    }


def max_tokens(fields: Fields, *, least: int = 1) -> int | None:
    """Return the limit of an answer; None if the client gives none. Both names mean the same."""
    name = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    return fields.integer(name, least, MAX_TOKENS)


def limit_of_chat(model: Model, given: int | None) -> int | Literal["auto"] | None:
    """Return the limit of an answer: the client's, the model's, or only the context's."""
    return "auto" if given is None and model.engine.defaults.limits_answers else given


def wants_usage(fields: Fields) -> bool:
    """Return whether a stream is to end with the numbers of tokens."""
    options = fields.object("stream_options")
    return options is not None and options.boolean("include_usage")


def seeds(fields: Fields, n: int) -> list[int | None]:
    """Return the seeds of n answers: the one given, and those that follow it."""
    seed = fields.integer("seed", -1, MAX_SEED)
    return [None] * n if seed is None or seed == -1 else [seed + i for i in range(n)]


def _logit_bias(fields: Fields) -> Mapping[int, float] | None:
    """Return what is added to the logits of tokens, whose ids are strings in JSON."""
    given = fields.get("logit_bias")
    if given is None:
        return None
    if not isinstance(given, dict) or len(given) > MAX_BIASES:
        raise wrong("logit_bias", f"an object of up to {MAX_BIASES} token ids", given)
    biases = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise wrong("logit_bias", "token ids as names", token)
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise wrong(f"logit_bias: {token}", "a number from -100 to 100", bias)
        biases[int(token)] = float(bias)
    return biases
