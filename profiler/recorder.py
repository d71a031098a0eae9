"""Recorder: runs corpora through an engine, adds up which neurons fire, and keeps a trace.

It saves its state every few seconds, together with the sums that belong to it. An interrupted
recording continues there if it is started again with the same folder and options.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from hybrid import Engine, HybridError, InvalidOption, Observation, Progress
from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.files import read_bytes, read_safetensors, write_atomically
from hybrid.kernels import Format
from hybrid.notices import Notices
from hybrid.placement.gate_costs import measure_gate_costs
from hybrid.placement.profile import FILE_NAME, ActivationProfile
from hybrid.weights.packing import order_hash
from predictors import schema
from predictors.trace import START, Sample, TraceSizes, TraceWriter, holds, record_bytes
from profiler.corpus import Corpus, random_corpora, written_corpora
from profiler.statistics import ActivationSums

SAVE_EVERY_S = 10.0
MIN_TRACE_TOKENS = 64
_MAX_TOKENIZER_BYTES = 64 << 20  # as the engine reads it
_TASK = "recording, tokens"
_STATE = "recording.json"
_SUMS = "recording.safetensors"
_RECORDING = schema.record(
    {
        "identity": schema.anything,
        **dict.fromkeys(("serial", "text", "place"), schema.integer(most=2**63)),
        "text_tokens": schema.list_of(schema.integer()),
        "trace": schema.record({}, dict.fromkeys(Sample._fields, schema.integer())),
    }
)


@dataclass(frozen=True, slots=True)
class RecordingOptions:
    model: str  # the model's name, for the profile
    window: int = 512  # tokens in one context
    max_tokens: int | None = None  # limit for each corpus
    trace_bytes: int = 0  # maximum size of the trace; 0: no trace


@dataclass(frozen=True, slots=True)
class Recording:
    profile: ActivationProfile
    trace_tokens: int
    trace_bytes: int
    n_new_tokens: int  # tokens that this run added
    seconds: float
    notices: tuple[str, ...]  # what of an earlier run was broken and made again, one line each


def record(
    engine: Engine,
    corpora: Sequence[Corpus],
    folder: Path,
    options: RecordingOptions,
    progress: Progress,
) -> Recording:
    """Record into `folder`.

    Without corpora it records on texts that the model writes, or on random ids for a synthetic
    model. Raises InvalidOption for a model without sparsity, a text without tokens, a window
    without room for text, or a folder that holds another recording, and InvalidArtifact if the file
    of packed weights is damaged. Raises HybridError if the disk is full.
    """
    config = engine.config
    if not config.is_sparse:
        raise InvalidOption(
            f"{options.model}: its activation is {config.activation}, which is never exactly zero: "
            "every neuron fires, so there is nothing to record"
        )
    engine.wait_for_weights()  # nothing that damaged weights compute is kept
    notices = Notices()
    options = replace(options, window=min(options.window, engine.n_context))
    n_bos = len(engine.tokenizer.bos)
    if corpora and options.window <= n_bos:
        raise InvalidOption(
            f"a window of {options.window} tokens has no room for text: the model's tokenizer puts "
            f"{n_bos} before each; choose a larger window"
        )
    if (folder / FILE_NAME).exists():
        raise InvalidOption(f"{folder}: holds a finished recording; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not corpora and engine.is_synthetic:
            corpora = random_corpora(engine, options.window)
        elif not corpora:
            corpora = written_corpora(engine, folder / "texts", progress, notices)
        recorder = _Recorder(engine, corpora, folder, options, notices)
        try:
            return recorder.run(progress)
        finally:
            recorder.close()
    except OSError as error:
        raise HybridError(f"{folder}: cannot be written: {error.strerror or error}") from error


class _Recorder:
    def __init__(
        self,
        engine: Engine,
        corpora: Sequence[Corpus],
        folder: Path,
        options: RecordingOptions,
        notices: Notices,
    ) -> None:
        self.engine, self.corpora, self.folder, self.options = engine, corpora, folder, options
        self.notices = notices
        config = engine.config
        self.sizes = TraceSizes(config.n_layers, config.n_neurons, config.hidden_size)
        self.orders = engine.neuron_orders
        self.texts = [corpus.about() for corpus in corpora]
        self.identity = {
            "model_hash": engine.model_hash,
            "order_hash": order_hash(self.orders),
            "quant": engine.quant,
            "bos": list(engine.tokenizer.bos),
            "window": options.window,
            "max_tokens": options.max_tokens,
            "trace_bytes": options.trace_bytes,
            "texts": [text["sha256"] for text in self.texts],
        }
        self.sums = ActivationSums(len(corpora), config.n_layers, config.n_neurons)
        self.text, self.place = 0, 0  # where the next window is
        self.text_tokens = [0] * len(corpora)
        capacity = self._capacity() if options.trace_bytes else 0
        sample = self._load_state(capacity)
        self.trace = self._open_trace(capacity, sample) if options.trace_bytes else None

    def _load_state(self, capacity: int) -> Sample:
        """Load the sums and the state of an earlier run, and return the state of its trace.

        A state that is broken or cannot be true is ignored, with a notice.
        """
        if not (self.folder / _STATE).exists():
            return START
        try:
            state = schema.read_json(read_bytes(self.folder / _STATE, 16 << 20), _RECORDING)
            _, sums = read_safetensors(self.folder / _SUMS, 16 << 30)
        except (OSError, ValueError):
            return self._begin_again()
        if state["identity"] != self.identity:
            raise InvalidOption(
                f"{self.folder}: holds the beginning of another recording (of another model, text "
                "or options); choose another folder or delete it"
            )
        sample = START
        if capacity:
            if set(state["trace"]) != set(Sample._fields):
                return self._begin_again()
            sample = Sample(**state["trace"])
        if not (
            self._is_place(state)
            and self._are_sound(sums, state)
            and (not capacity or self._is_sample(sample, capacity, state))
        ):
            return self._begin_again()
        for name in ActivationSums.ARRAYS:
            getattr(self.sums, name)[...] = sums[name]
        self.text, self.place = state["text"], state["place"]
        self.text_tokens = state["text_tokens"]
        return sample

    def _begin_again(self) -> Sample:
        self.notices.add(
            f"{self.folder}: the state of the interrupted recording is broken or incomplete: the "
            "recording began again"
        )
        return START

    def _are_sound(self, sums: dict[str, NDArray[Any]], state: dict[str, Any]) -> bool:
        """Return whether the sums are this recording's, and of the same moment as the state.

        A run can stop between writing the two files.
        """
        ours = {name: getattr(self.sums, name) for name in ActivationSums.ARRAYS}
        ours["serial"] = np.zeros(1, np.int64)
        for name, array in ours.items():
            theirs = sums.get(name)
            if theirs is None or theirs.shape != array.shape or theirs.dtype != array.dtype:
                return False
            if (theirs < 0).any():
                return False
        tokens = np.array(state["text_tokens"])
        return bool(
            sums["serial"][0] == state["serial"]
            and sums["position_tokens"].sum() == tokens.sum()
            and (sums["text_counts"] <= tokens[:, None, None]).all()
        )

    def _is_place(self, state: dict[str, Any]) -> bool:
        """Return whether the texts can have been read as far as the state says."""
        text, place, n_texts = state["text"], state["place"], len(self.corpora)
        tokens, limit = state["text_tokens"], self.options.max_tokens
        if len(tokens) != n_texts or text > n_texts:
            return False
        if any(tokens[text + 1 :]) or (limit is not None and max(tokens) > limit):
            return False
        if text == n_texts:
            return bool(place == 0)
        return bool(place <= self.corpora[text].size and (place > 0 or tokens[text] == 0))

    def _is_sample(self, sample: Sample, capacity: int, state: dict[str, Any]) -> bool:
        """Return whether the trace holds every `stride`-th of the tokens that were recorded."""
        return (
            sample.stride >= 1
            and sample.n_seen == sum(state["text_tokens"])
            and sample.n_records == -(-sample.n_seen // sample.stride) <= capacity
            and holds(self.folder / "trace", self.sizes, sample)
        )

    def _save_state(self) -> None:
        """Save the sums first, then the state. The serial number ties the two files together."""
        trace: dict[str, int] = {}
        if self.trace is not None:
            self.trace.flush()
            trace = self.trace.sample._asdict()
        serial = time.time_ns()
        sums = {name: getattr(self.sums, name) for name in ActivationSums.ARRAYS}
        state = {
            "identity": self.identity,
            "serial": serial,
            "text": self.text,
            "place": self.place,
            "text_tokens": self.text_tokens,
            "trace": trace,
        }
        for name, content in (
            (_SUMS, save({**sums, "serial": np.array([serial])})),
            (_STATE, json.dumps(state).encode()),
        ):
            write_atomically(self.folder / name, content)
        if self.trace is not None:
            self.trace.drop_stale()

    def _capacity(self) -> int:
        """Return how many tokens the trace's budget holds. Raises InvalidOption if too few."""
        config, budget = self.engine.config, self.options.trace_bytes
        n_bytes = self._token_bytes()
        gates = config.n_layers * config.n_neurons * config.hidden_size * 2
        capacity = (budget - gates) // n_bytes
        if capacity < MIN_TRACE_TOKENS:
            least = (gates + MIN_TRACE_TOKENS * n_bytes) / 1e6
            raise InvalidOption(
                f"--trace-budget: {budget / 1e6:.0f} MB have no room for {MIN_TRACE_TOKENS} tokens "
                f"beside the gate weights; expected at least {least:.0f} MB"
            )
        return capacity

    def _token_bytes(self) -> int:
        """Return the bytes of one token in the trace."""
        n_layers, n_neurons, hidden_size = self.sizes
        return n_layers * record_bytes(hidden_size, n_neurons)

    def _open_trace(self, capacity: int, sample: Sample) -> TraceWriter:
        budget = self.options.trace_bytes
        free = shutil.disk_usage(self.folder).free
        written = sample.n_records * self._token_bytes()
        if not self.options.max_tokens and budget - written > free:
            raise InvalidOption(
                f"--trace-budget: {budget / 1e6:.0f} MB requested, but {free / 1e6:.0f} MB are "
                f"free in {self.folder}"
            )
        return TraceWriter(self.folder / "trace", self.sizes, capacity, sample)

    def run(self, progress: Progress) -> Recording:
        started = saved = time.monotonic()
        before = self.sums.n_tokens
        total = sum(corpus.size for corpus in self.corpora)
        with self.engine.open_session() as session:
            while self.text < len(self.corpora):
                corpus, limit = self.corpora[self.text], self.options.max_tokens
                done = sum(earlier.size for earlier in self.corpora[: self.text])
                for ids, place in corpus.windows(self.engine, self.options.window, self.place):
                    if limit is not None:
                        ids = ids[: limit - self.text_tokens[self.text]]
                    if not ids:
                        break
                    self._tell(progress, done + self.place, total)
                    session.reset()
                    self._add(session.observe(ids, inputs=self.trace is not None))
                    self.text_tokens[self.text] += len(ids)
                    if place != self.place:
                        self.place = place
                        if time.monotonic() - saved > SAVE_EVERY_S:
                            self._save_state()
                            saved = time.monotonic()
                self.text, self.place = self.text + 1, 0
        seconds = time.monotonic() - started
        n_tokens = self.sums.n_tokens
        progress(_TASK, n_tokens, n_tokens)
        if n_tokens == 0:
            raise InvalidOption("the texts hold no tokens; there is nothing to record")
        profile = self._profile()
        if not profile.counts.any():
            raise InvalidOption(
                f"no neuron fired for any of {n_tokens} tokens: the model or the text is not what "
                "it seems"
            )
        trace_tokens = 0 if self.trace is None else self.trace.n_records
        trace_bytes = 0 if self.trace is None else self._finish_trace(self.trace, profile)
        profile.save(self.folder / FILE_NAME)
        for name in (_STATE, _SUMS):
            (self.folder / name).unlink(missing_ok=True)
        return Recording(
            profile, trace_tokens, trace_bytes, n_tokens - before, seconds, tuple(self.notices)
        )

    def _tell(self, progress: Progress, done: int, total: int) -> None:
        """Report progress. The total is estimated from the tokens so far, at first from bytes."""
        n_tokens = self.sums.n_tokens
        estimate = n_tokens * total // done if done and n_tokens else total // 4
        if self.options.max_tokens is not None:
            estimate = min(estimate, self.options.max_tokens * len(self.corpora))
        progress(_TASK, n_tokens, max(estimate, n_tokens + 1))

    def close(self) -> None:
        if self.trace is not None:
            self.trace.close()

    def _add(self, seen: Observation) -> None:
        self.sums.add(seen.masks, self.text)
        if self.trace is not None and seen.inputs is not None:
            self.trace.add(seen.inputs, seen.masks)

    def _profile(self) -> ActivationProfile:
        sums, config = self.sums, self.engine.config
        packed = sums.text_counts[:, :, : config.n_neurons]
        text_counts = packed.copy()
        if self.orders is not None:  # profiles count in the order of the checkpoint
            for layer, order in enumerate(self.orders):
                text_counts[:, layer, order] = packed[:, layer]
        return ActivationProfile(
            model_hash=self.engine.model_hash,
            n_tokens=sums.n_tokens,
            counts=text_counts.sum(0),
            text_counts=text_counts,
            position_active=sums.position_active,
            position_tokens=sums.position_tokens,
            overlap=sums.overlap,
            overlap_base=sums.overlap_base,
            about=self._about(),
        )

    def _about(self) -> dict[str, Any]:
        try:
            version = metadata.version("hybrid")
        except metadata.PackageNotFoundError:
            version = "unknown"  # a source tree that is not installed
        return {
            "model": self.options.model,
            "quant": self.engine.quant,
            "window": self.options.window,
            "tokenizer_hash": _tokenizer_hash(self.engine.folder),
            "texts": [
                {**text, "tokens": tokens}
                for text, tokens in zip(self.texts, self.text_tokens, strict=True)
            ],
            "hybrid_version": version,
        }

    def _finish_trace(self, trace: TraceWriter, profile: ActivationProfile) -> int:
        engine, config = self.engine, self.engine.config
        format = Format[engine.quant]
        with open_checkpoint(engine.folder, format) as checkpoint:
            about = {
                "model": self.options.model,
                "model_hash": engine.model_hash,
                "order_hash": order_hash(self.orders),
                "quant": engine.quant,
                "input": "normed",
                "activation": config.activation,
                "threshold": config.threshold,
                "texts": profile.about["texts"],
                "costs": measure_gate_costs(
                    format, config.hidden_size, config.n_neurons, config.n_layers
                ),
            }
            trace.finish(_Gates(checkpoint, self.orders), about)
        return sum(path.stat().st_size for path in trace.folder.iterdir())


def _tokenizer_hash(folder: Path) -> str:
    """Return the hash of the file that the tokenizer was read from. Raises HybridError."""
    path = folder / "tokenizer.json"
    try:
        content = read_bytes(path, _MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise HybridError(f"{path}: {error.strerror or error}") from error
    return hashlib.sha256(content).hexdigest()


class _Gates(Sequence[NDArray[np.float16]]):
    """Gate weights in packed order, read layer by layer."""

    def __init__(self, checkpoint: Checkpoint, orders: Sequence[NDArray[np.intp]] | None) -> None:
        self.checkpoint, self.orders = checkpoint, orders

    def __len__(self) -> int:
        return self.checkpoint.config.n_layers

    def __getitem__(self, layer: Any) -> Any:
        gate = self.checkpoint.read("gate", layer)
        return (gate if self.orders is None else gate[self.orders[layer]]).astype(np.float16)
