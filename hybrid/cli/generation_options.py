"""The options that decide how an answer is generated."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, Literal

from hybrid import GenerationOptions, InvalidOption
from hybrid.cli.command_line import read_option_file, read_option_text
from predictors.schema import Malformed, parse_json

MAX_FILE_BYTES = 4 << 20


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how an answer is generated. `generation_options` reads them."""
    add = parser.add_argument
    add(
        "-n",
        "--max-tokens",
        type=int,
        help="maximum number of tokens to generate; -1: until the answer or the context ends "
        "(default: the model's, or else 256)",
    )
    add(
        "--temp",
        type=float,
        help="temperature; 0 always takes the likeliest token (default: the model's)",
    )
    add(
        "--top-k",
        type=int,
        help="sample from the k likeliest tokens; 0 means all (default: the model's)",
    )
    add(
        "--top-p",
        type=float,
        help="sample from the fewest tokens that have this probability (default: the model's)",
    )
    add(
        "--min-p",
        type=float,
        help="drop tokens below this share of the likeliest token (default: the model's)",
    )
    add(
        "--repeat-penalty",
        type=float,
        help="make the tokens of prompt and answer less likely; 1 means off (default: the model's)",
    )
    add(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="subtract this from the logits of the answer's tokens, -2 to 2 (default: 0)",
    )
    add(
        "--frequency-penalty",
        type=float,
        default=0.0,
        help="the same, as often as the answer has the token (default: 0)",
    )
    add(
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="ID:BIAS",
        help="add this to a token's logit, -100 to 100; may be repeated (default: none)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema",
        type=Path,
        metavar="FILE",
        help="JSON schema of the answer, which is then such a JSON value (default: none)",
    )
    form.add_argument(
        "--grammar",
        type=Path,
        metavar="FILE",
        help="grammar of the answer, in llama.cpp's GBNF (default: none)",
    )
    form.add_argument(
        "--regex",
        help="regular expression that the whole answer matches (default: none)",
    )
    add(
        "--stop",
        action="append",
        type=unescape,
        metavar="TEXT",
        help=r"end before this text; \n, \t, \\, \xNN and \uNNNN stand for characters; may be "
        "repeated (default: the model's)",
    )
    add(
        "--seed",
        type=int,
        help="random seed; -1: random; the closing line names the one in use (default: random)",
    )
    add(
        "--logprobs",
        type=int,
        metavar="K",
        help="print the log-probability of each token and the K likeliest tokens (default: off)",
    )
    add(
        "--speculate",
        choices=("ngram", "off"),
        default="off",
        help="guess tokens that the text may repeat; the same text, faster if it does (default: "
        "off)",
    )
    add(
        "--context-shift",
        action="store_true",
        help="when the context is full, drop its oldest half and go on (default: the answer ends)",
    )
    add(
        "--keep",
        type=int,
        metavar="N",
        help="first tokens that --context-shift keeps, besides BOS (default: the system message)",
    )


_CHARACTERS = {"n": "\n", "t": "\t", "\\": "\\"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.?)", re.DOTALL)


def unescape(text: str) -> str:
    r"""Return `text` with \n, \t, \\, \xNN and \uNNNN as characters; for argparse's `type`."""

    def character(match: re.Match[str]) -> str:
        escape = match[1]
        if len(escape) > 1:
            return chr(int(escape[1:], 16))
        if escape not in _CHARACTERS:
            raise argparse.ArgumentTypeError(
                f"{match[0]} in {text} is no escape; expected \\n, \\t, \\\\, \\xNN or \\uNNNN"
            )
        return _CHARACTERS[escape]

    return _ESCAPE.sub(character, text)


def read_json_file(option: str, path: Path) -> Any:
    """Return the JSON value in the file of an option. Raises InvalidOption."""
    try:
        return parse_json(read_option_file(option, path, MAX_FILE_BYTES))
    except Malformed as error:
        raise InvalidOption(f"{option} {path}: {error}") from error


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a token id and a number, such as 42:-5"
        ) from None


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    """Return what the options of `add_generation_options` mean. Raises InvalidOption."""
    max_tokens: int | Literal["auto"] | None = args.max_tokens
    if max_tokens is None:
        max_tokens = "auto"
    elif max_tokens == -1:
        max_tokens = None
    response_format = None
    if args.json_schema is not None:
        schema = read_json_file("--json-schema", args.json_schema)
        response_format = {"type": "json_schema", "schema": schema}
    grammar = None
    if args.grammar is not None:
        grammar = read_option_text("--grammar", args.grammar, MAX_FILE_BYTES)
    return GenerationOptions(
        max_tokens=max_tokens,
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logit_bias=dict(args.logit_bias or ()),
        response_format=response_format,
        grammar=grammar,
        regex=args.regex,
        stop=args.stop,
        logprobs=args.logprobs,
        seed=args.seed,
        speculate=None if args.speculate == "off" else args.speculate,
        context_shift=args.context_shift,
        n_keep=args.keep,
    )
