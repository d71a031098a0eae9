"""Measure the share of inactive FFN neurons on a text, layer by layer.

    python -m profiler.sparsity -m stories --text stories.txt

The text runs through the native engine in windows of the context size. Each window begins with an
empty KV cache.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid import Engine
from hybrid.cli.command_line import (
    ArgumentParser,
    add_bos_option,
    add_kv_option,
    add_model_options,
    load_options,
    open_engine,
    print_notices,
    read_text,
    run_command,
)


@dataclass(frozen=True, slots=True)
class SparsityReport:
    n_tokens: int
    sparsity: NDArray[np.float64]  # (n_layers,) share of inactive neurons


def measure_sparsity(
    engine: Engine, ids: list[int], *, window: int | None = None
) -> SparsityReport:
    """Run `ids` through the model in windows of at most `window` tokens (default: the context).

    Raises ValueError if `ids` is empty.
    """
    if not ids:
        raise ValueError("no tokens to measure on")
    window = min(window or engine.n_context, engine.n_context)
    counts = np.zeros(engine.config.n_layers, np.int64)
    for first in range(0, len(ids), window):
        session = engine.open_session()
        session.prefill(np.asarray(ids[first : first + window], np.int64))
        counts += session.active_counts
    return SparsityReport(len(ids), 1.0 - counts / (len(ids) * engine.config.n_neurons))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="profiler.sparsity", description=__doc__.split("\n")[0])
    add_model_options(parser)
    add_bos_option(parser)
    add_kv_option(parser)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file to measure on")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    load_options(args)  # report a wrong value before a model is downloaded
    text = read_text(args.text)
    with open_engine(args) as (engine, _):
        print_notices(engine.notices)
        report = measure_sparsity(engine, engine.tokenizer.encode(text))
        engine.wait_for_weights()  # a figure of damaged weights is not shown
    for layer, sparsity in enumerate(report.sparsity):
        print(f"layer {layer:3}  {sparsity:.4f}")
    print(f"mean       {report.sparsity.mean():.4f}   over {report.n_tokens} tokens", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run_command("profiler.sparsity", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
