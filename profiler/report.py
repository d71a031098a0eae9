"""Show a recording: which neurons are hot, how sparse the layers are, and how stable that is.

    python -m profiler.report FOLDER [--plots FOLDER]

The command prints a table with one line per layer, and draws four plots (PNG; needs matplotlib).
The columns of the table are shares:

sparsity   inactive neurons
carrying   most frequent neurons that have 80 % of all activations together
never      neurons that fired for no token
overlap    a token's active neurons that were active for the token before; in brackets by chance
stable     hot 20 % of neurons that two texts have in common; chance is 20 %
hot        a text's activations that another text's hot 20 % have; in brackets its own hot 20 %
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrid import InvalidArtifact
from hybrid.cli.command_line import ArgumentParser, printable, run_command
from hybrid.placement.profile import FILE_NAME, ActivationProfile, load_profile
from profiler.summary import ProfileSummary, summarise


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="profiler.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "profile",
        type=Path,
        metavar="FOLDER",
        help="folder that profiler.record wrote, or a profile's file",
    )
    add(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help="folder for the plots (default: that of the profile)",
    )
    add("--no-plots", action="store_true", help="print the table only")
    add("--json", action="store_true", help="also print one JSON object as the last line")
    return parser.parse_args(arguments)


def head(profile: ActivationProfile) -> str:
    about = profile.about
    lines = [
        f"model   {about.get('model', 'unknown')}, {about.get('quant', 'unknown')}; "
        f"{profile.n_tokens} tokens in windows of {about.get('window', 'unknown')}"
    ]
    lines += [
        f"text    {text.get('name', 'unknown')}: {text.get('tokens', 0)} tokens"
        for text in about.get("texts", [])
    ]
    return "\n".join(printable(line) for line in lines)


def table(summary: ProfileSummary) -> str:
    columns = {
        "sparsity": [summary.sparsity],
        "carrying": [summary.carrying],
        "never": [summary.never],
        "overlap (chance)": [summary.overlap, summary.overlap_by_chance],
    }
    if summary.stability is not None:
        assert summary.hot_carries is not None
        assert summary.own_hot_carries is not None
        columns["stable"] = [summary.stability]
        columns["hot (own)"] = [summary.hot_carries, summary.own_hot_carries]

    def row(name: str, pick: object) -> str:
        cells = []
        for title, values in columns.items():
            shown = [f"{pick(value):.1%}" for value in values]  # type: ignore[operator]
            cell = shown[0] if len(shown) == 1 else f"{shown[0]} ({shown[1]})"
            cells.append(f"{cell:>{max(len(title), 15 if len(shown) > 1 else 8)}}")
        return f"{name:7}" + "  ".join(cells)

    titles = "  ".join(
        f"{title:>{max(len(title), 15 if len(values) > 1 else 8)}}"
        for title, values in columns.items()
    )
    lines = [f"{'layer':7}{titles}"]
    for layer in range(len(summary.sparsity)):
        lines.append(row(f"{layer:5}", lambda value, layer=layer: value[layer]))
    lines.append(row("mean", np.nanmean))
    if summary.stability is None:
        lines.append("the stability of the hot neurons needs two texts")
    return "\n".join(lines)


def positions(summary: ProfileSummary) -> str:
    parts = []
    for bucket, value in enumerate(summary.sparsity_by_position):
        if np.isfinite(value):
            first, last = 2**bucket - 1, 2 ** (bucket + 1) - 2
            parts.append(f"{first}-{last} {value:.1%}" if last > first else f"{first} {value:.1%}")
    return "sparsity by position in the window: " + ", ".join(parts)


def as_json(profile: ActivationProfile, summary: ProfileSummary) -> str:
    values = {
        name: None if (array := getattr(summary, name)) is None else np.round(array, 5).tolist()
        for name in summary.__slots__
    }
    text = json.dumps({"n_tokens": profile.n_tokens, **values})
    return text.replace("NaN", "null")  # JSON has no NaN


def run(args: argparse.Namespace) -> int:
    path = args.profile / FILE_NAME if args.profile.is_dir() else args.profile
    if args.profile.is_dir() and not path.exists():
        raise InvalidArtifact(f"{args.profile}: has no {FILE_NAME}; profiler.record writes it")
    profile = load_profile(path)
    summary = summarise(profile)
    print(f"{head(profile)}\n\n{table(summary)}\n{positions(summary)}")
    if not args.no_plots:
        draw(profile, summary, args.plots or path.parent)
    if args.json:
        print(as_json(profile, summary))
    sys.stdout.flush()
    return 0


def draw(profile: ActivationProfile, summary: ProfileSummary, folder: Path) -> None:
    try:
        from profiler import plots
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in plots.draw_all(profile, summary, folder):
        print(f"plot    {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("profiler.report", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
