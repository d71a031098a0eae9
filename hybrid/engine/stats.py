"""Counts and times: of one generation, and of an engine since it was loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(slots=True)
class GenerationStats:
    """Counts and times of one generation.

    Times exclude what the consumer of the text does between pieces. In a batching loop they include
    what passes compute for other answers, and so do `decode_bytes` and `active_fraction`.
    """

    prompt_tokens: int
    cached_tokens: int = 0  # prompt tokens that the session's KV cache already held
    prefilled_tokens: int = 0  # prompt tokens that were computed, and tokens left by context shifts
    generated_tokens: int = 0  # without the end-of-sequence token
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0  # forward passes; the first token comes from prefill
    decode_bytes: int = 0  # of weights and KV cache that passes without a draft read
    drafted_tokens: int = 0  # guesses that passes computed along with their one token
    accepted_tokens: int = 0  # guesses that came true
    forced_tokens: int = 0  # that a grammar left no choice for; several share a forward pass
    n_shifts: int = 0  # how often a full context lost the oldest half
    active_fraction: float | None = None  # of FFN neurons, in decode; before decode, in prefill

    @property
    def prefill_tps(self) -> float:
        """Prefilled tokens per second."""
        return self.prefilled_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens(self) -> int:
        """Tokens of the text that decode gave: one of each pass, accepted and forced ones."""
        return self.decode_steps + self.accepted_tokens + self.forced_tokens

    @property
    def decode_tps(self) -> float:
        """Tokens of the text per second of decode."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def decode_gbs(self) -> float | None:
        """GB (1e9 bytes) of weights and KV cache read per second of decode.

        None after a draft or forced tokens, because the bytes of such passes are not counted.
        """
        if self.drafted_tokens or self.forced_tokens:
            return None
        return self.decode_bytes / self.decode_s / 1e9 if self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class PassCounts:
    """What the passes of a batching loop have computed and read since it was opened.

    With a plan that uses the GPU, `n_active` and `n_bytes` are not counted.
    """

    n_passes: int = 0
    n_tokens: int = 0  # of prompts and answers
    seconds: float = 0.0
    n_active: int = 0  # (neuron, token) pairs that fired
    n_bytes: int = 0  # of weights and KV cache


@dataclass(frozen=True, slots=True)
class LoopStats:
    """What a batching loop is doing."""

    n_sequences: int  # that can run at once
    queue_size: int
    n_waiting: int
    cache_bytes: int  # keys and values in the prefix cache
    passes: PassCounts


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

    def with_generation(self, ended: GenerationStats) -> EngineStats:
        """Return the counts with those of a generation that has ended."""
        return replace(
            self,
            n_generations=self.n_generations + 1,
            prompt_tokens=self.prompt_tokens + ended.prompt_tokens,
            cached_tokens=self.cached_tokens + ended.cached_tokens,
            generated_tokens=self.generated_tokens + ended.generated_tokens,
            prefill_s=self.prefill_s + ended.prefill_s,
            decode_s=self.decode_s + ended.decode_s,
        )
