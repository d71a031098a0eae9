"""What all responses of OpenAI's API begin and end with."""

from __future__ import annotations

from typing import Any

from hybrid import BatchedGeneration, Engine, __version__
from hybrid.server.answers import Answers


def head(kind: str, answers: Answers, engine: Engine) -> dict[str, Any]:
    """Return the fields that a response or each of its chunks begins with."""
    return {
        "id": answers.id,
        "object": kind,
        "created": answers.created,
        "model": engine.name,
        # What decides the bits of an answer besides the request.
        "system_fingerprint": f"build-{__version__}-{engine.quant}-{engine.kv}",
    }


def usage_object(answers: Answers, *, counts_answers: bool = True) -> dict[str, Any]:
    usage = answers.usage()
    n_completion = usage.completion if counts_answers else 0
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": n_completion,
        "total_tokens": usage.prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def activity_of(generation: BatchedGeneration) -> dict[str, Any]:
    """Return the latest share of each layer's neurons that fired, if the client wants it."""
    if not generation.layer_activity:
        return {}
    return {"layer_activity": [round(share, 4) for share in generation.layer_activity[-1]]}
