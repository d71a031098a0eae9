"""Computes the figures of an activation profile."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.placement.profile import ActivationProfile

Array = NDArray[np.float64]

CARRIED = 0.8  # share of the activations for "x % of the neurons carry 80 % of the activations"
HOT = 0.2  # share of the neurons that count as hot


@dataclass(frozen=True, slots=True)
class ProfileSummary:
    """Shares. Each array has one entry per layer, unless its comment says otherwise.

    The three optional arrays are None if there is only one text.
    """

    sparsity: Array  # inactive neurons
    carrying: Array  # fewest neurons that have CARRIED of the activations
    never: Array  # neurons that never fired
    overlap: Array  # a token's active neurons that were active for the token before
    overlap_by_chance: Array  # the same for independent tokens
    stability: Array | None  # hot neurons that two texts have in common, median of pairs
    hot_carries: Array | None  # a text's activations carried by another text's hot neurons
    own_hot_carries: Array | None  # a text's activations carried by its own hot neurons
    sparsity_by_position: Array  # (buckets,) over all layers; NaN if there was no token


def summarise(profile: ActivationProfile) -> ProfileSummary:
    frequency = profile.frequency
    with np.errstate(invalid="ignore", divide="ignore"):
        overlap = profile.overlap / profile.overlap_base
        by_chance = (frequency**2).sum(1) / frequency.sum(1)
        active = profile.position_active.sum(0) / profile.position_tokens
    stability, carries, own = _compare_texts(profile.text_counts)
    return ProfileSummary(
        sparsity=profile.sparsity,
        carrying=np.array([carrying_share(counts) for counts in profile.counts]),
        never=(profile.counts == 0).mean(1),
        overlap=overlap,
        overlap_by_chance=by_chance,
        stability=stability,
        hot_carries=carries,
        own_hot_carries=own,
        sparsity_by_position=1.0 - active / profile.counts.size,
    )


def carried(counts: NDArray[np.int64]) -> Array:
    """Return the share of the activations that the 1, 2, … most frequent neurons have together."""
    total = counts.sum()
    return np.cumsum(np.sort(counts)[::-1]) / (total if total else 1)


def carrying_share(counts: NDArray[np.int64], of: float = CARRIED) -> float:
    """Return the least share of the neurons that together have a share `of` of the activations."""
    if not counts.any():
        return float("nan")
    return float(np.searchsorted(carried(counts), of - 1e-12) + 1) / counts.size


def hot_sets(text_counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (n_texts, n_layers, n_neurons): the share HOT of most frequent neurons of each."""
    n_hot = max(1, round(HOT * text_counts.shape[2]))
    order = np.argsort(-text_counts, axis=2, kind="stable")[:, :, :n_hot]
    hot = np.zeros(text_counts.shape, np.bool_)
    np.put_along_axis(hot, order, True, axis=2)
    return hot


def common_share(text_counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (n_texts, n_texts): the share of hot neurons in common, averaged over the layers."""
    hot = hot_sets(text_counts).astype(np.float64)
    return np.einsum("aln,bln->ab", hot, hot) / hot[0].sum()


def _compare_texts(
    text_counts: NDArray[np.int64],
) -> tuple[Array | None, Array | None, Array | None]:
    spoken = text_counts[text_counts.any((1, 2))]
    if len(spoken) < 2:
        return None, None, None
    hot = hot_sets(spoken)
    pairs = list(itertools.combinations(range(len(spoken)), 2))
    common = [(hot[a] & hot[b]).sum(1) / hot[a].sum(1) for a, b in pairs]
    totals = np.maximum(spoken.sum(2), 1)

    def carries(of: int, by: int) -> Array:
        return np.where(hot[by], spoken[of], 0).sum(1) / totals[of]

    other = [carries(a, b) for a, b in itertools.permutations(range(len(spoken)), 2)]
    own = [carries(a, a) for a in range(len(spoken))]
    return np.median(common, 0), np.median(other, 0), np.median(own, 0)
