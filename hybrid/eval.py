"""How well does a model predict a text? Its perplexity, through the native engine.

    python -m hybrid.eval perplexity -m stories --text stories.txt

The text is read in windows; each begins `--stride` tokens after the one before, and what a window
repeats is context that is not counted again. Every token but the first of all is predicted once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid import Engine, InvalidOption, check_options
from hybrid.command_line import ArgumentParser, open_engine, read_text, run_command
from hybrid.progress import Progress, ignore_progress

CHUNK = 256  # tokens whose logits are held at once


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What predicting a text costs."""

    nats: float  # all tokens together
    n_tokens: int  # predicted
    n_bytes: int  # of the text, in UTF-8
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """e to the mean loss per token; depends on the tokenizer."""
        return math.exp(min(self.nats / self.n_tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Loss per byte of text: to compare models with different tokenizers."""
        return self.nats / math.log(2) / self.n_bytes


def measure_perplexity(
    engine: Engine,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Progress = ignore_progress,
) -> Perplexity:
    """Windows have at most `window` tokens (the context) and begin `stride` tokens apart (half a
    window). The text begins with the model's beginning-of-text token, where it has one.

    Raises InvalidOption for sizes that do not fit and a text of fewer than two tokens.
    """
    window = engine.n_context if window is None else window
    if not 2 <= window <= engine.n_context:
        raise InvalidOption(f"window: expected 2 to the context's {engine.n_context}, not {window}")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride < window:
        raise InvalidOption(f"stride: expected 1 to {window - 1}, below the window, not {stride}")
    ids = np.asarray(engine.tokenizer.encode(text), np.int64)
    if ids.size < 2:
        raise InvalidOption("the text has no token that could be predicted from another")
    nats = 0.0
    with engine.open_session() as session:
        for first, scored, last in windows(ids.size, window, stride):
            progress("evaluating tokens", scored, ids.size)
            session.reset()
            if scored - 1 > first:
                session.prefill(ids[first : scored - 1])
            for start in range(scored - 1, last - 1, CHUNK):
                end = min(start + CHUNK, last - 1)
                logits = session.prefill(ids[start:end], all_logits=True)
                assert logits is not None
                nats += float(token_losses(logits, ids[start + 1 : end + 1]).sum())
    progress("evaluating tokens", ids.size, ids.size)
    return Perplexity(nats, ids.size - 1, len(text.encode()), window, stride)


def windows(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first token, first that is predicted, end) of each window; predicted ones follow on."""
    scored = 1
    for first in range(0, n_tokens, stride):
        last = min(first + window, n_tokens)
        if last > scored:
            yield first, scored, last
            scored = last


def token_losses(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] in nats, row by row, in double precision."""
    largest = logits.max(1)
    sums = np.exp(logits - largest[:, None]).sum(1, dtype=np.float64)
    return np.log(sums) + largest - logits[np.arange(len(targets)), targets]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hybrid.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    perplexity = commands.add_parser("perplexity", help="of a model on a text", allow_abbrev=False)
    add = perplexity.add_argument
    add("-m", "--model", default="stories", help="as for hybrid.run (stories)")
    add("--text", type=Path, required=True, help="a UTF-8 text file")
    add("--window", type=int, help="tokens that are seen at once, at most (the context)")
    add("--stride", type=int, help="tokens from one window to the next (half a window)")
    add("--quant", choices=("q8", "q4", "bf16"), default="q8", help="weight format (q8)")
    add("-t", "--threads", type=int, help="threads (the physical cores)")
    add("--offline", action="store_true", help="never use the network")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    check_options(threads=args.threads)
    text = read_text(args.text)
    with open_engine(args) as (engine, progress):
        result = measure_perplexity(
            engine, text, window=args.window, stride=args.stride, progress=progress
        )
    if args.json:
        summary = {
            "model": args.model,
            "quant": args.quant,
            "synthetic": engine.is_synthetic,
            "perplexity": round(result.perplexity, 6),
            "bits_per_byte": round(result.bits_per_byte, 6),
            "n_tokens": result.n_tokens,
            "n_bytes": result.n_bytes,
            "window": result.window,
            "stride": result.stride,
        }
        print(json.dumps(summary), flush=True)
        return 0
    print(f"perplexity {result.perplexity:.4f}, {result.bits_per_byte:.4f} bits per byte")
    print(
        f"{result.n_tokens} tokens predicted, windows of {result.window} every {result.stride}; "
        f"{args.model}, {args.quant}",
        flush=True,
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("hybrid.eval", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
