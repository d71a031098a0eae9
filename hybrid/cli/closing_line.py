"""The closing line, which follows an answer: its speeds, memory and settings."""

from __future__ import annotations

import psutil

from hybrid import Engine, Generation, OutOfMemory

_stream_gbs: dict[Engine, float | None] = {}


def measured_stream_gbs(engine: Engine) -> float | None:
    """Return the memory bandwidth in GB/s, measured once per engine.

    Returns None if there is not enough memory to measure it.
    """
    if engine not in _stream_gbs:
        try:
            _stream_gbs[engine] = engine.measure_stream_gbs()
        except OutOfMemory:
            _stream_gbs[engine] = None
    return _stream_gbs[engine]


def closing_line(engine: Engine, generation: Generation) -> str:
    stats = generation.stats
    prompt = f"prompt {stats.prompt_tokens} tokens"
    if stats.cached_tokens:
        prompt += f" ({stats.cached_tokens} cached)"
    decode = f"generated {stats.generated_tokens} tokens, {stats.decode_tps:.1f} tok/s"
    if stats.decode_steps and engine.device_name == "cpu":
        decode += f", {stats.decode_gbs:.1f} GB/s"
        # A small model's weights stay in the CPU's cache, so memory bandwidth is no limit.
        if not engine.fits_in_cache and (stream := measured_stream_gbs(engine)):
            decode += f" ({stats.decode_gbs / stream:.0%} of bandwidth)"
    parts = [f"{prompt}, {stats.prefill_tps:.1f} tok/s", decode]
    if stats.active_fraction is not None:
        parts.append(f"{stats.active_fraction:.1%} of FFN neurons active")
    if engine.prediction is not None:
        parts.append(f"predicted at recall {engine.prediction.recall:g}")
    if engine.previews_head:
        parts.append("head previewed")
    parts.append(f"memory {psutil.Process().memory_info().rss / 1e6:.0f} MB")
    parts.append(f"{engine.quant}, {engine.n_threads} threads, seed {generation.seed}")
    if generation.finish_reason == "cancelled":
        parts.append("interrupted")
    if generation.finish_reason == "length":
        is_full = generation.context_is_full
        parts.append("stopped: the context is full" if is_full else "stopped: --max-tokens reached")
    return "[" + " | ".join(parts) + "]"
