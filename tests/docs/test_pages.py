"""The Python examples in pages of docs/ run."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import hybrid

PAGE = Path(__file__).parents[2] / "docs" / "batching.md"


def test_the_examples_of_the_page_on_batching_run(capsys):
    text = PAGE.read_text(encoding="utf-8")
    loop, with_asyncio = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(loop, names)
    assert len(capsys.readouterr().out) > 100
    exec(with_asyncio, names)
    with hybrid.load("stories", threads=1) as engine:
        asyncio.run(names["main"](engine))
    assert capsys.readouterr().out
