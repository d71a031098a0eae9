"""Engine: a loaded model. It owns weights and threads; each generation has its own session."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
import psutil

from hybrid.checkpoint import open_checkpoint
from hybrid.engine.cpu_executor import CpuExecutor
from hybrid.engine.generation import Generation
from hybrid.errors import ContextOverflow, EngineClosed, InvalidCheckpoint, InvalidOption
from hybrid.kernels import Format, Session, check_isa_cap
from hybrid.sampling import Sampler, SamplingParams
from hybrid.tokenizer import ChatMessage, Tokenizer
from hybrid.weights.packed import pack_model

Quant = Literal["bf16", "q8", "q4"]

DEFAULT_CONTEXT = 4096  # positions, where the model allows as many


class Engine:
    """A model, ready to generate. Open it with `hybrid.load`; close it, or use it in a `with`
    statement.

    Generations may run from several threads at once; they take turns at the cores, token by token.
    """

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        quant: Quant = "q8",
        context_size: int | None = None,
    ) -> None:
        """Load the Hugging Face folder. See `hybrid.load` for the options and errors."""
        check_isa_cap()
        n_threads = _checked_count(
            "threads", default_threads() if threads is None else threads, 1024
        )
        if quant not in get_args(Quant):
            raise InvalidOption(
                f"quant: expected one of {', '.join(get_args(Quant))}, found {quant!r}"
            )
        with open_checkpoint(folder, Format[quant]) as checkpoint:
            config, self._checkpoint_notices = checkpoint.config, checkpoint.notices
            if context_size is None:
                context_size = min(config.max_context, DEFAULT_CONTEXT)
            n_context = _checked_count("context_size", context_size, config.max_context)
            self.tokenizer = Tokenizer.from_folder(
                folder, vocab_size=config.vocab_size, bos_id=config.bos_id
            )
            self.default_sampling = read_default_sampling(folder)
            model = pack_model(checkpoint, Format[quant], n_threads=n_threads)
        self.config, self.quant = config, quant
        self.n_threads, self.n_context = n_threads, n_context
        self._process_id = os.getpid()
        self._executor: CpuExecutor | None = CpuExecutor(
            model, config, Format[quant], n_threads=n_threads, n_context=n_context
        )

    @property
    def notices(self) -> tuple[str, ...]:
        """One-line notes that a user should see, such as a chat template that is not applied."""
        return self._checkpoint_notices + self.tokenizer.notices

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        raw: bool = False,
    ) -> Generation:
        """Continue a prompt; iterate over the result for its text.

        A text prompt is put into the model's chat template where it has one, unless `raw`; token
        ids are taken as they stand. Sampling options that are None take the model's own defaults;
        temperature 0 is greedy. The text ends before the first of the `stop` strings. Work begins
        with the first iteration. Raises InvalidOption, ContextOverflow, EngineClosed.
        """
        defaults = self.default_sampling
        params = SamplingParams(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            seed=seed,
        )
        max_tokens = _checked_count("max_tokens", max_tokens)
        return Generation(
            self.open_session(),
            self.tokenizer,
            Sampler(params),
            self._checked_prompt(prompt, raw=raw),
            max_tokens=max_tokens,
            stop=_checked_stop(stop),
            eos_ids=self.config.eos_ids,
            n_neurons=self.config.n_layers * self.config.n_neurons,
        )

    def open_session(self) -> Session:
        """A native session of its own KV cache: token ids in, logits out. What `generate` stands
        on.
        """
        if self._executor is None:
            raise EngineClosed("the engine is closed; load the model again")
        if os.getpid() != self._process_id:
            raise EngineClosed(
                "the engine was loaded before this process was forked, and its threads stayed "
                "behind; load the model in the child"
            )
        return self._executor.open_session()

    def close(self) -> None:
        """Give back weights and threads as soon as running generations have ended."""
        self._executor = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _checked_prompt(self, prompt: str | Sequence[int], *, raw: bool) -> list[int]:
        if not isinstance(prompt, str):
            ids = self._checked_ids(prompt)
        elif raw or not self.tokenizer.has_chat_template:
            ids = self.tokenizer.encode(prompt)
        else:
            message: ChatMessage = {"role": "user", "content": prompt}
            ids = self.tokenizer.encode_chat([message])
        if not ids:
            raise InvalidOption(
                "prompt: it is empty, and this model has no token to begin a text with"
            )
        if len(ids) > self.n_context:
            advice = "shorten the prompt"
            if self.n_context < self.config.max_context:
                advice += f" or ask for a larger context (up to {self.config.max_context})"
            raise ContextOverflow(
                f"the prompt has {len(ids)} tokens, the context holds {self.n_context}; {advice}"
            )
        return ids

    def _checked_ids(self, prompt: Sequence[int]) -> list[int]:
        expected = f"text, or token ids from 0 to {self.config.vocab_size - 1}"
        if isinstance(prompt, (bytes, bytearray, memoryview)) or not isinstance(prompt, Iterable):
            raise InvalidOption(f"prompt: expected {expected}, found {type(prompt).__name__}")
        ids = []
        for token in prompt:
            if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
                raise InvalidOption(f"prompt: expected {expected}, found {token!r}")
            if not 0 <= token < self.config.vocab_size:
                raise InvalidOption(f"prompt: expected {expected}, found {token}")
            ids.append(int(token))
        return ids


def default_threads() -> int:
    """Physical cores that this process may use: more threads only compete for the same memory
    bandwidth.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed or 1))


def read_default_sampling(folder: Path) -> SamplingParams:
    """The model's own sampling defaults, from generation_config.json where there is one."""
    path = folder / "generation_config.json"
    if not path.exists():
        return SamplingParams()
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        if values.get("do_sample") is False:
            return SamplingParams(temperature=0.0)
        options = {
            name: values[name]
            for name in ("temperature", "top_k", "top_p")
            if values.get(name) is not None
        }
        return SamplingParams(**options)
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise InvalidCheckpoint(f"{path}: {error}") from error


def _checked_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidOption(f"stop: expected strings that are not empty, found {string!r}")
    return strings


def _checked_count(name: str, value: SupportsIndex, largest: int | None = None) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1 or (largest is not None and count > largest):
        expected = "an integer, 1 or more" if largest is None else f"an integer from 1 to {largest}"
        raise InvalidOption(f"{name}: expected {expected}, found {value!r}")
    return count
