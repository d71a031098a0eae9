"""Parts of an answer: pieces of what it says, and whole tool calls, as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator

from hybrid import BatchedGeneration, ToolCall
from hybrid.server.answers import Answers, Event
from hybrid.text.tool_calls import ToolCallParser


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
        content, calls = read_piece(parser, event)
        if content:
            yield content
        for call in calls:
            yield call


def all_parts(generation: BatchedGeneration) -> tuple[str, list[ToolCall]]:
    """Return what a complete answer says, and its calls."""
    parser = generation.tool_parser()
    return (generation.text, []) if parser is None else parser.finish(generation.text)


def read_piece(parser: ToolCallParser | None, event: Event) -> tuple[str, list[ToolCall]]:
    """Return the content and the calls that an event makes certain; None reads no calls."""
    if parser is None:
        return event.piece, []
    return parser.finish(event.piece) if event.is_last else parser.push(event.piece)
