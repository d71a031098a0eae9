"""Say what a model is, from the headers of its files: shapes, types, activation, what will run.

    hybrid inspect model.gguf
    hybrid inspect MiniCPM-S-1B --json
    hybrid inspect ./my-model --verify

Nothing is downloaded, and nothing is computed. --verify reads all bytes: it prints a hash of each
tensor and looks for values that are NaN or infinite. Exit codes: 0 the model can be read (also if
hybrid does not run it), 1 it cannot be read or has values that are not finite, 2 a bad option, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from hybrid.cli.command_line import ArgumentParser, printable, run_command
from hybrid.cli.progress_bar import progress_bar
from hybrid.hub.catalog import hybrid_home
from hybrid.inspecting import Report, inspect_model

WIDTH = 100
_LABEL = 13  # columns of the names of facts


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hybrid.inspect",
        description="Say what a model is, and whether and how it runs on this machine.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a file, a folder, or a name as of `hybrid run -m`")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--verify", action="store_true", help="read all bytes: hash and check each tensor")
    return parser.parse_args(arguments)


def size(n_bytes: float) -> str:
    """Return bytes for a reader: 3.02 GB, 14.1 MB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield names and texts; an empty name continues the fact before."""
    yield "model", report.model
    yield "kind", report.kind
    if report.path is not None:
        yield "path", report.path
    if report.files:
        n = len(report.files)
        yield "size", size(report.n_bytes) + (f" in {n} files" if n > 1 else "")
    if report.architecture is not None:
        yield "architecture", report.architecture
    if report.shapes:
        yield "shapes", ", ".join(_shape(name, value) for name, value in report.shapes.items())
    if report.parameters:
        yield "parameters", f"{report.parameters:,}"
    yield from _weights(report)
    yield from _sparsity(report)
    yield from _texts(report)
    yield from _memory(report)


def _shape(name: str, value: float) -> str:
    if isinstance(value, bool):
        return f"{name.replace('_', ' ')} {'yes' if value else 'no'}"
    number = f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return f"{name.replace('_', ' ')} {number}"


def _weights(report: Report) -> Iterator[tuple[str, str]]:
    name = "weights"
    for row in report.types:
        tensors = "tensor" if row.tensors == 1 else "tensors"
        yield (
            name,
            f"{row.type:8} {row.tensors:5} {tensors:7}  {row.weights:15,} weights  "
            f"{size(row.bytes):>9}  {row.bits:5.2f} bits a weight",
        )
        name = ""


def _sparsity(report: Report) -> Iterator[tuple[str, str]]:
    if (activation := report.activation) is not None:
        threshold = "" if activation.threshold is None else f" {activation.threshold:g}"
        yield "activation", f"{activation.name or 'not known'}{threshold} ({activation.source})"
    for source, value in report.sparsity.items():
        is_share = source in ("published", "measured")
        yield "sparsity", f"{source} {value:.1%}" if is_share else f"{source} {value:g}"
    for predictor in report.predictors:
        ranks = sorted(set(predictor.ranks))
        spread = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        yield "predictors", f"{predictor.source}: rank {spread}, {len(predictor.ranks)} layers"


def _texts(report: Report) -> Iterator[tuple[str, str]]:
    if (tokenizer := report.tokenizer) is None:
        return
    begin = f"; begins with {', '.join(tokenizer.begins_with)}" if tokenizer.begins_with else ""
    end = f"; ends with {', '.join(tokenizer.ends)}" if tokenizer.ends else ""
    yield (
        "tokenizer",
        f"{tokenizer.kind}, {tokenizer.size:,} ids, {tokenizer.added:,} added{begin}{end}",
    )
    own = f"; the model brings {', '.join(tokenizer.templates)}" if tokenizer.templates else ""
    yield "chat", f"{tokenizer.template or 'no template: texts are continued'}{own}"


def _memory(report: Report) -> Iterator[tuple[str, str]]:
    if report.packed_bytes:
        packed = (f"{name} {size(n)}" for name, n in report.packed_bytes.items())
        yield "packed", ", ".join(packed)
    if report.kv_bytes_per_1000_tokens is not None:
        yield "KV cache", f"{size(report.kv_bytes_per_1000_tokens)} for 1,000 tokens"
    if (running := report.running) is not None:
        fits = "" if running.needed_bytes <= running.free_bytes else ": mapped from disk, slowly"
        yield (
            "runs",
            f"in {running.quant} with a context of {running.context:,} tokens: "
            f"{size(running.needed_bytes)} of memory, {size(running.free_bytes)} is free{fits}",
        )
        yield "", running.command
    if report.refused is not None:
        yield "does not run", report.refused
    for notice in report.notices:
        yield "note", notice


def show(report: Report) -> None:
    _print(facts(report))
    if report.content is None:
        return
    print()
    longest = max((len(content.name) for content in report.content), default=0)
    for content in report.content:
        digest = "not read" if content.sha256 is None else content.sha256[:16]
        wrong = f"  {content.not_finite:,} NaN or infinite" if content.not_finite else ""
        print(printable(f"{content.name:{longest}}  {digest}{wrong}"))
    broken = not_finite(report)
    print(
        f"\n{len(report.content):,} tensors read; "
        + (f"{len(broken)} have values that are NaN or infinite" if broken else "all are finite")
    )


def _print(named: Iterable[tuple[str, str]]) -> None:
    for name, text in named:
        first = f"{name:{_LABEL}}"
        if not name:  # a row of a table, or a command: it stays on one line
            print(f"{first}{printable(text)}")
            continue
        print(
            textwrap.fill(
                printable(text),
                WIDTH,
                initial_indent=first,
                subsequent_indent=" " * _LABEL,
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=name != "weights",
            )
        )


def not_finite(report: Report) -> Sequence[str]:
    """Return the tensors that hold values which are NaN or infinite."""
    return [content.name for content in report.content or () if content.not_finite]


def run(args: argparse.Namespace) -> int:
    with progress_bar() as progress:
        report = inspect_model(
            args.model, home=hybrid_home(), reads_all=args.verify, progress=progress
        )
    if args.json:
        print(json.dumps(report.as_json(), ensure_ascii=False, allow_nan=False))
    else:
        show(report)
    return 1 if not_finite(report) else 0


def main(arguments: list[str] | None = None) -> int:
    return run_command("hybrid.inspect", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
