"""Shares: how many tokens of each waiting prompt a pass takes."""

from __future__ import annotations

from collections.abc import Sequence

LEAST = 4  # tokens of each prompt; kernels compute tokens in tiles of four


def shares(waiting: Sequence[int], room: int) -> list[int]:
    """Distribute a pass's room for tokens over prompts, of which so many tokens are waiting.

    The prompts are sorted by age, oldest first. Each gets `LEAST` tokens, or an equal share of a
    smaller room. What is then left goes to the oldest, as much as it needs, and on to the next.
    """
    least = min(LEAST, room // max(len(waiting), 1))
    sizes = [min(n, least) for n in waiting]
    left = room - sum(sizes)
    for i, n in enumerate(waiting):
        more = min(n - sizes[i], left)
        sizes[i] += more
        left -= more
    return sizes
