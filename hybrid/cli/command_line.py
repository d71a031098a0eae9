"""What all commands share: common options, one-line errors, and the set-up of the streams."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, get_args

from hybrid import (
    Engine,
    HybridError,
    InvalidOption,
    LoadOptions,
    Progress,
    __version__,
    load,
)
from hybrid.cli.progress_bar import progress_bar
from hybrid.engine.options import Quant
from hybrid.files import read_bytes
from hybrid.text.built_in_templates import BUILT_IN as TEMPLATES
from hybrid.text.text_file import BOM, decode_text, text_notices
from predictors.interrupts import INTERRUPTED, raising_interrupts

QUANTS: tuple[str, ...] = get_args(Quant)
MAX_TEXT_BYTES = 1 << 30  # of a text to measure on
MODEL_HELP = (
    "a model's name, a folder, a GGUF file, or a Hugging Face repository as owner/name, "
    "hf://owner/name or, for GGUF, owner/name:Q4_0; what looks like a path is never downloaded "
    "(default: stories)"
)


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


def add_model_options(parser: argparse.ArgumentParser, quants: Sequence[str] = QUANTS) -> None:
    """Add the options of every command that opens a model; `open_engine` reads them."""
    add = parser.add_argument
    add(
        "-m",
        "--model",
        default="stories",
        help=MODEL_HELP,
    )
    add(
        "-t",
        "--threads",
        type=int,
        help="number of threads (default: one per core that it may use)",
    )
    add_quant_option(parser, quants)
    add_activation_option(parser)
    add("--offline", action="store_true", help="never use the network")


def add_quant_option(parser: argparse.ArgumentParser, quants: Sequence[str] = QUANTS) -> None:
    """Add the option of every command that opens a model; `open_engine` reads it."""
    parser.add_argument(
        "--quant",
        choices=quants,
        help="weight format (default: that of most weights of a GGUF file, else q8)",
    )


def add_activation_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of every command that opens a model; `open_engine` reads it."""
    parser.add_argument(
        "--activation",
        metavar="NAME",
        help="activation of a GGUF model, which does not record it: silu, relu, or fatrelu:T with "
        "a threshold (default: by the model's name, or silu)",
    )


def add_bos_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that encode a text of the user; `load_options` reads it."""
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin a text with the BOS token, or not (default: as the model's tokenizer does)",
    )


def add_kv_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that compute with a model; `open_engine` reads it."""
    parser.add_argument(
        "--kv",
        choices=("fp16", "bf16"),
        default="fp16",
        help="format of the KV cache; bf16 holds larger numbers, less precisely (default: fp16)",
    )


def add_context_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that hold a text's keys and values; `load_options` reads it."""
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        help="context size in tokens (default: 4096, or the model's maximum if that is less)",
    )


def add_template_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that chat; `load_options` reads it."""
    parser.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help=f"chat template: one that the model names, a Jinja file, or {', '.join(TEMPLATES)} "
        "(default: the model's)",
    )


def add_predictor_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that can use a predictor; `open_engine` reads them."""
    add = parser.add_argument
    add(
        "--predictor",
        default="exact",
        metavar="{exact,auto,own,FILE}",
        help="compute every gate (exact) or those that a predictor names: hybrid's (auto), the "
        "one in the model's file, as PowerInfer's and Kairox's have (own), or another file's "
        "(default: exact)",
    )
    add(
        "--recall",
        type=float,
        default=0.99,
        help="share of the active neurons that the predictor must find (default: 0.99)",
    )
    add(
        "--preview-head",
        action="store_true",
        help="estimate the logits of a large vocabulary from a 2-bit copy of the head, which reads "
        "fewer bytes; likely logits are exact, the others remain estimates (default: off)",
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


def load_options(args: argparse.Namespace, **changes: Any) -> LoadOptions:
    """Return what the options of a command mean to `hybrid.load`. Raises InvalidOption.

    A command that does not offer an option takes its default; without device options a command runs
    on the CPU. `changes` are fields of LoadOptions.
    """
    names = ["threads", "quant", "kv", "recall", "preview_head", "mmap", "mlock", "offline"]
    names += ["chat_template", "activation"]
    names += ["device", "vram_budget", "plan"] if "device" in args else []
    given: dict[str, Any] = {"device": "cpu"}
    given |= {name: getattr(args, name) for name in names if name in args}
    if "bos" in args:
        given["add_bos"] = args.bos
    if "ctx_size" in args:
        given["context_size"] = args.ctx_size
    for name in ("predictor", "profile"):
        if name in args:
            value = getattr(args, name)
            given[name] = value if value in ("exact", "auto", "own", "none") else Path(value)
    return LoadOptions(**given | changes)


@contextlib.contextmanager
def open_engine(
    args: argparse.Namespace, options: LoadOptions | None = None
) -> Iterator[tuple[Engine, Progress]]:
    """Load the model that a command's options name.

    Yields the engine and the progress bar that showed its download and packing, for further work.
    """
    with (
        progress_bar() as progress,
        load(args.model, options=options or load_options(args), progress=progress) as engine,
    ):
        yield engine, progress


def read_text(path: Path) -> str:
    """Read the text that --text names, byte for byte (hybrid/text/text_file.py).

    What a user should know about it becomes a note on standard error. Raises InvalidOption if it is
    unreadable or empty.
    """
    data = read_option_file("--text", path, MAX_TEXT_BYTES)
    return decode_with_notes(f"--text {path}", data, is_required=True)


def read_option_file(option: str, path: Path, most: int) -> bytes:
    """Return the bytes of the file that an option names, at most `most`. Raises InvalidOption."""
    try:
        return read_bytes(path, most)
    except OSError as error:
        raise InvalidOption(f"{option} {path}: {error.strerror}") from error


def read_option_text(option: str, path: Path, most: int) -> str:
    """Return the text of a file that the model does not read. Raises InvalidOption."""
    return _decoded(f"{option} {path}", read_option_file(option, path, most))


def decode_with_notes(name: str, data: bytes, *, is_required: bool = False) -> str:
    """Return the text of a file's bytes, after notes on it on standard error.

    `name` is the option and the file, for messages. Raises InvalidOption if it is not UTF-8, or
    if it is blank and `is_required`.
    """
    text = _decoded(name, data)
    if is_required and not text.strip():
        raise InvalidOption(f"{name}: there is no text in it")
    has_bom, has_crlf = data.startswith(BOM), b"\r\n" in data
    print_notices(text_notices(name, has_bom=has_bom, has_crlf=has_crlf))
    return text


def _decoded(name: str, data: bytes) -> str:
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        raise InvalidOption(
            f"{name}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})"
        ) from error


def print_notices(notices: Iterable[str]) -> None:
    """Print what a user should know, one line each, on standard error."""
    for notice in notices:
        print(f"note: {printable(notice)}", file=sys.stderr)


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
        with raising_interrupts():
            return command()
    except InvalidOption as error:
        print(f"{program}: {printable(str(error))}", file=sys.stderr)
        return 2
    except HybridError as error:
        print(f"{program}: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
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
