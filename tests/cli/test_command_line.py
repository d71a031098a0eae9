"""Amounts of bytes on the command line are parsed."""

from __future__ import annotations

import pytest

from hybrid.cli.command_line import parse_bytes


def test_amounts_of_bytes_are_parsed():
    assert parse_bytes("2GiB") == 2 << 30
    assert parse_bytes("1.5 MB") == 1_500_000
    assert parse_bytes("100") == 100
    assert parse_bytes("2g") == 2 * 10**9
    assert parse_bytes("0") == 0
    for text in ("", "GiB", "-1MB", "1 furlong", "nan", "inf", "1e30GB"):
        with pytest.raises(ValueError, match="amount"):
            parse_bytes(text)
