"""Engine: a loaded model. It owns weights and threads; each sequence has its own session."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from hybrid.checkpoint import open_checkpoint
from hybrid.engine.generation import Generation, GenerationStats
from hybrid.engine.loading.choices import choose_mmap, choose_orders, isa_notices
from hybrid.engine.loading.executors import Executor, open_executor
from hybrid.engine.loading.model_spec import DeviceName, DeviceRequest, ModelSpec
from hybrid.engine.loading.planning import decide
from hybrid.engine.loading.prediction import DEFAULT_RECALL, Prediction, choose_predictors
from hybrid.engine.options import (
    MAX_LOGPROBS,
    MAX_THREADS,
    checked_context,
    checked_count,
    checked_ids,
    checked_stop,
    read_default_sampling,
)
from hybrid.engine.session import Session
from hybrid.errors import (
    ContextOverflow,
    EngineClosed,
    InvalidOption,
    OutOfMemory,
)
from hybrid.kernels import Format, check_isa_cap
from hybrid.placement.hardware import (
    default_threads,
    last_level_cache_bytes,
    measure_stream_gbs,
)
from hybrid.progress import Progress, ignore_progress
from hybrid.text.sampling import Sampler, SamplingParams
from hybrid.text.tokenizer import ChatMessage, Tokenizer, check_message
from hybrid.weights.layout import decode_bytes, packed_layout
from hybrid.weights.packed_file import load_packed
from hybrid.weights.packing import NeuronOrders, order_hash
from hybrid.weights.preview import wants_preview

Quant = Literal["bf16", "q8", "q4"]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts and times since an engine was loaded. A generation counts once it has ended."""

    load_s: float = 0.0
    weight_bytes: int = 0  # of the packed weights
    is_mapped: bool = False  # some weights are in a mapped file, not yet in memory of our own
    is_copying: bool = False  # mapped weights are being copied into memory in the background
    is_locked: bool = False  # the system cannot move the weights out of memory
    n_generations: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that a session's KV cache already held
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Engine:
    """A model, ready to generate. Open it with `hybrid.load`. Close it, or use it in a `with`
    statement.

    Generations may run from several threads at once. They use the cores alternately, one token at
    a time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        quant: Quant = "q8",
        context_size: int | None = None,
        mmap: bool | None = None,
        mlock: bool = False,
        profile: Path | Literal["auto", "none"] = "auto",
        predictor: Path | Literal["auto", "exact"] = "exact",
        recall: float = DEFAULT_RECALL,
        device: DeviceName = "auto",
        vram_budget: int | None = None,
        plan: Path | None = None,
        hand_offs: str = "auto",
        home: Path | None = None,
        progress: Progress = ignore_progress,
    ) -> None:
        """Load a Hugging Face folder. `hybrid.load` describes the options and errors.

        `home` is hybrid's own folder: packed models are kept there, and profiles, predictors and
        plans are looked for there. None keeps nothing.
        """
        started = time.perf_counter()
        check_isa_cap()
        n_threads = checked_count(
            "threads", default_threads() if threads is None else threads, MAX_THREADS
        )
        if quant not in get_args(Quant):
            raise InvalidOption(
                f"quant: expected one of {', '.join(get_args(Quant))}, found {quant!r}"
            )
        format = Format[quant]
        request = DeviceRequest(device, vram_budget, plan, hand_offs)
        request.check()
        with open_checkpoint(folder, format, progress, use_mmap=mmap is not False) as checkpoint:
            config = checkpoint.config
            n_context = checked_context(context_size, config)
            self.tokenizer = Tokenizer.from_folder(
                folder, vocab_size=config.vocab_size, bos_id=config.bos_id
            )
            self.default_sampling = read_default_sampling(folder)
            orders, frequencies, order_notices = choose_orders(checkpoint, profile, home)
            self.model_hash: str = checkpoint.weights_hash
            self.prediction: Prediction | None
            predictors, self.prediction, predictor_notices = choose_predictors(
                predictor,
                recall,
                config=config,
                model_hash=self.model_hash,
                order_hash=order_hash(orders),
                quant=quant,
                home=home,
            )
            predicted_layers = frozenset(
                layer for layer, native in enumerate(predictors or ()) if native is not None
            )
            layout = packed_layout(
                config,
                format,
                predicted_layers,
                has_preview=wants_preview(config, predicted_layers),
            )
            use_mmap, memory_notices = choose_mmap(mmap, layout.n_bytes)
            loaded = load_packed(
                checkpoint,
                layout,
                cache=None if home is None else home / "packed",
                neuron_orders=orders,
                use_mmap=use_mmap,
                use_mlock=mlock,
                fits_memory=not memory_notices,
                n_threads=n_threads,
                progress=progress,
            )
            self.is_synthetic: bool = checkpoint.is_synthetic
        spec = ModelSpec(
            layout=layout,
            n_context=n_context,
            n_threads=n_threads,
            model_hash=self.model_hash,
            order_hash=order_hash(orders),
            frequencies=frequencies,
            prediction=self.prediction,
        )
        self.spec: ModelSpec = spec  # what a placement plan is made for
        decision = decide(request, spec, home)
        executor, self.plan, plan_notices = open_executor(
            decision, spec, loaded.model, predictors, home
        )
        # Whether all logits are estimated from a preview and only the likeliest computed in full.
        self.previews_head: bool = loaded.model.preview is not None and not (
            self.plan.is_head_on_gpu
        )
        # Per layer: the checkpoint's neurons in packed order. None: the checkpoint's own order.
        self.neuron_orders: NeuronOrders | None = orders
        self.folder, self.config, self.quant = folder, config, quant
        self.n_threads, self.n_context = n_threads, n_context
        self._notices: tuple[str, ...] = (
            *checkpoint.notices,
            *self.tokenizer.notices,
            *order_notices,
            *predictor_notices,
            *memory_notices,
            *loaded.notices,
            *plan_notices,
            *isa_notices(),
        )
        self._process_id = os.getpid()
        self._executor: Executor | None = executor
        self._device_name = (
            decision.device.name if self.plan.uses_gpu and decision.device else "cpu"
        )
        self._stats_lock = threading.Lock()
        self._copying = loaded.copying
        self._stats = EngineStats(
            load_s=time.perf_counter() - started,
            weight_bytes=loaded.n_bytes,
            is_mapped=loaded.is_mapped,
            is_locked=loaded.is_locked,
        )

    @property
    def device_name(self) -> str:
        """The name of the GPU in use, or "cpu"."""
        return self._device_name

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines that a user should see: what is slower or was not applied, and why."""
        return self._notices + (() if self._copying is None else self._copying.notices)

    @property
    def stats(self) -> EngineStats:
        """Counts and times since the engine was loaded."""
        with self._stats_lock:
            if self._copying is None:
                return self._stats
            is_copying, is_mapped = self._copying.is_copying, self._copying.is_mapped
            return replace(self._stats, is_mapped=is_mapped, is_copying=is_copying)

    def wait_for_weights(self) -> None:
        """Wait until all weights have been copied from their file into memory.

        The copy runs in the background for the first seconds, while the engine is already in use.
        Call this before measuring speed.
        """
        if self._copying is not None:
            self._copying.wait()

    @property
    def fits_in_cache(self) -> bool:
        """Whether the weights are smaller than four times the CPU's last-level cache.

        Then much of them may stay in the cache, and memory bandwidth does not limit the speed.
        """
        return self._stats.weight_bytes < 4 * (last_level_cache_bytes() or 0)

    def measure_stream_gbs(self) -> float:
        """Measure the memory bandwidth in GB/s with the engine's threads.

        This takes half a second and 1 GiB of memory. Raises OutOfMemory, EngineClosed.
        """
        try:
            return measure_stream_gbs(self._open().pool)
        except MemoryError:
            raise OutOfMemory("measuring the memory bandwidth needs 1 GiB of free memory") from None

    def expected_decode_bytes(
        self,
        *,
        n_tokens: int,
        first_position: int,
        n_active: int,
        n_gates: int | None = None,
        n_shortlisted: int = 0,
    ) -> int:
        """Compute from the model's sizes the bytes of weights and KV cache that decode reads.

        `Session.decode_bytes` must have counted the same number for decoding `n_tokens` tokens from
        `first_position` on. `n_active` is the number of (neuron, token) pairs that fire. `n_gates`
        is the number of pairs whose gate is computed: those that the predictor names, or None for
        all. `n_shortlisted` is the number of rows of a previewed head that are computed in full.
        """
        n_bytes = decode_bytes(
            self.spec.layout, n_tokens, first_position, n_active, n_gates, n_shortlisted
        )
        if n_gates is not None and self.prediction is not None:
            n_bytes += n_tokens * self.prediction.bytes_per_token
        return n_bytes

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        session: Session | None = None,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        seed: int | None = None,
        raw: bool = False,
    ) -> Generation:
        """Continue a prompt; iterate over the result for its text.

        A text prompt is put into the model's chat template, if the model has one and `raw` is
        false. Token ids are used unchanged. Sampling options that are None take the model's own
        defaults; temperature 0 is greedy. The text ends before the first of the `stop` strings.
        `logprobs` requests each token's log-probability, and those of that many likeliest tokens.
        With a `session` of this engine, the part of the prompt that its KV cache holds is not
        computed again. Work begins with the first iteration.

        Raises InvalidOption, ContextOverflow, EngineClosed, OutOfMemory.
        """
        return self._begin(
            self._checked_prompt(prompt, raw=raw),
            session,
            self._sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed),
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
        )

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        session: Session | None = None,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        seed: int | None = None,
    ) -> Generation:
        """Answer the last of `messages`, such as `[{"role": "user", "content": "Hello"}]`.

        Roles are "system" (first only), "user" and "assistant". With a `session`, pass the whole
        conversation each time: only what is new is computed. Options and errors are those of
        `generate`. Raises InvalidOption if hybrid knows no chat template of the model.
        """
        # Copy the messages, because the caller may edit the conversation in place later.
        try:
            messages = tuple(messages)
        except TypeError:
            kind = type(messages).__name__
            raise InvalidOption(f"messages: expected a list of dicts, found {kind}") from None
        for index, message in enumerate(messages):
            check_message(index, message)
        messages = tuple({"role": m["role"], "content": m["content"]} for m in messages)
        return self._begin(
            self._chat_ids(messages, session),
            session,
            self._sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed),
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            messages=messages,
        )

    def open_session(self, *, dense: bool = False, timed: bool = False) -> Session:
        """Open a new, empty sequence with its own KV cache; weights and threads are shared.

        `dense` computes all neurons and gives the same results, to show what skipping saves.
        `timed` measures where time goes (`Session.stage_seconds`) and costs one percent of time.
        Raises OutOfMemory, EngineClosed.
        """
        try:
            executor = self._open()
            native = executor.open_session(is_dense=dense, is_timed=timed)
            return Session(native, self.config, executor)
        except MemoryError:
            raise OutOfMemory(
                f"a context of {self.n_context} tokens does not fit into memory; "
                "choose a smaller context_size"
            ) from None

    def close(self) -> None:
        """Free weights and threads as soon as running generations have ended."""
        if self._executor is not None:
            self._executor.close()
        self._executor = None
        if self._copying is not None:
            self._copying.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> Executor:
        if self._executor is None:
            raise EngineClosed("the engine is closed; load the model again")
        if os.getpid() != self._process_id:
            raise EngineClosed(
                "the engine was loaded before this process was forked, and the child has none of "
                "its threads; load the model in the child"
            )
        return self._executor

    def _begin(
        self,
        ids: list[int],
        session: Session | None,
        params: SamplingParams,
        *,
        max_tokens: int,
        stop: str | Sequence[str],
        logprobs: int | None,
        messages: Sequence[ChatMessage] = (),
    ) -> Generation:
        max_tokens, stop = checked_count("max_tokens", max_tokens), checked_stop(stop)
        if logprobs is not None:
            logprobs = checked_count("logprobs", logprobs, MAX_LOGPROBS, least=0)
        executor = self._open()
        if session is not None and session._engine is not executor:
            raise InvalidOption("session: belongs to another engine")
        return Generation(
            self.open_session() if session is None else session,
            self.tokenizer,
            Sampler(params),
            ids,
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            eos_ids=self.config.eos_ids,
            n_neurons=self.config.n_layers * self.config.n_neurons,
            owns_session=session is None,
            messages=tuple(messages),
            on_end=self._count,
        )

    def _count(self, ended: GenerationStats) -> None:
        with self._stats_lock:
            before = self._stats
            self._stats = replace(
                before,
                n_generations=before.n_generations + 1,
                prompt_tokens=before.prompt_tokens + ended.prompt_tokens,
                cached_tokens=before.cached_tokens + ended.cached_tokens,
                generated_tokens=before.generated_tokens + ended.generated_tokens,
                prefill_s=before.prefill_s + ended.prefill_s,
                decode_s=before.decode_s + ended.decode_s,
            )

    def _sampling(
        self,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        repeat_penalty: float,
        seed: int | None,
    ) -> SamplingParams:
        defaults = self.default_sampling
        return SamplingParams(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
            min_p=defaults.min_p if min_p is None else min_p,
            repeat_penalty=repeat_penalty,
            seed=seed,
        )

    def _chat_ids(self, messages: Sequence[ChatMessage], session: Session | None) -> list[int]:
        """Return the conversation's ids.

        If the conversation continues the session's last answer, only the new messages are encoded
        and appended to the session's ids.
        """
        known = None if session is None else session.chat
        if known is not None:
            earlier, ids = known
            new = tuple(messages[len(earlier) :])
            if new and tuple(messages[: len(earlier)]) == earlier:
                return self._checked_length(ids + self.tokenizer.encode_next_message(new))
        return self._checked_length(self.tokenizer.encode_chat(messages))

    def _checked_prompt(self, prompt: str | Sequence[int], *, raw: bool) -> list[int]:
        if not isinstance(prompt, str):
            ids = checked_ids(prompt, self.config.vocab_size)
        elif raw or not self.tokenizer.has_chat_template:
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        return self._checked_length(ids)

    def _checked_length(self, ids: list[int]) -> list[int]:
        if not ids:
            raise InvalidOption(
                "prompt: it is empty, and this model has no token that begins a text"
            )
        if len(ids) > self.n_context:
            advice = "shorten the prompt"
            if self.n_context < self.config.max_context:
                advice += f" or choose a larger context (up to {self.config.max_context})"
            raise ContextOverflow(
                f"the prompt has {len(ids)} tokens, the context holds {self.n_context}; {advice}"
            )
        return ids
