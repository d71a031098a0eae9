"""Measure the quality of a predictor on a trace that it was not trained on.

    python -m predictors.evaluate PREDICTOR TRACE --recall 0.99

The command prints, layer by layer, the recall (by count and by |activation|), the precision, and
the share of neurons that the predictor names. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from predictors.errors import PredictorError
from predictors.file import PredictorFile, load_predictor_file
from predictors.interrupts import INTERRUPTED, raising_interrupts
from predictors.predictors import Quality, measure_quality
from predictors.selection import HeldOut
from predictors.trace import Trace, load_trace


def evaluate(file: PredictorFile, trace: Trace, recall: float) -> list[Quality]:
    """Return each layer's quality on all tokens of a trace.

    Raises PredictorError if the two are of different models or neuron orders.
    """
    for key, what in (("model_hash", "model"), ("order_hash", "neuron order")):
        if file.about[key] != trace.about[key]:
            raise PredictorError(
                f"the predictor and {trace.folder} have a different {what}: "
                f"{file.about[key]:.12} and {trace.about[key]:.12}"
            )
    qualities = []
    for layer, (choice, predictor) in enumerate(file.select(recall)):
        held_out = HeldOut.of(trace.layer(layer), np.arange(trace.n_tokens))
        if predictor is None:
            qualities.append(Quality(1.0, 1.0, float(held_out.active.mean()), 1.0))
            continue
        qualities.append(
            measure_quality(
                predictor.scores(held_out.inputs),
                held_out.active,
                held_out.magnitude,
                choice.margin,
            )
        )
    return qualities


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="predictors.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("predictor", type=Path, help="file that predictors.train wrote")
    add("trace", type=Path, help="folder that profiler.record --trace wrote")
    add(
        "--recall",
        type=float,
        default=0.99,
        help="a recall that the file was made for (default: 0.99)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        with raising_interrupts():
            file = load_predictor_file(args.predictor)
            qualities = evaluate(file, load_trace(args.trace), args.recall)
    except PredictorError as error:
        print(f"predictors.evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    print(f"layer  {'kind':12} {'recall':>8} {'weighted':>9} {'precision':>10} {'predicted':>10}")
    for layer, ((choice, _), q) in enumerate(zip(file.select(args.recall), qualities, strict=True)):
        print(
            f"{layer:5}  {choice.name:12} {q.recall:8.4f} {q.weighted_recall:9.4f} "
            f"{q.precision:10.1%} {q.predicted:10.1%}"
        )
    means = {
        key: float(np.mean([asdict(q)[key] for q in qualities])) for key in asdict(qualities[0])
    }
    worst = min(q.recall for q in qualities)
    print(
        f"mean   {'':12} {means['recall']:8.4f} {means['weighted_recall']:9.4f} "
        f"{means['precision']:10.1%} {means['predicted']:10.1%}   worst layer's recall {worst:.4f}"
    )
    rounded = {key: round(value, 6) for key, value in means.items()}
    print(json.dumps({"recall_goal": args.recall, "worst_recall": round(worst, 6), **rounded}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
