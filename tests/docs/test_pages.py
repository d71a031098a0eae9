"""The Python examples in pages of docs/ run."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import hybrid

DOCS = Path(__file__).parents[2] / "docs"


def examples(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_page_on_batching_run(capsys):
    loop, with_asyncio = examples("batching.md")
    names: dict[str, Any] = {}
    exec(loop, names)
    assert len(capsys.readouterr().out) > 100
    exec(with_asyncio, names)
    with hybrid.load("stories", threads=1) as engine:
        asyncio.run(names["main"](engine))
    assert capsys.readouterr().out


def test_the_examples_of_the_page_on_forms_run(capsys):
    form, tools = examples("forms.md")
    exec(form, {})
    assert re.fullmatch(r"\{'name': '.*', 'age': -?\d+\}\n", capsys.readouterr().out)
    exec(tools, {})
    assert "ToolCall(name='jump', arguments='{\"who\": \"" in capsys.readouterr().out
