"""Generate text from the command line.

    python -m hybrid.run -p "Once upon a time"
    python -m hybrid.run -m MiniCPM-S-1B -p "Why is the sky blue?" -n 200
    python -m hybrid.run -m ./my-model -f prompt.txt --temp 0 --raw

Text goes to standard output as it is written; everything else, the closing line with speeds
included, to standard error. Exit code: 0 done, 1 a model or file could not be used, 2 a bad option,
130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import TextIO

import psutil

from hybrid import Engine, Generation, HybridError, InvalidOption, load
from hybrid.catalog import catalog


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    names = "\n".join(f"  {entry.name:26} {entry.description}" for entry in catalog())
    parser = argparse.ArgumentParser(
        prog="hybrid.run",
        description="Generate text with a ReLU-sparse language model.",
        epilog=f"models:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-m", "--model", default="stories", help="a name below, a Hugging Face repo id, or a folder"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", help="the prompt")
    prompt.add_argument("-f", "--file", help="read the prompt from a file; - is standard input")
    add = parser.add_argument
    add("-n", "--max-tokens", type=int, default=256, help="tokens to write at most (256)")
    add("-t", "--threads", type=int, help="threads (the physical cores)")
    add("-c", "--ctx-size", type=int, help="context in tokens (4096, or the model's maximum)")
    add("--temp", type=float, help="temperature; 0 always takes the likeliest token (the model's)")
    add("--top-k", type=int, help="sample from the k likeliest tokens; 0: all (the model's)")
    add("--top-p", type=float, help="sample from the likeliest tokens of this mass (the model's)")
    add(
        "--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest (0)"
    )
    add("--repeat-penalty", type=float, default=1.0, help="make recent tokens less likely (1: off)")
    add("--stop", action="append", default=[], help="end before this text; may be repeated")
    add("--seed", type=int, help="repeat a run: the seed that the closing line names")
    add("--quant", choices=("q8", "q4", "bf16"), default="q8", help="weight format (q8)")
    add("--raw", action="store_true", help="do not apply the model's chat template")
    add("--offline", action="store_true", help="never use the network")
    return parser.parse_args(arguments)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text; a file's one trailing newline is not part of it."""
    if args.file is None:
        return args.prompt or ""
    try:
        if args.file != "-":
            data = Path(args.file).read_bytes()
        elif sys.stdin is None:
            raise InvalidOption("--file -: standard input is closed")
        else:
            data = sys.stdin.buffer.read()
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise InvalidOption(f"--file {args.file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidOption(
            f"--file {args.file}: not UTF-8 text "
            f"(byte {error.start} is 0x{error.object[error.start]:02x})"
        ) from error


def closing_line(engine: Engine, generation: Generation) -> str:
    stats = generation.stats
    parts = [
        f"prompt {stats.prompt_tokens} tokens, {stats.prefill_tps:.1f} tok/s",
        f"generated {stats.generated_tokens} tokens, {stats.decode_tps:.1f} tok/s",
    ]
    if stats.active_fraction is not None:
        parts.append(f"{stats.active_fraction:.1%} of FFN neurons active")
    parts.append(f"memory {psutil.Process().memory_info().rss / 1e6:.0f} MB")
    parts.append(f"{engine.quant}, {engine.n_threads} threads, seed {generation.seed}")
    if generation.finish_reason == "length":
        is_full = stats.prompt_tokens + stats.generated_tokens > engine.n_context
        parts.append("stopped: the context is full" if is_full else "stopped: --max-tokens reached")
    return "[" + " | ".join(parts) + "]"


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args)
    with load(
        args.model,
        threads=args.threads,
        quant=args.quant,
        context_size=args.ctx_size,
        offline=args.offline,
    ) as engine:
        for notice in engine.notices:
            print(f"note: {notice}", file=sys.stderr)
        if not engine.config.is_sparse:
            print(
                "note: this model's activation is SiLU: no neuron is ever zero, so none is skipped",
                file=sys.stderr,
            )
        generation = engine.generate(
            prompt,
            max_tokens=args.max_tokens,
            temperature=args.temp,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repeat_penalty=args.repeat_penalty,
            stop=args.stop,
            seed=args.seed,
            raw=args.raw,
        )
        is_interrupted = False
        if args.raw or not engine.tokenizer.has_chat_template:
            sys.stdout.write(prompt)  # a completion reads as one text
            sys.stdout.flush()
        try:
            for piece in generation:
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            is_interrupted = True
        sys.stdout.write("\n")
        sys.stdout.flush()
        print(closing_line(engine, generation), file=sys.stderr)
        return 130 if is_interrupted else 0


def main(arguments: list[str] | None = None) -> int:
    # A closed stream is None in Python, and print(file=None) would go to the other one.
    sys.stdout = sys.stdout or open_null()
    sys.stderr = sys.stderr or open_null()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character must not end the program.
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return run(parse_arguments(arguments))
    except InvalidOption as error:
        print(f"hybrid.run: {error}", file=sys.stderr)
        return 2
    except HybridError as error:
        print(f"hybrid.run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stdout = open_null()  # the reader has gone (`| head`): Python must not flush at exit
        return 1
    except OSError as error:
        sys.stdout = open_null()
        print(f"hybrid.run: cannot write the text: {error.strerror}", file=sys.stderr)
        return 1
    except MemoryError:
        print("hybrid.run: out of memory; try --quant q8 or a smaller --ctx-size", file=sys.stderr)
        return 1


def open_null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123


if __name__ == "__main__":
    sys.exit(main())
