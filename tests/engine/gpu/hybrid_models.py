"""Packed models and their executors for tests of hybrid plans, with any plan and any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hybrid
from hybrid.checkpoint.hf import open_checkpoint
from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.gpu.executor import HybridExecutor
from hybrid.kernels import Format
from hybrid.placement.plan import LayerPlacement, PlacementPlan
from hybrid.weights.layout import packed_layout
from hybrid.weights.packing import PackedModel, pack_model

N_CONTEXT = 320
# How far the logits of two devices may differ, as a share of the largest logit. The devices add in
# another order, activations are rounded to int8 again and again, and a value that falls on the
# other side of a rounding step shows. Measured on the bundled model over 1,920 tokens for each
# format and three instruction sets: median 0.6 %, 90 % of the tokens below 1.0 %, at most 2.4 %.
BOUND, MEDIAN_BOUND = 4e-2, 1e-2


class PackedFolder:
    """A model that is packed once from its folder, for executors with any plan."""

    def __init__(self, folder: Path, format: Format) -> None:
        with open_checkpoint(folder) as checkpoint:
            self.config, self.format = checkpoint.config, format
            self.layout = packed_layout(checkpoint.config, format)
            self.model: PackedModel = pack_model(checkpoint, self.layout)

    def plan(self, layers: list[LayerPlacement], *, head: bool) -> PlacementPlan:
        return PlacementPlan(
            "", "", self.format.name, N_CONTEXT, self.config.n_neurons, tuple(layers), head
        )

    def plans(self) -> dict[str, PlacementPlan]:
        """Return a plan for every kind of split, by name. Some plans mix kinds of layers."""
        n, n_layers = self.config.n_neurons, self.config.n_layers
        some = n // 3 // 64 * 64
        cpu, whole = LayerPlacement(), LayerPlacement(True, n, n)
        attention = LayerPlacement(True, 0, 0)
        gates, hot = LayerPlacement(True, n, some), LayerPlacement(True, some, some)
        mixed = LayerPlacement(True, 2 * some, some)

        def alternating(*layers: LayerPlacement) -> list[LayerPlacement]:
            return [layers[i % len(layers)] for i in range(n_layers)]

        return {
            "head": self.plan(alternating(cpu), head=True),
            "all": self.plan(alternating(whole), head=True),
            "all but the head": self.plan(alternating(whole), head=False),
            "attention": self.plan(alternating(attention), head=True),
            "all gates": self.plan(alternating(gates), head=True),
            "hot": self.plan(alternating(hot), head=False),
            "everything": self.plan(alternating(cpu, gates, whole, hot, cpu, mixed), head=True),
            "last layer": self.plan([cpu] * (n_layers - 1) + [gates], head=False),
        }

    def cpu(self, plan: PlacementPlan | None = None) -> CpuExecutor:
        return CpuExecutor(self.model, self.layout, n_threads=2, n_context=N_CONTEXT, plan=plan)

    @contextmanager
    def hybrid(self, plan: PlacementPlan, device: Any, **options: Any) -> Iterator[HybridExecutor]:
        yield HybridExecutor(self.cpu(plan), plan, device, **options)


def some_ids(config: Any, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, config.vocab_size, n)


def check_logits(actual: np.ndarray, expected: np.ndarray) -> None:
    """(vocab,) or (tokens, vocab). The likeliest token is the same if its lead is clear."""
    largest = np.abs(expected).max()
    difference = np.abs(actual - expected).max(-1) / largest
    assert difference.max() <= BOUND
    if difference.size >= 20:  # one token alone varies more
        assert np.median(difference) <= MEDIAN_BOUND
    top = np.sort(expected)[..., -2:]
    clear = top[..., 1] - top[..., 0] > 2 * BOUND * largest
    assert (actual.argmax(-1) == expected.argmax(-1))[clear].all()


@dataclass(frozen=True)
class Greedy:
    """The tokens that an engine writes greedily, and its logits on a fixed text."""

    tokens: list[int]
    margins: np.ndarray  # lead of each token's logit over the second largest
    forced: np.ndarray  # (tokens, vocab) logits on the fixed text


def write_greedily(engine: hybrid.Engine, n: int = 12) -> Greedy:
    generation = engine.generate("Once upon", max_tokens=n, temperature=0.0, logprobs=2)
    assert "".join(generation)
    assert generation.logprobs is not None
    margins = [entry.top[0][1] - entry.top[1][1] for entry in generation.logprobs]
    story = engine.tokenizer.encode("Once upon a time there was a cat.")
    with engine.open_session() as session:
        forced = [session.prefill(story[:8], all_logits=True)]
        for token in story[8:]:
            session.decode(token)
            forced.append(session.logits.copy()[None])
    return Greedy(generation.tokens, np.array(margins), np.concatenate(forced))


def check_greedy(actual: Greedy, expected: Greedy, least: int = 2) -> None:
    """Assert that two devices, which sum in different orders, write the same text.

    Their logits must be near each other. Their texts must be equal up to the first token whose
    margin the difference of the logits could close. This must be at least `least` tokens.
    """
    check_logits(actual.forced, expected.forced)
    is_clear = expected.margins > 2 * BOUND * np.abs(expected.forced).max()
    n = len(is_clear) if is_clear.all() else int(is_clear.argmin())
    assert n >= least
    assert actual.tokens[:n] == expected.tokens[:n]
