"""Plots of an activation profile, as PNG files. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hybrid.placement.profile import ActivationProfile
from profiler.summary import CARRIED, HOT, ProfileSummary, carried, common_share

_SIZE = (7.0, 4.5)  # inches
_LONGEST_NAME = 24


def draw_all(profile: ActivationProfile, summary: ProfileSummary, folder: Path) -> Iterator[Path]:
    """Draw every plot, and yield each file when it is written. Raises OSError."""
    what = f"{profile.about.get('model', 'unknown model')}, {profile.n_tokens:,} tokens"
    plots = {
        "hot_cold": _hot_cold(profile, what),
        "sparsity": _sparsity(summary, what),
        "overlap": _overlap(summary, what),
    }
    if summary.stability is not None:
        plots["stability"] = _stability(profile, what)
    for name, figure in plots.items():
        path = folder / f"{name}.png"
        FigureCanvasAgg(figure)  # needs neither a display nor pyplot's global state
        figure.savefig(path)
        yield path


def _figure(n_axes: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(_SIZE[0] * (1 if n_axes == 1 else 1.6), _SIZE[1]), dpi=120)
    figure.set_layout_engine("constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, n_axes)))


def _hot_cold(profile: ActivationProfile, what: str) -> Figure:
    figure, (axes,) = _figure()
    n_layers, n_neurons = profile.counts.shape
    colours = matplotlib.colormaps["viridis"]
    share = np.arange(1, n_neurons + 1) / n_neurons * 100
    for layer, counts in enumerate(profile.counts):
        colour = colours(layer / max(n_layers - 1, 1))
        axes.plot(share, carried(counts) * 100, color=colour, linewidth=1)
    axes.axhline(CARRIED * 100, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel("neurons, by falling frequency (%)")
    axes.set_ylabel("activations that they carry (%)")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 101)
    axes.set_title(f"Hot and cold neurons: {what}")
    mappable = ScalarMappable(Normalize(0, max(n_layers - 1, 1)), colours)
    figure.colorbar(mappable, ax=axes, label="layer")
    return figure


def _sparsity(summary: ProfileSummary, what: str) -> Figure:
    figure, (by_layer, by_position) = _figure(2)
    by_layer.bar(np.arange(len(summary.sparsity)), summary.sparsity * 100, color="tab:blue")
    by_layer.set_xlabel("layer")
    by_layer.set_ylabel("inactive neurons (%)")
    by_layer.set_ylim(min(80.0, float(summary.sparsity.min()) * 100 - 2), 100)
    by_layer.set_title(f"Sparsity: {what}")
    known = np.isfinite(summary.sparsity_by_position)
    buckets = np.flatnonzero(known)
    by_position.plot(buckets, summary.sparsity_by_position[known] * 100, marker="o")
    by_position.set_xticks(buckets, [str(2**bucket - 1) for bucket in buckets])
    by_position.set_xlabel("position in the window, from")
    by_position.set_ylabel("inactive neurons (%)")
    by_position.set_title("By position, all layers")
    return figure


def _overlap(summary: ProfileSummary, what: str) -> Figure:
    figure, (axes,) = _figure()
    layers = np.arange(len(summary.overlap))
    axes.plot(layers, summary.overlap * 100, marker="o", label="measured")
    axes.plot(layers, summary.overlap_by_chance * 100, marker=".", label="independent tokens")
    axes.set_xlabel("layer")
    axes.set_ylabel("active neurons that were active\nfor the token before (%)")
    axes.set_ylim(0, 100)
    axes.legend()
    axes.set_title(f"Overlap from token to token: {what}")
    return figure


def _stability(profile: ActivationProfile, what: str) -> Figure:
    figure, (axes,) = _figure()
    names = [
        text.get("name", "unknown")[:_LONGEST_NAME] for text in profile.about.get("texts", [])
    ] or [str(i) for i in range(len(profile.text_counts))]
    common = common_share(profile.text_counts) * 100
    image = axes.imshow(common, vmin=HOT * 100, vmax=100, cmap="viridis")
    ticks = np.arange(len(names))
    axes.set_xticks(ticks, names, rotation=30, ha="right")
    axes.set_yticks(ticks, names)
    for (row, column), value in np.ndenumerate(common):
        colour = "black" if value > 70 else "white"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label=f"hot neurons in common (%; {HOT:.0%} is chance)")
    axes.set_title(f"Are the hot {HOT:.0%} the same?\n{what}")
    return figure
