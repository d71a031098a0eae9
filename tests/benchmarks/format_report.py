"""Measure what each weight format costs the bundled model, on stories that it has not seen.

    python tests/benchmarks/format_report.py --data TEXTS [--stories N] [--json]

Each format is compared with plain fp32, story by story and teacher-forced. The report gives the
perplexity of the native engine, and how many masks flip: as a share of (neuron, token) pairs and by
weight. Masks come from the oracles. A format's oracle rounds weights, activations and KV cache as
the kernels do. The weight of a pair is |act(gate) * up|: fp32's value if the format lost the
neuron, the format's value if it gained the neuron. Both are divided by the sum over all active
pairs in fp32. It takes minutes; on busy cores OPENBLAS_NUM_THREADS=1 makes it faster.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hybrid
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.kernels import Activation, Format, reference
from hybrid.model.weights import LayerWeights

# The training folder knows which stories the bundled model has not seen.
sys.path.insert(0, str(Path(__file__).parents[2] / "hybrid" / "models" / "stories" / "training"))
from held_out import STORIES, Loss, read_held_out

Array = NDArray[np.float32]


class WeighingSession(ReferenceSession):
    """Records the weight of each active neuron besides the masks."""

    def prefill(self, tokens: NDArray) -> Array:
        self.weights_of_active: list[Array] = []  # per layer (tokens, n_neurons)
        return super().prefill(tokens)

    def ffn(self, x: Array, weights: LayerWeights[Array], layer: int, scale: float) -> Array:
        config = self.config
        h = self._round(reference.rms_norm(x, weights.ffn_norm, config.rms_norm_eps))
        activation = Activation[config.activation]
        values, active = reference.neuron_values(
            weights.gate, weights.up, h, activation, config.threshold
        )
        self.active.append(active)
        self.weights_of_active.append(np.abs(values))
        return x + np.float32(scale) * (values @ weights.down)


@dataclass(slots=True)
class Tally:
    """Sums of one format over all stories."""

    loss: Loss = field(default_factory=Loss)
    n_lost: int = 0
    n_gained: int = 0
    lost_weight: float = 0.0
    gained_weight: float = 0.0

    def add(self, exact: WeighingSession, session: WeighingSession) -> None:
        layers = zip(
            exact.active,
            session.active,
            exact.weights_of_active,
            session.weights_of_active,
            strict=True,
        )
        for mask, own_mask, weights, own_weights in layers:
            lost, gained = mask & ~own_mask, own_mask & ~mask
            self.n_lost += int(lost.sum())
            self.n_gained += int(gained.sum())
            self.lost_weight += float(weights[lost].sum(dtype=np.float64))
            self.gained_weight += float(own_weights[gained].sum(dtype=np.float64))


def measure(stories: list[NDArray]) -> dict[str, dict[str, float]]:
    """Return the figures of fp32 and of each format."""
    tallies = {format: Tally() for format in Format}
    exact_loss, n_active, weight = Loss(), 0, 0.0
    with open_checkpoint(STORIES) as checkpoint:
        config = checkpoint.config
        exact_weights = read_weights(checkpoint, None)
        rounded = {format: read_weights(checkpoint, format) for format in Format}
    engines = {format: hybrid.load("stories", quant=format.name) for format in Format}
    for ids in stories:
        exact = WeighingSession(exact_weights, config)
        exact_loss.add(exact.prefill(ids), ids)
        n_active += sum(int(mask.sum()) for mask in exact.active)
        weight += sum(float(w.sum(dtype=np.float64)) for w in exact.weights_of_active)
        for format, tally in tallies.items():
            session = WeighingSession(rounded[format], config, format)
            session.prefill(ids)
            tally.add(exact, session)
            logits = engines[format].open_session().prefill(ids, all_logits=True)
            assert logits is not None
            tally.loss.add(logits, ids)
    n_pairs = sum(map(len, stories)) * config.n_layers * config.n_neurons
    figures = {"fp32": {"perplexity": math.exp(exact_loss.mean), "active": n_active / n_pairs}}
    for format, tally in tallies.items():
        engines[format].close()
        figures[format.name] = {
            "perplexity": math.exp(tally.loss.mean),
            "perplexity_change": math.exp(tally.loss.mean - exact_loss.mean) - 1,
            "flips": (tally.n_lost + tally.n_gained) / n_pairs,
            "lost": tally.n_lost / n_pairs,
            "gained": tally.n_gained / n_pairs,
            "flips_by_weight": (tally.lost_weight + tally.gained_weight) / weight,
            "lost_by_weight": tally.lost_weight / weight,
            "gained_by_weight": tally.gained_weight / weight,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--stories", type=int, help="measure the first N only (default: all)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    args = parser.parse_args()
    if args.stories is not None and args.stories < 1:
        parser.error("--stories: expected 1 or more")
    with open_checkpoint(STORIES) as checkpoint:
        stories = read_held_out(args.data, checkpoint.config.max_context)[: args.stories]
    figures = measure(stories)
    n_tokens = sum(map(len, stories))
    if args.json:
        print(json.dumps({"stories": len(stories), "tokens": n_tokens, "formats": figures}))
        return
    exact = figures.pop("fp32")
    print(f"{len(stories)} held-out stories, {n_tokens} tokens; in fp32: perplexity ", end="")
    print(f"{exact['perplexity']:.3f}, {exact['active']:.2%} of neurons active")
    print("       perplexity         masks flipped (lost + gained)      by |activation|")
    for name, row in figures.items():
        print(
            f"{name:5} {row['perplexity']:7.3f} {row['perplexity_change']:+8.3%}   "
            f"{row['flips']:.3%} ({row['lost']:.3%} + {row['gained']:.3%})       "
            f"{row['flips_by_weight']:.3%} ({row['lost_by_weight']:.3%} + "
            f"{row['gained_by_weight']:.3%})"
        )


if __name__ == "__main__":
    main()
