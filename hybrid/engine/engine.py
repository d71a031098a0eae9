"""Engine: a loaded model. It owns weights and threads; each sequence has its own session.

The class is the library's public interface, and half of the file is its contracts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hybrid.checkpoint.name import model_name
from hybrid.engine.answer import Answer
from hybrid.engine.batch.batched_generation import BatchedGeneration
from hybrid.engine.batch.loop import BatchLoop
from hybrid.engine.batch.passes import Batch
from hybrid.engine.generation import Generation
from hybrid.engine.loading.executors import Executor
from hybrid.engine.loading.pipeline import Parts
from hybrid.engine.loading.prediction import Prediction
from hybrid.engine.options import GenerationKeywords, GenerationOptions, spelling_out
from hybrid.engine.requests import Conversation, Requests
from hybrid.engine.session import Session
from hybrid.engine.session_file import Origin
from hybrid.engine.stats import EngineStats, GenerationStats
from hybrid.errors import EngineClosed, InvalidOption, OutOfMemory
from hybrid.model.config import ModelConfig
from hybrid.placement.hardware import last_level_cache_bytes, measure_stream_gbs
from hybrid.placement.plan import PlacementPlan
from hybrid.text.chat import Chat, ChatMessage
from hybrid.text.grammar import Form
from hybrid.text.sampling import SamplingParams
from hybrid.weights.layout import decode_bytes
from hybrid.weights.packing import NeuronOrders

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Engine:
    """A model, ready to generate. Open it with `hybrid.load`. Close it, or use it in a `with`
    statement.

    Generations may run from several threads at once. They use the cores alternately, one token at
    a time; a `BatchLoop` computes tokens of several at once.
    """

    def __init__(self, parts: Parts) -> None:
        """`hybrid.load` makes the parts (hybrid/engine/loading/pipeline.py)."""
        self.folder, self.spec, self._plan = parts.folder, parts.spec, parts.plan
        self.name: str = model_name(parts.folder)  # of its Hub repository, or of its folder
        self.tokenizer, self.defaults = parts.tokenizer, parts.defaults
        self._requests = Requests(parts.tokenizer, parts.spec, parts.defaults)
        # Per layer: the checkpoint's neurons in packed order. None: the checkpoint's own order.
        self.neuron_orders: NeuronOrders | None = parts.orders
        self.is_synthetic = parts.is_synthetic
        self._device_name, self._notices = parts.device_name, parts.notices
        self._executor: Executor | None = parts.executor
        loaded = parts.loaded
        # Whether all logits are estimated from a preview and only the likeliest computed in full.
        self.previews_head: bool = loaded.model.preview is not None and not (
            parts.plan.is_head_on_gpu
        )
        self._process_id = os.getpid()
        self._background = loaded.background
        self._loop: BatchLoop | None = None  # of agenerate and achat
        self._loop_lock = threading.Lock()
        self._stats_lock = threading.Lock()
        self._stats = EngineStats(
            load_s=parts.load_s,
            weight_bytes=loaded.n_bytes,
            is_mapped=loaded.is_mapped,
            is_locked=loaded.is_locked,
        )

    @property
    def uses_gpu(self) -> bool:
        """Whether a part of the model is on a GPU."""
        return self._plan.uses_gpu

    @property
    def vram_bytes(self) -> int:
        """Bytes of the tensors on the GPU: weights, KV cache, buffers."""
        return self._plan.vram_bytes

    @property
    def plan(self) -> PlacementPlan:
        """What is on which device. It names the model, so this hashes it as `model_hash` does, and
        raises the same errors; `uses_gpu` and `vram_bytes` do not.
        """
        if not self._plan.model_hash:
            self._plan = replace(self._plan, model_hash=self.model_hash)
        return self._plan

    @property
    def config(self) -> ModelConfig:
        return self.spec.config

    @property
    def quant(self) -> str:
        """The weight format: "bf16", "f16", "q8" or "q4"."""
        return self.spec.format.name

    @property
    def kv(self) -> str:
        """The format of the KV cache: "fp16" or "bf16"."""
        return self.spec.kv.name

    @property
    def n_threads(self) -> int:
        return self.spec.n_threads

    @property
    def n_context(self) -> int:
        """Positions of a session's KV cache."""
        return self.spec.n_context

    @property
    def default_sampling(self) -> SamplingParams:
        """How tokens are sampled where a caller says nothing: by the model, or by hybrid."""
        return self.defaults.sampling

    @property
    def model_hash(self) -> str:
        """A hash of the checkpoint's weights, which profiles, predictors and plans name.

        The files are hashed when something first needs it, once for each state of them. Raises
        InvalidCheckpoint if they are no longer those that were loaded.
        """
        return self.spec.model_hash

    @property
    def prediction(self) -> Prediction | None:
        """The predictors in use. None: every gate is computed."""
        return self.spec.prediction

    @property
    def device_name(self) -> str:
        """The name of the GPU in use, or "cpu"."""
        return self._device_name

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines that a user should see: what is slower or was not applied, and why."""
        later = () if self._background is None else self._background.notices
        return (*self._notices, *later)

    @property
    def stats(self) -> EngineStats:
        """Counts and times since the engine was loaded."""
        with self._stats_lock:
            if self._background is None:
                return self._stats
            is_copying, is_mapped = self._background.is_copying, self._background.is_mapped
            return replace(self._stats, is_mapped=is_mapped, is_copying=is_copying)

    def wait_for_weights(self) -> None:
        """Wait until all weights have been copied from their file into memory, and checked.

        This runs in the background for the first seconds, while the engine is already in use. Call
        this before measuring speed. Raises InvalidArtifact if the file is damaged.
        """
        if self._background is not None:
            self._background.wait()
            self._background.raise_damage()

    def prepare_grammars(self, guard: Callable[[Form], None] | None = None) -> None:
        """Do now what the first answer of a given form does: 120,000 tokens take 1.5 s.

        `guard` is called before a new form is compiled, and may raise.
        """
        self._requests.grammars.prepare()
        self._requests.grammars.guard = guard or self._requests.grammars.guard

    @property
    def fits_in_cache(self) -> bool:
        """Whether the weights are smaller than four times the CPU's last-level cache.

        Then much of them may stay in the cache, and memory bandwidth does not limit the speed.
        """
        return self._stats.weight_bytes < 4 * (last_level_cache_bytes() or 0)

    def measure_stream_gbs(self) -> float:
        """Measure the memory bandwidth in GB/s with the engine's threads.

        This takes half a second and 1 GiB of memory. Raises EngineClosed, and OutOfMemory unless
        1.5 GiB is free.
        """
        try:
            return measure_stream_gbs(self._open().pool)
        except MemoryError:
            raise OutOfMemory(
                "measuring the memory bandwidth needs 1.5 GiB of free memory, but this machine or "
                "container has less"
            ) from None

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

    @spelling_out(GenerationOptions)
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        session: Session | None = None,
        raw: bool = False,
        options: GenerationOptions | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Generation:
        """Continue a prompt; iterate over the result for its text.

        A text prompt is put into the model's chat template, if the model has one and `raw` is
        false. Token ids are used unchanged. Options that are not given take the values of the
        model's generation_config.json (`Engine.defaults`), then hybrid's own. Temperature 0 is
        greedy. `max_tokens=None` sets no limit but the context's. The text ends before the first of
        the `stop` strings; `stop=()` drops those of the model. `repeat_penalty` makes every token
        of the prompt and the answer less likely. `presence_penalty`, `frequency_penalty` (of the
        answer's tokens) and `logit_bias` are those of OpenAI's API. `logprobs` requests each
        token's log-probability, and those of that many likeliest tokens. With a `session` of this
        engine, the part of the prompt that its KV cache holds is not computed again. `speculate`
        changes the speed, never the text. With `context_shift` an answer goes on when the context
        is full: the first `n_keep` tokens stay, and the oldest half of the others goes. A prompt
        that is too long is then cut likewise. Keywords change what `options` says. Work begins with
        the first iteration.

        The file of packed weights is checked in the background, for a second or as long as reading
        it from disk takes. If it is damaged, the iteration ends with InvalidArtifact. An answer
        that is complete before that waits for the check after its last piece of text; `cancel`
        ends the wait, and the answer then counts as cancelled.

        Raises InvalidOption, ContextOverflow, EngineClosed, OutOfMemory. The iteration raises
        NumericOverflow if keys or values exceed the range of the KV cache.
        """
        options = replace(options or GenerationOptions(), **keywords)
        known = self._known(session)
        answer = self._requests.continuing(prompt, options, raw=raw, known=known)
        return self._begin(answer, session)

    @spelling_out(GenerationOptions)
    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        session: Session | None = None,
        options: GenerationOptions | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Generation:
        """Answer the last of `messages`, such as `[{"role": "user", "content": "Hello"}]`.

        The model's chat template decides which roles it knows. Contents are texts, or lists of
        parts `{"type": "text", "text": ...}`. If the last message is the assistant's, the model
        continues it. `tools` are JSON schemas of functions that the model may call, and `variables`
        more of the template's variables, such as `{"enable_thinking": False}`. With a `session`,
        pass the whole conversation each time: only what is new is computed. Options and errors are
        those of `generate`. Raises InvalidOption if the model has no chat template, and with the
        template's own words if it refuses the messages.
        """
        options = replace(options or GenerationOptions(), **keywords)
        # A copy of the messages, because the caller may edit the conversation in place later.
        chat = Chat(messages, tools, variables=variables or {})
        known = self._known(session)
        return self._begin(self._requests.answering(chat, options, known=known), session)

    def open_session(
        self, file: Path | str | None = None, *, dense: bool = False, timed: bool = False
    ) -> Session:
        """Open a new, empty sequence with its own KV cache; weights and threads are shared.

        With the `file` of `Session.save`, it begins with the saved tokens, and continues with the
        same bits as the session that was saved. Its `logits` are zeros until it appends a token.

        `dense` computes all neurons and gives the same results, to show what skipping saves.
        `timed` measures where time goes (`Session.stage_seconds`) and costs one percent of time.
        Raises OutOfMemory, EngineClosed, InvalidArtifact. For a file also InvalidOption if a plan
        uses the GPU, and ContextOverflow.
        """
        origin = Origin(self.spec, ignores_predictor=dense and self.prediction is not None)
        try:
            executor = self._open()
            native = executor.open_session(is_dense=dense, is_timed=timed, kv=self.spec.kv)
            session = Session(native, self.config, executor, self._background, origin, dense)
        except MemoryError:
            raise OutOfMemory(
                f"a context of {self.n_context} tokens does not fit into memory; "
                "choose a smaller context_size"
            ) from None
        return session if file is None else session.filled_from(Path(file))

    def open_batch(self) -> Batch:
        """Open a Batch, whose passes append tokens to several sessions of this engine at once.

        Raises EngineClosed.
        """
        return Batch(self._open())

    @spelling_out(GenerationOptions)
    def agenerate(
        self,
        prompt: str | Sequence[int],
        *,
        raw: bool = False,
        options: GenerationOptions | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> BatchedGeneration:
        """Continue a prompt as `generate` does; iterate over the result with `async for`.

        The texts are those of `generate`. They come from a `BatchLoop` of default values, which the
        first call opens and `close` closes: up to 4 answers at once, while 64 wait. Cancelling the
        task cancels the answer within one pass. Any event loop and any thread may call this. Raises
        as `BatchLoop` and its `submit` do.
        """
        return self._default_loop().submit(prompt, raw=raw, options=options, **keywords)

    @spelling_out(GenerationOptions)
    def achat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        options: GenerationOptions | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> BatchedGeneration:
        """Answer the last of `messages` as `chat` does; otherwise as `agenerate`."""
        return self._default_loop().submit_chat(
            messages, tools=tools, variables=variables, options=options, **keywords
        )

    def close(self) -> None:
        """Free weights and threads as soon as running generations have ended."""
        with self._loop_lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()
        if self._executor is not None:
            self._executor.close()
        self._executor = None
        if self._background is not None:
            self._background.stop()

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

    def _default_loop(self) -> BatchLoop:
        self._open()
        with self._loop_lock:
            if self._loop is None:
                self._loop = BatchLoop(self)
            return self._loop

    def _begin(self, answer: Answer, session: Session | None) -> Generation:
        if session is None:
            return Generation(self.open_session(), answer, self._count, owns_session=True)
        return Generation(session, answer, self._count, owns_session=False)

    def _known(self, session: Session | None) -> Conversation | None:
        """Return the conversation of a caller's session, after checking the session and engine."""
        executor = self._open()
        if session is not None and session._engine is not executor:
            raise InvalidOption("session: belongs to another engine")
        return None if session is None else session.chat

    def _count(self, ended: GenerationStats) -> None:
        with self._stats_lock:
            self._stats = self._stats.with_generation(ended)
