"""Write a model in a format that other engines read.

    python -m hybrid.export -m MiniCPM-S-1B --to gguf --type q8_0 minicpm-s-1b.gguf
    python -m hybrid.export -m model.gguf --to hf ./folder
    python -m hybrid.export -m MiniCPM-S-1B --to powerinfer --quant q8 minicpm-s-1b.powerinfer.gguf

hf is a folder for transformers, gguf a file for llama.cpp, and powerinfer a file for PowerInfer
with the predictor that hybrid.setup made. A note says what another engine computes in another way.
hybrid runs all that it writes: -m OUT.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid import HybridError
from hybrid.cli.command_line import (
    ArgumentParser,
    add_model_options,
    load_options,
    print_notices,
    printable,
    run_command,
)
from hybrid.cli.progress_bar import progress_bar
from hybrid.exporting import TARGETS, TYPES, Exported, Request, export_model
from hybrid.hub.catalog import resolve
from hybrid.notices import Notices

OTHERS = {
    "hf": "transformers: AutoModelForCausalLM.from_pretrained({out!r})",
    "gguf": "llama.cpp: llama-cli -m {out}",
    "powerinfer": "PowerInfer: main -m {out}",
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hybrid.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="the folder (hf) or the file to write")
    add("--to", choices=TARGETS, required=True, help="whose format to write")
    add(
        "--type",
        choices=TYPES,
        help="type of the weights (default: bf16 in a folder, f16 in a file); a file for "
        "PowerInfer has f16 or q4_0",
    )
    add(
        "--fold",
        action="store_true",
        help="multiply MiniCPM's scales into the weights and write a Llama, which more engines "
        "know (default: only for PowerInfer)",
    )
    add("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    add("--force", action="store_true", help="replace what is there")
    add(
        "--predictor",
        default="auto",
        metavar="{auto,FILE}",
        help="predictor for PowerInfer (default: the one of hybrid.setup for --quant)",
    )
    add("--recall", type=float, default=0.99, help="recall of the predictor (default: 0.99)")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    options, notices = load_options(args), Notices()
    with progress_bar() as progress:
        folder = resolve(args.model, offline=args.offline, progress=progress, notices=notices)
        request = Request(
            folder=folder,
            model=args.model,
            out=args.out,
            target=args.to,
            type=args.type,
            is_folded=args.fold,
            has_tokenizer=not args.no_tokenizer,
            may_replace=args.force,
            options=options,
        )
        try:
            exported = export_model(request, progress)
        except OSError as error:
            raise HybridError(f"{args.out}: cannot be written: {error.strerror}") from error
    notices.add(*exported.notices)
    print_notices(notices)
    print(closing_line(exported, args.to))
    return 0


def closing_line(exported: Exported, target: str) -> str:
    """Say what was written, and what runs it."""
    size = exported.n_bytes
    amount = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    out = str(exported.out)
    runs = f"hybrid run -m {shlex.quote(out)}"
    if exported.is_same_elsewhere:
        runs += f", or {OTHERS[target].format(out=out if target == 'hf' else shlex.quote(out))}"
    return printable(f"{out}: {amount}, {exported.type}; run it with {runs}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("hybrid.export", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
