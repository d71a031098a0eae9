"""Measure a model's perplexity on a text, or its accuracy on multiple-choice questions.

    python -m hybrid.eval perplexity -m stories --text stories.txt
    python -m hybrid.eval choices -m MiniCPM-S-1B --file hellaswag_val.jsonl

perplexity reads the text in windows. Each window begins --stride tokens after the one before.
Tokens that a window repeats are only context and are not counted again, so every token of the text
except the first is predicted once.

The text is read byte for byte. Its line ends stay as they are; only a byte-order mark is left out.

choices reads multiple-choice questions in the forms in which HellaSwag, PIQA and ARC are published
or as {"context": …, "choices": […], "answer": INDEX}. It makes the same texts of them as
lm-evaluation-harness 0.4.13, and scores them as it does: a choice follows its context after one
space, and acc_norm divides by the choice's length in characters. python -m hybrid.lm_eval runs that
harness itself.

--quant fp32 uses the NumPy oracle, to compare with other implementations. It is slow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hybrid import Engine, LoadOptions, Progress
from hybrid.cli.command_line import (
    QUANTS,
    ArgumentParser,
    add_bos_option,
    add_device_options,
    add_kv_option,
    add_model_options,
    add_predictor_options,
    open_engine,
    printable,
    read_text,
    run_command,
)
from hybrid.cli.progress_bar import progress_bar
from hybrid.evaluation import (
    Fp32Engine,
    measure_choices,
    measure_perplexity,
    read_questions,
)
from hybrid.hub.catalog import resolve
from hybrid.notices import Notices


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hybrid.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "measure a model's perplexity on a text"
    perplexity = commands.add_parser(
        "perplexity", help=about, description=f"{about.capitalize()}.", allow_abbrev=False
    )
    about = "measure a model's accuracy on multiple-choice questions"
    choices = commands.add_parser(
        "choices", help=about, description=f"{about.capitalize()}.", allow_abbrev=False
    )
    for command in (perplexity, choices):
        add_model_options(command, quants=(*QUANTS, "fp32"))
        add_kv_option(command)
        add_predictor_options(command)
        add_device_options(command)
        add_bos_option(command)
        command.add_argument(
            "--json", action="store_true", help="print one JSON object and nothing else"
        )
    add = perplexity.add_argument
    add("--text", type=Path, required=True, help="UTF-8 text file to measure on")
    add("--window", type=int, help="maximum tokens in a window (default: the context size)")
    add(
        "--stride",
        type=int,
        help="tokens from the start of one window to the next (default: half a window)",
    )
    add = choices.add_argument
    add("--file", type=Path, required=True, help="file of questions, one JSON object per line")
    forms = ("auto", "hellaswag", "piqa", "arc", "plain")
    add(
        "--form",
        choices=forms,
        default="auto",
        help="form of the questions; auto tells it from the fields (default: auto)",
    )
    add(
        "--labels",
        type=Path,
        help="separate file of answers, one per line, as PIQA has it (default: none)",
    )
    add("--limit", type=int, help="use only this many questions from the start (default: all)")
    args = parser.parse_args(arguments)
    if args.quant == "fp32" and args.predictor != "exact":
        parser.error("--quant fp32 computes every gate: it takes no --predictor")
    if args.quant == "fp32" and args.preview_head:
        parser.error("--quant fp32 computes every logit: it takes no --preview-head")
    if args.quant == "fp32" and (args.vram_budget or args.plan or args.device == "cuda"):
        parser.error("--quant fp32 runs on the CPU: it takes no --device cuda and no plan")
    if args.quant == "fp32" and args.kv != "fp16":
        parser.error("--quant fp32 keeps keys and values in fp32: it takes no --kv")
    if args.command == "choices" and args.limit is not None and args.limit < 1:
        parser.error("--limit: expected 1 or more")
    return args


@contextlib.contextmanager
def open_any(args: argparse.Namespace) -> Iterator[tuple[Engine | Fp32Engine, Progress]]:
    """Open the native engine, or the oracle for --quant fp32."""
    if args.quant != "fp32":
        with open_engine(args) as (engine, progress):
            show_notices(engine.notices)
            yield engine, progress
            engine.wait_for_weights()  # a figure of damaged weights is not shown
        return
    LoadOptions(threads=args.threads)  # report a wrong value before a model is downloaded
    notices = Notices()
    with progress_bar() as progress:
        folder = resolve(args.model, offline=args.offline, progress=progress, notices=notices)
        reference = Fp32Engine(folder, add_bos=args.bos, activation=args.activation)
        show_notices((*notices, *reference.notices))
        yield reference, progress


def show_notices(notices: Iterable[str]) -> None:
    for notice in notices:
        print(f"note: {printable(notice)}", file=sys.stderr)


def what(args: argparse.Namespace, engine: Engine | Fp32Engine) -> dict[str, Any]:
    prediction = engine.prediction if isinstance(engine, Engine) else None
    return {
        "model": args.model,
        "quant": engine.quant if isinstance(engine, Engine) else args.quant,
        "kv": "fp32" if args.quant == "fp32" else args.kv,
        "synthetic": engine.is_synthetic,
        "predictor": None if prediction is None else str(prediction.path),
        "recall": None if prediction is None else prediction.recall,
        "previews_head": isinstance(engine, Engine) and engine.previews_head,
    }


def perplexity(args: argparse.Namespace) -> None:
    text = read_text(args.text)
    with open_any(args) as (engine, progress):
        result = measure_perplexity(
            engine, text, window=args.window, stride=args.stride, progress=progress
        )
        about = what(args, engine)
    if args.json:
        summary = {
            **about,
            "perplexity": round(result.perplexity, 6),
            "bits_per_byte": round(result.bits_per_byte, 6),
            "n_tokens": result.n_tokens,
            "n_bytes": result.n_bytes,
            "window": result.window,
            "stride": result.stride,
        }
        print(json.dumps(summary))
        return
    print(f"perplexity {result.perplexity:.4f}, {result.bits_per_byte:.4f} bits per byte")
    print(
        f"{result.n_tokens} tokens predicted, windows of {result.window} every {result.stride}; "
        + label(about)
    )


def choices(args: argparse.Namespace) -> None:
    questions = read_questions(args.file, args.form, labels=args.labels, limit=args.limit)
    with open_any(args) as (engine, progress):
        result = measure_choices(engine, questions, progress=progress)
        about = what(args, engine)
    if args.json:
        summary = {
            **about,
            "n_questions": result.n_questions,
            "acc": round(result.plain, 6),
            "acc_stderr": round(result.plain_error, 6),
            "acc_norm": round(result.normalised, 6),
            "acc_norm_stderr": round(result.normalised_error, 6),
            "chance": round(result.chance, 6),
        }
        print(json.dumps(summary))
        return
    print(
        f"accuracy {result.plain:.1%} ± {result.plain_error:.1%}, "
        f"length-normalised {result.normalised:.1%} ± {result.normalised_error:.1%}; "
        f"chance {result.chance:.1%}"
    )
    print(f"{result.n_questions} questions; {label(about)}")


def label(about: dict[str, Any]) -> str:
    predictor = "" if about["predictor"] is None else ", the predictor of the model's file"
    if about["recall"] is not None:
        predictor = f", predictor at recall {about['recall']:g}"
    head = ", head previewed" if about["previews_head"] else ""
    return f"{about['model']}, {about['quant']}, KV cache {about['kv']}{predictor}{head}"


def run(args: argparse.Namespace) -> int:
    try:
        {"perplexity": perplexity, "choices": choices}[args.command](args)
    finally:
        sys.stdout.flush()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("hybrid.eval", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
