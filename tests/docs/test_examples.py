"""The examples in docs/examples run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(name: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_the_embedding_example_runs():
    out = run("embed.py", "The little robot")
    assert out.startswith("The little robot")
    assert "of neurons active" in out.splitlines()[-1]
