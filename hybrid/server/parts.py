"""Parts of an answer: pieces of what it says, and whole tool calls, as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator

from hybrid import BatchedGeneration, ToolCall
from hybrid.server.answers import Answers


async def parts_of(answers: Answers, ping_s: float) -> AsyncIterator[str | ToolCall | None]:
    """Yield the parts of the only answer; None if nothing has happened for some time.

    Raises as `Answers.events` does.
    """
    (generation,) = answers.generations
    parser = generation.tool_parser()
    async for event in answers.events(ping_s):
        if event is None:
            yield None
            continue
        content, calls = (event.piece, []) if parser is None else parser.push(event.piece)
        if event.is_last and parser is not None:
            rest, last = parser.finish()
            content, calls = content + rest, [*calls, *last]
        if content:
            yield content
        for call in calls:
            yield call


def all_parts(generation: BatchedGeneration) -> tuple[str, list[ToolCall]]:
    """Return what a complete answer says, and its calls."""
    parser = generation.tool_parser()
    if parser is None:
        return generation.text, []
    (content, calls), (rest, last) = parser.push(generation.text), parser.finish()
    return content + rest, [*calls, *last]
