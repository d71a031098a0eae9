"""What README shows is what happens."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import hybrid

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str = "") -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def shown(program: str) -> tuple[list[str], str]:
    """The arguments and the output that README shows for `python -m program`."""
    for block in blocks():
        command, _, output = block.partition("\n")
        if f"python -m {program}" in command:
            return shlex.split(command.partition("python ")[2]), output
    raise AssertionError(f"README does not show {program}")


def test_the_story_is_the_one_that_is_shown():
    """Word for word on the instruction set that it was made on: others round differently."""
    arguments, output = shown("hybrid.run")
    text, _, closing_line = output.rpartition("\n[")
    result = run(arguments)
    assert re.match(r"prompt \d+ tokens, .* of FFN neurons active \|", closing_line)
    assert re.match(r"\[prompt \d+ tokens, .* of FFN neurons active \|", result.stderr)
    if hybrid.active_isa() == "avx512_vnni_bf16":
        assert result.stdout == text + "\n"
    else:
        assert result.stdout.startswith("Once upon a time")
        assert len(result.stdout) > 100


def test_the_library_example_runs():
    (example,) = blocks("python")
    assert run(["-c", example]).stdout


def test_the_embedding_example_runs():
    result = run(["docs/examples/embed.py", "The little robot"])
    assert result.stdout.startswith("The little robot")
    assert "of neurons active" in result.stdout.splitlines()[-1]


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 120
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for path in ("DEVELOPERS.md", "docs/log.md", "LICENSE"):
        assert (ROOT / path).exists()
