"""Amounts of bytes and escapes on the command line are parsed."""

from __future__ import annotations

import argparse

import pytest

from hybrid.cli.command_line import (
    add_bos_option,
    load_options,
    parse_bytes,
)
from hybrid.cli.generation_options import (
    add_generation_options,
    generation_options,
    unescape,
)


def test_amounts_of_bytes_are_parsed():
    assert parse_bytes("2GiB") == 2 << 30
    assert parse_bytes("1.5 MB") == 1_500_000
    assert parse_bytes("100") == 100
    assert parse_bytes("2g") == 2 * 10**9
    assert parse_bytes("0") == 0
    for text in ("", "GiB", "-1MB", "1 furlong", "nan", "inf", "1e30GB"):
        with pytest.raises(ValueError, match="amount"):
            parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("END", "END"),
        (r"\n", "\n"),
        (r"a\tb\n\n", "a\tb\n\n"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        (r"\x41\xe9", "Aé"),
        (r"\u4f60\u597D", "你好"),
        ("你\n", "你\n"),
        ("", ""),
    ],
)
def test_escapes_stand_for_characters(text, expected):
    assert unescape(text) == expected


@pytest.mark.parametrize("text", [r"\d", "a\\", r"\x4", r"\xgg", r"\u123", r"\\\q", "\\\n"])
def test_other_escapes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no escape; expected"):
        unescape(text)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_generation_options(parser)
    add_bos_option(parser)
    return parser.parse_args(arguments)


def test_options_that_are_not_given_leave_the_choice_to_the_model():
    options = generation_options(parse())
    assert options.max_tokens == "auto"
    assert (options.stop, options.repeat_penalty, options.seed) == (None, None, None)
    assert generation_options(parse("-n", "-1")).max_tokens is None
    assert generation_options(parse("-n", "7")).max_tokens == 7
    stops = generation_options(parse("--stop", r"\n", "--stop", "END")).stop
    assert stops == ("\n", "END")


def test_bos_is_an_option_of_loading():
    assert load_options(parse()).add_bos is None
    assert load_options(parse("--bos")).add_bos is True
    assert load_options(parse("--no-bos")).add_bos is False
