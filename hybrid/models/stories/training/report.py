"""Measure the figures of the bundled model's card: curves, sparsity, power law, samples.

    python report.py --data TEXTS --plots docs/stories [--work RUN --twin TWIN]

RUN and TWIN are the folders that train.py wrote. The script prints the figures and writes two
plots. It measures the bundled model, and counts active neurons in plain fp32.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from held_out import STORIES, Loss, read_held_out
from numpy.typing import NDArray
from train import TRAIN_FILES, VALID_FILE, letters, read_stories

import hybrid
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.oracle.executor import ReferenceSession, read_weights

N_SAMPLES = 100


def read_curves(work: Path) -> dict[str, NDArray[np.float64]]:
    with (work / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def plot_curves(run: dict[str, NDArray], twin: dict[str, NDArray], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    axes[0].plot(run["tokens"] / 1e6, run["valid_loss"], label="stories")
    axes[0].plot(twin["tokens"] / 1e6, twin["valid_loss"], label="twin without sparsity terms")
    axes[0].set(xlabel="million tokens", ylabel="held-out loss, nats per token", ylim=(1.8, 3.2))
    axes[1].plot(run["tokens"] / 1e6, run["valid_sparsity"], label="stories")
    axes[1].plot(twin["tokens"] / 1e6, twin["valid_sparsity"], label="twin")
    axes[1].set(xlabel="million tokens", ylabel="held-out FFN sparsity", ylim=(0, 1))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def count_activations(data: Path) -> tuple[NDArray, int, float]:
    """Return counts (layers, neurons), the number of tokens, and the mean loss in nats per token.

    Each story is run separately, in fp32.
    """
    with open_checkpoint(STORIES) as checkpoint:
        weights, config = read_weights(checkpoint, None), checkpoint.config
    counts = np.zeros((config.n_layers, config.n_neurons), np.int64)
    n_tokens, loss = 0, Loss()
    for ids in read_held_out(data, config.max_context):
        session = ReferenceSession(weights, config)
        loss.add(session.prefill(ids), ids)
        counts += np.stack([active.sum(0) for active in session.active])
        n_tokens += len(ids)
    return counts, n_tokens, loss.mean


def plot_power_law(counts: NDArray, path: Path) -> NDArray:
    """Plot the curves. Return, per layer, the share of neurons with 80 % of all activations."""
    ordered = -np.sort(-counts, 1)
    carried = ordered.cumsum(1) / ordered.sum(1, keepdims=True)
    shares = (np.argmax(carried >= 0.8, 1) + 1) / counts.shape[1]
    figure, axis = plt.subplots(figsize=(6, 4))
    for layer, curve in enumerate(carried):
        x = np.arange(1, curve.size + 1) / curve.size
        axis.plot(x, curve, label=f"layer {layer}: {shares[layer]:.0%} carry 80 %")
    axis.axhline(0.8, color="grey", linewidth=0.5)
    axis.set(xlabel="share of neurons, most active first", ylabel="share of activations")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    return shares


def distinct(texts: list[list[str]], n: int) -> float:
    """Return the share of distinct word n-grams (distinct-n, https://arxiv.org/abs/1510.03055)."""
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams)


def longest_copy(words: list[str], training: list[list[str]], longest: int = 60) -> tuple[int, str]:
    """Return the length and text of the longest run of words that is also in a training story."""
    low, high, copied = 0, longest, ""
    while low < high:  # bisect: if n words are copied, so are n - 1
        n = (low + high + 1) // 2
        wanted = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
        found = next(
            (
                tuple(story[i : i + n])
                for story in training
                for i in range(len(story) - n + 1)
                if tuple(story[i : i + n]) in wanted
            ),
            None,
        )
        if found is None:
            high = n - 1
        else:
            low, copied = n, " ".join(found)
    return low, copied


def report_curves(run: dict[str, NDArray], twin: dict[str, NDArray], plot: Path) -> None:
    plot_curves(run, twin, plot)
    best, best_twin = run["valid_loss"].min(), twin["valid_loss"].min()
    print(f"best held-out loss: {best:.4f}, perplexity {math.exp(best):.3f}")
    print(f"twin's:             {best_twin:.4f}, perplexity {math.exp(best_twin):.3f}")
    print(f"perplexity over the twin's: {math.exp(best - best_twin) - 1:+.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the training texts")
    parser.add_argument(
        "--work", type=Path, help="folder of the run, to compare it with --twin (default: none)"
    )
    parser.add_argument(
        "--twin", type=Path, help="folder of the twin, to compare it with --work (default: none)"
    )
    parser.add_argument("--plots", type=Path, required=True, help="folder for the plots")
    args = parser.parse_args()
    args.plots.mkdir(parents=True, exist_ok=True)

    if args.work and args.twin:
        report_curves(read_curves(args.work), read_curves(args.twin), args.plots / "curves.png")

    counts, n_tokens, loss = count_activations(args.data)
    sparsity = 1 - counts.sum(1) / (n_tokens * counts.shape[1])
    print(f"bundled model, fp32, story by story: loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    print(f"sparsity {sparsity.mean():.4f}, by layer {np.round(sparsity, 3).tolist()}")
    shares = plot_power_law(counts, args.plots / "power_law.png")
    print(f"share of neurons that carries 80 %: {np.round(shares, 3).tolist()}")
    print(f"neurons that never fired, by layer: {(counts == 0).sum(1).tolist()}")

    texts = []
    with hybrid.load("stories", quant="bf16") as engine:
        for seed in range(N_SAMPLES):
            texts.append("".join(engine.generate("", max_tokens=400, temperature=0.8, seed=seed)))
    words = [text.split() for text in texts]
    print(f"distinct-2 {distinct(words, 2):.3f}, distinct-3 {distinct(words, 3):.3f}")
    held_out = {letters(story) for story in read_stories(args.data / VALID_FILE)}
    training = [
        story.split()
        for name in TRAIN_FILES
        for story in read_stories(args.data / name)
        if letters(story) not in held_out
    ]
    same = [story.split() for story in read_stories(args.data / VALID_FILE)][:N_SAMPLES]
    print(
        f"held-out stories: distinct-2 {distinct(same, 2):.3f}, distinct-3 {distinct(same, 3):.3f}"
    )
    copies = sorted(longest_copy(text, training) for text in words[:20])
    theirs = sorted(longest_copy(text, training) for text in same[:20])
    print(f"longest copied span, words, of 20 samples: median {copies[10][0]}, most {copies[-1]}")
    print(f"the same of 20 held-out stories: median {theirs[10][0]}, most {theirs[-1]}")
    print(json.dumps(texts[:5], indent=1))


if __name__ == "__main__":
    main()
