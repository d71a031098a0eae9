"""What all commands share: common options, one-line errors, and the set-up of the streams."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hybrid import Engine, HybridError, InvalidOption, Progress, __version__, load
from hybrid.cli.progress_bar import progress_bar


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but a wrong option prints one line instead of the whole usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        version = f"hybrid {__version__}"
        self.add_argument("--version", action="version", version=version, help="print the version")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (--help shows all options)\n")


def printable(text: str) -> str:
    """Return `text` as one line without control characters.

    Names in it may come from files, which must not be able to control the terminal.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def add_model_options(
    parser: argparse.ArgumentParser, quants: Sequence[str] = ("q8", "q4", "bf16")
) -> None:
    """Add the options of every command that opens a model; `open_engine` reads them."""
    add = parser.add_argument
    add(
        "-m",
        "--model",
        default="stories",
        help="a model's name, a Hugging Face repo id, or a folder (default: stories)",
    )
    add("-t", "--threads", type=int, help="number of threads (default: the physical cores)")
    add("--quant", choices=quants, default="q8", help="weight format (default: q8)")
    add("--offline", action="store_true", help="never use the network")


def add_predictor_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that can use a predictor; `open_engine` reads them."""
    add = parser.add_argument
    add(
        "--predictor",
        default="exact",
        metavar="{exact,auto,FILE}",
        help="compute every gate (exact) or those that a predictor names; a predictor leaves "
        "estimated logits for unlikely tokens of a large vocabulary (default: exact)",
    )
    add(
        "--recall",
        type=float,
        default=0.99,
        help="share of the active neurons that the predictor must find (default: 0.99)",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that can use a GPU; `open_engine` reads them."""
    add = parser.add_argument
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto uses a GPU if there is a VRAM budget or a plan (default: auto)",
    )
    add(
        "--vram-budget",
        type=byte_size,
        metavar="SIZE",
        help="VRAM that the process may use, such as 1GiB; the rest of the model stays on the CPU "
        "(default: the plan's; all that is free with --device cuda)",
    )
    add(
        "--plan",
        type=Path,
        metavar="FILE",
        help="plan that hybrid.plan saved (default: the one of hybrid.setup, if there is one)",
    )


_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """Return the number of bytes, such as 2147483648 for "2GiB". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] >= 2**63:
        raise ValueError(f"expected an amount such as 512MiB or 2GiB, found {text!r}")
    return int(float(match[1]) * _UNITS[unit])


def byte_size(text: str) -> int:
    """Parse an option's number of bytes; for argparse's `type`."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the device options as arguments of `load`."""
    return {"device": args.device, "vram_budget": args.vram_budget, "plan": args.plan}


@contextlib.contextmanager
def open_engine(args: argparse.Namespace, **options: Any) -> Iterator[tuple[Engine, Progress]]:
    """Open the model that the options name. Yields its engine and a progress bar.

    The bar has shown downloading and packing, and the caller may use it for later work. `options`
    are further arguments of `load`.
    """
    if "predictor" in args:
        named = args.predictor in ("exact", "auto")
        options["predictor"] = args.predictor if named else Path(args.predictor)
        options["recall"] = args.recall
    # Only commands with the device options may use a GPU.
    options |= device_options(args) if "vram_budget" in args else {"device": "cpu"}
    with (
        progress_bar() as progress,
        load(
            args.model,
            threads=args.threads,
            quant=args.quant,
            offline=args.offline,
            progress=progress,
            **options,
        ) as engine,
    ):
        yield engine, progress


def read_text(path: Path) -> str:
    """Read the text that --text names. Raises InvalidOption if it is unreadable or empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidOption(f"--text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidOption(f"--text {path}: not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise InvalidOption(f"--text {path}: there is no text in it")
    return text


def run_command(program: str, command: Callable[[], int]) -> int:
    """Run `command` and return its exit code. Its errors become one line on standard error.

    0 success, 1 a model or file could not be used, 2 a bad option, 130 interrupted.
    """
    # A closed stream is None in Python, and print(file=None) would write to standard output.
    sys.stdout = sys.stdout or open_null()
    sys.stderr = sys.stderr or open_null()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character must not end the program.
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return command()
    except InvalidOption as error:
        print(f"{program}: {printable(str(error))}", file=sys.stderr)
        return 2
    except HybridError as error:
        print(f"{program}: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stdout = open_null()  # the reader is gone (`| head`): Python must not flush at exit
        return 1
    except OSError as error:
        sys.stdout = open_null()
        what = "cannot write the text" if error.filename is None else printable(error.filename)
        print(f"{program}: {what}: {error.strerror}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"{program}: out of memory; try --quant q4 or a smaller context", file=sys.stderr)
        return 1


def open_null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
