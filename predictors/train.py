"""Train predictors on a recorded trace.

    python -m profiler.record -m MODEL --trace -o FOLDER
    python -m predictors.train FOLDER/trace -o predictor.safetensors

For every layer and recall the command keeps the cheapest rank and margin that reaches the recall on
held-out tokens. Costs are those that were measured with the trace. A layer stays exact if no
predictor is cheaper. Training needs torch.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from predictors.errors import PredictorError
from predictors.file import Choice, PredictorFile
from predictors.interrupts import INTERRUPTED, raising_interrupts
from predictors.predictors import RANK_STEP, WIDE_RANK, LowRank
from predictors.selection import CostTable, HeldOut, candidates_for, cheapest
from predictors.trace import LayerTrace, Trace, load_trace

RECALLS = (0.95, 0.99, 0.999)
INSTALL = "pip install 'hybrid-inference[train]'"
HELD_OUT = 0.2  # share of the tokens
CLOSE = 1.05  # a second rank is trained if its cost is at most this multiple of the cheapest
MIN_TOKENS = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    recalls: tuple[float, ...] = RECALLS
    ranks: tuple[int, ...] = ()  # (): ranks chosen from the measured costs
    n_trained: int = 2  # most ranks that are trained: the cheapest before training
    epochs: int = 10
    seed: int = 0


def train(trace: Trace, options: Options, progress: Progress = lambda *_: None) -> PredictorFile:
    """Train predictors for all layers.

    Raises PredictorError if the trace has too few tokens, if no rank fits its hidden size, or if
    torch is not installed.
    """
    if not has_torch():
        raise PredictorError(f"training needs torch: {INSTALL}")
    if trace.n_tokens < MIN_TOKENS:
        raise PredictorError(
            f"{trace.folder}: {trace.n_tokens} tokens are too few; record at least {MIN_TOKENS}, "
            "or better some thousands"
        )
    costs = CostTable.of(trace.costs, trace.n_neurons)
    choices: dict[float, list[Choice]] = {recall: [] for recall in options.recalls}
    predictors: dict[tuple[int, str], LowRank] = {}
    ranks = all_ranks = _ranks(options, trace.hidden_size, costs)
    if not ranks:
        raise PredictorError(f"{trace.folder}: no rank fits a hidden size of {trace.hidden_size}")
    for layer in range(trace.n_layers):
        progress("training predictors, layers", layer, trace.n_layers)
        found = _train_layer(trace.layer(layer), trace.threshold, ranks, options, costs)
        for recall in options.recalls:
            choice = cheapest([by_recall[recall] for _, by_recall in found], costs)
            choices[recall].append(choice)
            for predictor, by_recall in found:
                if by_recall[recall] is choice:
                    predictors[layer, choice.name] = predictor
        # Layers are much alike, so the next layer only tries ranks near those of this one.
        used = {choices[recall][-1].rank for recall in options.recalls} - {0}
        ranks = _neighbours(all_ranks, used) if used and not options.ranks else all_ranks
    progress("training predictors, layers", trace.n_layers, trace.n_layers)
    about = {
        key: trace.about[key]
        for key in ("model", "model_hash", "order_hash", "quant", "input", "texts", "costs")
    }
    about |= {
        "n_layers": trace.n_layers,
        "n_neurons": trace.n_neurons,
        "hidden_size": trace.hidden_size,
        "n_tokens": trace.n_tokens,
        "seed": options.seed,
    }
    return PredictorFile(choices, predictors, about)


def _train_layer(
    trace: LayerTrace,
    threshold: float,
    ranks: Sequence[int],
    options: Options,
    costs: CostTable,
) -> list[tuple[LowRank, dict[float, Choice]]]:
    """Return the candidate predictors, each with its choice for every recall."""
    from predictors.lowrank import SvdBasis, TokenSplit, TrainingOptions, train_lowrank

    # Split in blocks, so that neighbouring tokens are mostly on the same side.
    n = len(trace.inputs)
    blocks = np.arange(n) * 50 // n
    is_held_out = np.isin(blocks % round(1 / HELD_OUT), (0,))
    training, held_out_tokens = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    # Interleave, so that both halves of the held-out tokens come from the whole trace.
    held_out_tokens = np.concatenate([held_out_tokens[::2], held_out_tokens[1::2]])
    held_out = HeldOut.of(trace, held_out_tokens)
    found: list[tuple[LowRank, dict[float, Choice]]] = []

    def add(predictor: LowRank) -> dict[float, Choice]:
        found.append((predictor, candidates_for(predictor, held_out, options.recalls, costs)))
        return found[-1][1]

    basis = SvdBasis(trace, training, threshold)
    aim = min(options.recalls, key=lambda recall: abs(recall - 0.99))
    untrained = {}
    for rank in ranks:
        untrained[rank] = add(basis.predictor(rank, trace.inputs[training[:2048]]))[aim].cost_ns
    least = min(untrained.values())
    for rank in sorted(untrained, key=untrained.__getitem__)[: options.n_trained]:
        if untrained[rank] > CLOSE * least and not options.ranks:
            break
        # A trained predictor replaces its untrained start: training never makes it worse.
        found[:] = [pair for pair in found if pair[0].rank != rank]
        add(
            train_lowrank(
                basis,
                rank,
                trace,
                TokenSplit(training, held_out_tokens),
                TrainingOptions(recall=aim, epochs=options.epochs, seed=options.seed),
            )
        )
    return found


def _ranks(options: Options, hidden_size: int, costs: CostTable) -> list[int]:
    """Return the ranks to try: those of the options, or the measured ones and some between."""
    largest = min(hidden_size, hidden_size // 2 + WIDE_RANK)
    if options.ranks:
        return [rank for rank in options.ranks if rank <= largest]
    measured = sorted(costs.lowrank_ns)
    between = [(a + b) // 16 * 8 + 4 for a, b in itertools.pairwise(measured)]
    return sorted({rank for rank in measured + between if 0 < rank <= largest})


def _neighbours(ranks: Sequence[int], used: set[int]) -> list[int]:
    """Return the used ranks and their neighbours on both sides."""
    at = [ranks.index(rank) for rank in used]
    return [rank for i, rank in enumerate(ranks) if any(abs(i - j) <= 1 for j in at)]


def has_torch() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="predictors.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("trace", type=Path, help="folder that profiler.record --trace wrote")
    add("-o", "--out", type=Path, required=True, help="file for the predictor (.safetensors)")
    add(
        "--recall",
        type=float,
        nargs="+",
        default=list(RECALLS),
        help="recalls to reach (default: 0.95 0.99 0.999)",
    )
    add(
        "--rank",
        type=int,
        nargs="+",
        default=[],
        help="ranks to try (default: chosen by measured cost)",
    )
    add("--epochs", type=int, default=10, help="maximum epochs of training (default: 10)")
    add("--seed", type=int, default=0, help="random seed of training (default: 0)")
    args = parser.parse_args(arguments)
    if not all(0.0 < recall < 1.0 for recall in args.recall):
        parser.error("--recall: expected values between 0 and 1")
    if any(rank < RANK_STEP or rank % RANK_STEP for rank in args.rank):
        parser.error(f"--rank: expected multiples of {RANK_STEP}")
    if args.epochs < 0:
        parser.error("--epochs: expected 0 or more")
    return args


def summary(file: PredictorFile) -> str:
    """Return a table with one line per recall."""
    lines = [
        f"{'recall':>7} {'worst layer':>12} {'predicted':>10} {'precision':>10} {'cost':>7}  layers"
    ]
    for recall, choices in file.choices.items():
        kinds = [choice.name for choice in choices]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        cost = sum(c.cost_ns for c in choices) / sum(c.exact_ns for c in choices)
        lines.append(
            f"{recall:7g} {min(c.recall for c in choices):12.4f} "
            f"{np.mean([c.predicted for c in choices]):10.1%} "
            f"{np.mean([c.precision for c in choices]):10.1%} {cost:7.0%}  {counts}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    started = time.monotonic()

    def progress(task: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            seconds = time.monotonic() - started
            left = f", {seconds / done * (total - done):.0f} s left" if done else ""
            end = "\n" if done == total else ""
            print(f"\r{task} {done}/{total}{left}   ", end=end, file=sys.stderr, flush=True)

    options = Options(
        recalls=tuple(sorted(set(args.recall))),
        ranks=tuple(args.rank),
        epochs=args.epochs,
        seed=args.seed,
    )
    try:
        with raising_interrupts():
            file = train(load_trace(args.trace), options, progress)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            file.save(args.out)
    except PredictorError as error:
        print(f"predictors.train: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"predictors.train: {error.filename or args.out}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    print("on held-out tokens; cost of finding the active neurons, relative to all gates:")
    print(summary(file), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
