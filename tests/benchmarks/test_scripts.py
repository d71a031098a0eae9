"""The scripts that measure start: what they import is where they expect it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = (
    "batch.py",
    "compare_llama_cpp.py",
    "format_report.py",
    "plan_check.py",
    "speculation.py",
    "under_load.py",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_does(name: str) -> None:
    path = Path(__file__).with_name(name)
    result = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout
