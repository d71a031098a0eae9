"""Generate text from the command line.

    python -m hybrid.run -p "Once upon a time"
    python -m hybrid.run -m MiniCPM-S-1B -p "Why is the sky blue?" -n 200
    python -m hybrid.run -m MiniCPM-S-1B --chat
    python -m hybrid.run -m ./my-model -f prompt.txt --temp 0 --raw --json

The text goes to standard output while it is generated. Everything else, such as the closing line
with speeds, goes to standard error. Exit codes: 0 success, 1 a model or file could not be used,
2 a bad option, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybrid import (
    ChatMessage,
    Engine,
    Generation,
    InvalidOption,
    Progress,
    active_isa,
)
from hybrid.cli.closing_line import ClosingLine
from hybrid.cli.command_line import (
    MODEL_HELP,
    ArgumentParser,
    add_activation_option,
    add_bos_option,
    add_context_option,
    add_device_options,
    add_kv_option,
    add_predictor_options,
    add_quant_option,
    add_template_option,
    decode_with_notes,
    open_engine,
    print_notices,
    printable,
    run_command,
)
from hybrid.cli.conversation import Conversation, Display, interrupts
from hybrid.cli.generation_options import (
    add_generation_options,
    generation_options,
    read_json_file,
)
from hybrid.cli.kept_session import KeptSession
from hybrid.files import read_bytes
from hybrid.hub.catalog import catalog

MAX_PROMPT_BYTES = 4 << 20


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    names = "\n".join(f"  {entry.name:26} {entry.description}" for entry in catalog())
    names += f"\n  {'synthetic:MiniCPM-S-1B':26} random weights in that shape, to measure speed"
    parser = ArgumentParser(
        prog="hybrid.run",
        description="Generate text with a ReLU-sparse language model.",
        epilog=f"models:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "-m",
        "--model",
        default="stories",
        help=MODEL_HELP,
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", help="the prompt (default: none)")
    prompt.add_argument(
        "-f", "--file", help="read the prompt from this file; - is standard input (default: none)"
    )
    add(
        "-i",
        "--interactive",
        action="store_true",
        help="read a line of input after each answer and continue with it",
    )
    add(
        "--chat",
        action="store_true",
        help="chat with the model; the same as -i unless there is a prompt (needs a template)",
    )
    add("--system", help="system message at the start of a chat (default: none)")
    add(
        "--tools",
        metavar="FILE",
        help="JSON file with a list of functions, as JSON schemas, that the model may call; the "
        "text shows its calls as it writes them (default: none)",
    )
    add_template_option(parser)
    add(
        "-t",
        "--threads",
        type=int,
        help="number of threads (default: one per core that it may use)",
    )
    add_context_option(parser)
    add_generation_options(parser)
    add_quant_option(parser)
    add_kv_option(parser)
    add_predictor_options(parser)
    add_device_options(parser)
    add_activation_option(parser)
    add_bos_option(parser)
    add(
        "--session",
        type=Path,
        metavar="FILE",
        help="begin with the tokens, keys and values in this file, if it exists, and save them "
        "there at the end, so that a prompt's known beginning is not computed again "
        "(default: none)",
    )
    add("--raw", action="store_true", help="do not apply the model's chat template")
    add("--no-stream", action="store_true", help="print the text only when it is complete")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    add("--mlock", action="store_true", help="lock the weights in memory")
    add(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        help="map the weights from disk (default: only if they do not fit in memory)",
    )
    add("--offline", action="store_true", help="never use the network")
    add(
        "-v",
        "--verbose",
        action="store_true",
        help="print what is loaded, how it runs, and its share of the memory's bandwidth",
    )
    args = parser.parse_args(arguments)
    args.interactive |= args.chat and args.prompt is None and args.file is None
    pairs = (
        ("raw", "chat"),
        ("raw", "system"),
        ("raw", "tools"),
        ("json", "interactive"),
        ("logprobs", "interactive"),
    )
    for pair in pairs:
        given = [value is not None and value is not False for value in map(vars(args).get, pair)]
        if all(given):
            parser.error(f"--{pair[0]} and --{pair[1]} exclude each other")
    return args


def read_tools(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Return the functions of --tools. Raises InvalidOption."""
    if args.tools is None:
        return None
    tools = read_json_file("--tools", Path(args.tools))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidOption(
            f"--tools {args.tools}: expected a list of JSON objects, one a function"
        )
    return tools


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt's text, without the one trailing newline of a file.

    Notes on a file's text go to standard error. Raises InvalidOption.
    """
    if args.file is None:
        return args.prompt or ""
    try:
        if args.file != "-":
            data = read_bytes(Path(args.file), MAX_PROMPT_BYTES)
        elif sys.stdin is None:
            raise InvalidOption("--file -: standard input is closed")
        else:
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise InvalidOption(
                f"--file {args.file}: expected at most {MAX_PROMPT_BYTES:,} bytes, found more; no "
                "model has such a long context"
            )
    except OSError as error:
        is_pipe = Path(args.file).is_fifo()
        advice = "; --file - reads a pipe from standard input" if is_pipe else ""
        raise InvalidOption(f"--file {args.file}: {error.strerror}{advice}") from error
    data = data.removesuffix(b"\n").removesuffix(b"\r")
    return decode_with_notes(f"--file {args.file}", data)


def notes(engine: Engine, args: argparse.Namespace) -> list[str]:
    lines = list(engine.notices)
    config = engine.config
    if not config.is_sparse:
        lines.append("this model's activation is SiLU: no neuron is ever zero, so none is skipped")
    elif engine.neuron_orders is None:
        lines.append(
            f"run python -m hybrid.setup -m {args.model} --quant {engine.quant} once: it packs the "
            "hot neurons together and trains a predictor for --predictor auto, so that a token "
            "reads fewer bytes"
        )
    if engine.device_name != "cpu":
        lines.append(f"{engine.plan.summary()}, {engine.device_name}")
    if args.verbose:
        stats = engine.stats
        where = "mapped from disk" if stats.is_mapped else "in memory"
        where = "being copied into memory" if stats.is_copying else where
        owner = "the model's" if engine.defaults.gives_sampling else "hybrid's own"
        lines += [
            f"{engine.name} in {engine.folder}: {config.family}, {config.n_layers} layers of "
            f"{config.n_neurons} neurons, hidden size {config.hidden_size}, {config.activation} "
            f"{config.threshold:g}, vocabulary {config.vocab_size}",
            f"{stats.weight_bytes / 1e6:.0f} MB of {engine.quant} weights {where}, loaded in "
            f"{stats.load_s:.2f} s; context {engine.n_context} of {config.max_context} tokens",
            f"{active_isa()}, {engine.n_threads} threads",
            f"{owner} sampling defaults: {engine.default_sampling}",
        ]
    return lines


def begin(
    kept: KeptSession,
    prompt: str,
    args: argparse.Namespace,
    tools: list[dict[str, Any]] | None = None,
) -> Generation:
    engine, session, options = kept.engine, kept.session, generation_options(args)
    if args.system is None and tools is None:
        return engine.generate(prompt, session=session, raw=args.raw, options=options)
    messages: list[ChatMessage] = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return engine.chat(messages, tools=tools, session=session, options=options)


def answer(
    kept: KeptSession,
    prompt: str,
    args: argparse.Namespace,
    tools: list[dict[str, Any]] | None,
    progress: Progress,
) -> int:
    """Run one generation and return the exit code."""
    engine, generation = kept.engine, begin(kept, prompt, args, tools)
    generation.progress = progress
    is_completion = args.raw or not engine.tokenizer.has_chat_template
    if is_completion and not args.json:
        write(prompt)  # prompt and completion are one text
    with interrupts(generation):
        for piece in generation:
            if not (args.json or args.no_stream):
                write(piece)
    if args.json:
        print(json.dumps(as_json(engine, generation, args), ensure_ascii=False))
    else:
        write((generation.text if args.no_stream else "") + "\n")
        for entry in generation.logprobs or ():
            likeliest = "  ".join(
                f"{engine.tokenizer.decode_token(token)!r} {logprob:.3f}"
                for token, logprob in entry.top
            )
            print(f"{entry.logprob:9.4f} {entry.text!r:16} {likeliest}".rstrip(), file=sys.stderr)
        print_notices(generation.notices)
        describe = ClosingLine(measures_bandwidth=args.verbose)
        print(describe(engine, generation), file=sys.stderr)
    kept.tell(generation)
    return 130 if generation.finish_reason == "cancelled" else 0


def as_json(engine: Engine, generation: Generation, args: argparse.Namespace) -> dict[str, Any]:
    stats = generation.stats
    summary: dict[str, Any] = {
        "model": args.model,
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "context_is_full": generation.context_is_full,
        "tokens": generation.tokens,
        "seed": generation.seed,
        "quant": engine.quant,
        "kv": engine.kv,
        "threads": engine.n_threads,
        "device": engine.device_name,
        "vram_bytes": engine.vram_bytes,
        "synthetic": engine.is_synthetic,
        "stats": {
            **asdict(stats),
            "prefill_tps": stats.prefill_tps,
            "decode_tps": stats.decode_tps,
            "decode_gbs": stats.decode_gbs,
        },
    }
    if generation.logprobs is not None:
        summary["logprobs"] = [asdict(entry) for entry in generation.logprobs]
    return summary


def checked_session(args: argparse.Namespace) -> Path | None:
    """Return the file of --session. Raises InvalidOption if its folder does not exist."""
    file: Path | None = args.session
    if file is not None and not os.path.isdir(file.parent):  # noqa: PTH112 - never raises
        raise InvalidOption(f"--session {file}: there is no folder {file.parent}")
    return file


def run(args: argparse.Namespace) -> int:
    prompt, file = read_prompt(args), checked_session(args)
    generation_options(args)  # report a wrong value before a model is downloaded
    tools = read_tools(args)
    with open_engine(args) as (engine, progress):
        for line in notes(engine, args):
            print(f"note: {printable(line)}", file=sys.stderr)
        if not engine.tokenizer.has_chat_template:
            for option in ("chat", "system", "tools"):
                if getattr(args, option) not in (None, False):
                    raise InvalidOption(
                        f"--{option}: {args.model} has no chat template, so it can only complete "
                        "text: use -p, or -i to continue it together, or choose a --chat-template"
                    )
        with KeptSession(engine, file) as kept:
            if not args.interactive:
                return answer(kept, prompt, args, tools, progress)
            conversation = Conversation(
                kept,
                generation_options(args),
                system=args.system,
                tools=tools,
                is_chat=engine.tokenizer.has_chat_template and not args.raw,
                display=Display(
                    ClosingLine(measures_bandwidth=args.verbose),
                    not args.no_stream,
                    args.verbose,
                    progress,
                ),
            )
            conversation.run(first=prompt)
            return 0


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    return run_command("hybrid.run", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
