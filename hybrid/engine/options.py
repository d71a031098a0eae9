"""Checks of the options that callers give to an engine, and the model's own defaults."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from hybrid.errors import InvalidCheckpoint, InvalidOption
from hybrid.model.config import ModelConfig
from hybrid.text.sampling import SamplingParams

DEFAULT_CONTEXT = 4096  # positions, or the model's maximum if that is smaller
MAX_LOGPROBS = 100
MAX_THREADS = 1024


def check_options(
    *,
    max_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repeat_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    logprobs: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
) -> None:
    """Check options that do not depend on the model, so that errors come before a download.

    Raises InvalidOption for values that `load` or `Engine.generate` would refuse for any model.
    """
    checked_count("max_tokens", max_tokens)
    SamplingParams(
        temperature=0.0 if temperature is None else temperature,
        top_k=0 if top_k is None else top_k,
        top_p=1.0 if top_p is None else top_p,
        min_p=0.0 if min_p is None else min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
    )
    checked_stop(stop)
    if logprobs is not None:
        checked_count("logprobs", logprobs, MAX_LOGPROBS, least=0)
    if threads is not None:
        checked_count("threads", threads, MAX_THREADS)


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


def read_default_sampling(folder: Path) -> SamplingParams:
    """Return the model's sampling defaults, from generation_config.json if it exists.

    Raises InvalidCheckpoint if that file is broken.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return SamplingParams()
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        if values.get("do_sample") not in (True, False, None):
            raise ValueError(f"do_sample: expected true or false, found {values['do_sample']!r}")
        if values.get("do_sample") is False:
            return SamplingParams(temperature=0.0)
        options = {
            name: values[name]
            for name in ("temperature", "top_k", "top_p", "min_p")
            if values.get(name) is not None
        }
        return SamplingParams(**options)
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise InvalidCheckpoint(f"{path}: {error}") from error


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
