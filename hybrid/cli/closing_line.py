"""The closing line, which follows an answer: its speeds, memory and settings."""

from __future__ import annotations

from contextlib import suppress

import psutil

from hybrid import BatchedGeneration, Engine, Generation, OutOfMemory


class ClosingLine:
    """Describes the generations of one engine.

    `measures_bandwidth` adds the share of the memory's bandwidth. The first line then takes half a
    second and 1 GiB of memory. The share is left out if there is less memory.
    """

    def __init__(self, *, measures_bandwidth: bool = False) -> None:
        self._measures_bandwidth = measures_bandwidth
        self._stream_gbs: float | None = None

    def __call__(self, engine: Engine, generation: Generation | BatchedGeneration) -> str:
        # A small model's weights stay in the CPU's cache, so memory bandwidth is no limit.
        if self._measures_bandwidth and not (engine.uses_gpu or engine.fits_in_cache):
            self._measures_bandwidth = False  # once is enough
            with suppress(OutOfMemory):
                self._stream_gbs = engine.measure_stream_gbs()
        return closing_line(engine, generation, self._stream_gbs)


def closing_line(
    engine: Engine, generation: Generation | BatchedGeneration, stream_gbs: float | None = None
) -> str:
    """Return the line. `stream_gbs` is the memory's bandwidth in GB/s; None leaves it out."""
    stats = generation.stats
    prompt = f"prompt {stats.prompt_tokens} tokens"
    if stats.cached_tokens:
        prompt += f" ({stats.cached_tokens} cached)"
    decode = f"generated {stats.generated_tokens} tokens, {stats.decode_tps:.1f} tok/s"
    if stats.decode_steps and stats.decode_gbs is not None and engine.device_name == "cpu":
        decode += f", {stats.decode_gbs:.1f} GB/s"
        if stream_gbs is not None:
            decode += f" ({stats.decode_gbs / stream_gbs:.0%} of bandwidth)"
    parts = [f"{prompt}, {stats.prefill_tps:.1f} tok/s", decode]
    if stats.drafted_tokens:
        a_pass = 1 + stats.accepted_tokens / stats.decode_steps
        accepted = stats.accepted_tokens / stats.drafted_tokens
        parts.append(f"speculated: {a_pass:.1f} tokens a pass, {accepted:.0%} accepted")
    if stats.active_fraction is not None:
        parts.append(f"{stats.active_fraction:.1%} of FFN neurons active")
    if engine.prediction is not None:
        parts.append(f"predicted, {engine.prediction.summary}")
    if engine.previews_head:
        parts.append("head previewed")
    parts.append(f"memory {psutil.Process().memory_info().rss / 1e6:.0f} MB")
    parts.append(f"{engine.quant}, {engine.n_threads} threads, seed {generation.seed}")
    if generation.finish_reason == "cancelled":
        parts.append("interrupted")
    if generation.finish_reason == "length":
        limit = "the model's own limit" if generation.limit_is_models else "--max-tokens"
        is_full = generation.context_is_full
        parts.append("stopped: the context is full" if is_full else f"stopped: {limit} reached")
    return "[" + " | ".join(parts) + "]"
