"""Answers: what is generated for one request, one answer or several."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hybrid import BatchedGeneration, BatchLoop, HybridError
from hybrid.server.api_error import unavailable


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an answer."""

    index: int  # of the answer
    piece: str  # of its text; "" when it ends
    is_last: bool


def submit_answers(
    loop: BatchLoop, firsts: Iterable[BatchedGeneration], seeds: Sequence[int | None]
) -> list[BatchedGeneration]:
    """Submit further answers to prompts, to each one for every seed but the first. All, or none.

    `firsts` may submit while it is iterated.
    """
    generations: list[BatchedGeneration] = []
    try:
        for first in firsts:
            generations.append(first)
            for seed in seeds[1:]:
                generations.append(loop.submit_again(first, seed=seed))
    except HybridError:
        for generation in generations:
            generation.cancel()
        raise
    return generations


class Usage(NamedTuple):
    """Numbers of tokens."""

    prompt: int
    cached: int  # of the prompt, whose keys and values were there already
    completion: int


class Answers:
    """The answers to one request, while they are generated. Close it if they are not needed."""

    def __init__(self, prefix: str, generations: Sequence[BatchedGeneration], n: int = 1) -> None:
        """`prefix` begins the id that clients see. Each prompt has `n` answers, one by one."""
        self.id, self.created = f"{prefix}{uuid.uuid4().hex}", int(time.time())
        self.generations, self._n = generations, n

    async def events(self, ping_s: float | None = None) -> AsyncIterator[Event | None]:
        """Yield what happens, and None whenever nothing has happened for `ping_s` seconds.

        Raises what ended an answer, and ApiError with status 503 if the server is shutting down.
        All answers end with this iterator.
        """
        waiting = {self._next(i): i for i in range(len(self.generations))}
        try:
            while waiting:
                done, _ = await asyncio.wait(
                    waiting, timeout=ping_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    yield None
                for task in sorted(done, key=waiting.__getitem__):
                    index, piece = waiting.pop(task), task.result()
                    if piece is not None:
                        waiting[self._next(index)] = index
                    elif self.generations[index].finish_reason == "cancelled":
                        raise unavailable("the server is shutting down", "shutting_down")
                    yield Event(index, piece or "", piece is None)
        finally:
            for task in waiting:
                task.cancel()
            self.close()

    async def wait(self) -> None:
        """Wait until all answers are complete. Raises as `events` does."""
        async for _ in self.events():
            pass

    def close(self) -> None:
        """End the answers that are not complete."""
        for generation in self.generations:
            generation.cancel()

    def usage(self) -> Usage:
        """Return the numbers of tokens. Several answers to one prompt count it once."""
        prompts = [generation.stats for generation in self.generations[:: self._n]]
        return Usage(
            sum(stats.prompt_tokens for stats in prompts),
            sum(stats.cached_tokens for stats in prompts),
            sum(generation.stats.generated_tokens for generation in self.generations),
        )

    def timings(self) -> dict[str, Any]:
        """Return how long the answers took, under the names of llama.cpp's server."""
        stats = [generation.stats for generation in self.generations]
        n_prompt = sum(entry.prefilled_tokens for entry in stats)
        n_decoded = sum(entry.decode_tokens for entry in stats)
        prompt_s = sum(entry.prefill_s for entry in stats)
        decode_s = sum(entry.decode_s for entry in stats)
        return {
            "cache_n": sum(entry.cached_tokens for entry in stats),
            "prompt_n": n_prompt,
            "prompt_ms": 1e3 * prompt_s,
            "prompt_per_second": n_prompt / prompt_s if prompt_s else 0.0,
            "predicted_n": sum(entry.generated_tokens for entry in stats),
            "predicted_ms": 1e3 * decode_s,
            "predicted_per_second": n_decoded / decode_s if decode_s else 0.0,
        }

    def _next(self, index: int) -> asyncio.Task[str | None]:
        return asyncio.ensure_future(_next_piece(self.generations[index]))


async def _next_piece(generation: BatchedGeneration) -> str | None:
    return await anext(generation, None)
