"""Texts of a batching loop are those of Engine.generate, whoever else is in it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from predictor_files import write_predictor

import hybrid
from hybrid.engine.batch import choosing
from hybrid.weights import preview

WORDS = ("Tom", "saw the", "big red ball", "and", "Mia ran to", "her little dog", "in the park")
ENGINES: dict[str, dict[str, Any]] = {
    "one thread": {"threads": 1},
    "two threads": {"threads": 2, "quant": "q4"},
    "predictor": {"threads": 2, "predictor": "random"},
    "preview": {"threads": 2, "preview_head": True},
}


@pytest.fixture(scope="module", params=ENGINES.values(), ids=ENGINES)
def engine(request, tmp_path_factory) -> Iterator[hybrid.Engine]:
    options = {"context_size": 256} | request.param
    if "predictor" in options:
        with hybrid.load("stories", threads=1) as exact:
            path, kinds = tmp_path_factory.mktemp("random") / "file", ("lowrank",) * 6
            options["predictor"] = write_predictor(path, exact, kinds=kinds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "LEAST_ROWS", 0)
        engine = hybrid.load("stories", **options)
    assert (engine.prediction is None) == ("predictor" not in request.param)
    assert engine.previews_head == ("preview_head" in request.param)
    with engine:
        yield engine


@pytest.fixture(autouse=True)
def _chooses_on_threads(monkeypatch) -> None:
    monkeypatch.setattr(choosing, "LEAST_LOGITS", 0)  # the bundled vocabulary is small


def requests(n: int) -> list[dict[str, Any]]:
    """Return options of so many requests: short and long prompts, greedy and sampled."""
    draw, found = random.Random(7), []
    for seed in range(n):
        words = draw.choices(WORDS, k=draw.choice((2, 4, 6, 20, 80)))
        options = {
            "prompt": " ".join(words),
            "seed": seed,
            "temperature": draw.choice((0, 0.7, 1.2)),
            "max_tokens": draw.choice((1, 3, 12, 25)),
            "repeat_penalty": draw.choice((1, 1, 1.2)),
            "presence_penalty": draw.choice((0, 0, 0.4)),
        }
        options |= draw.choice(({}, {}, {"stop": ("the", ".")}, {"logprobs": 2}))
        options |= {"prompt_logprobs": seed % 3} if seed % 5 == 2 else {}
        if seed % 11 == 0:  # the context becomes full
            options |= {"prompt": list(range(20, 270)), "max_tokens": 20}
            options |= {"context_shift": True, "n_keep": 4} if seed % 2 else {}
            options["prompt"] = options["prompt"][: 250 if seed % 2 else 245]
        found.append(options)
    return found


def outcome(generation: Any) -> tuple[Any, ...]:
    text = "".join(generation)
    assert text == generation.text
    stats = generation.stats
    names = ("text", "tokens", "logprobs", "prompt_logprobs", "finish_reason", "context_is_full")
    counts = (stats.prompt_tokens, stats.generated_tokens, stats.n_shifts)
    values = (getattr(generation, name) for name in (*names, "seed", "notices"))
    return (*values, *counts)


def test_texts_are_those_of_each_request_alone(engine):
    """Requests come in bursts, some are cancelled, and three threads read."""
    wanted, draw = requests(48), random.Random(3)
    alone = [outcome(engine.generate(**options)) for options in wanted]
    found: dict[int, tuple[Any, ...]] = {}
    cancelled: dict[int, Any] = {}
    n_before = engine.stats.n_generations

    def read(generations: list[tuple[int, Any]]) -> None:
        for i, generation in generations:
            found[i] = outcome(generation)

    with hybrid.BatchLoop(engine, n_sequences=5) as loop:
        readers = []
        order = draw.sample(range(len(wanted)), len(wanted))
        while order:
            burst = [order.pop() for _ in range(min(len(order), draw.randint(1, 9)))]
            begun = [(i, loop.submit(**wanted[i])) for i in burst]
            if draw.random() < 0.6:
                i, generation = begun.pop()
                for _ in range(draw.randint(0, 2)):
                    next(generation, "")
                generation.cancel()
                cancelled[i] = generation
            readers.append(threading.Thread(target=read, args=(begun,)))
            readers[-1].start()
            if draw.random() < 0.5:
                readers.pop().join()
        for reader in readers:
            reader.join()
    assert len(found) + len(cancelled) == len(wanted)
    assert len(found) > 36
    for i, values in found.items():
        assert values == alone[i], i
    for i, generation in cancelled.items():
        list(generation)
        assert alone[i][0].startswith(generation.text)
        assert generation.finish_reason in ("cancelled", alone[i][3])
    assert cancelled
    assert engine.stats.n_generations - n_before == len(wanted)
