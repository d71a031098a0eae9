"""Commands, examples and links in README and DEVELOPERS.md work as shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from isa_note import without_isa_note

import hybrid

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str = "") -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def shown() -> tuple[list[str], str, str]:
    """Return the options of the first `hybrid run`, and the two lines of output that README shows.

    README cuts both lines off at "…".
    """
    for block in blocks():
        command, *output = block.splitlines()
        if " && hybrid run " in command:
            text, closing_line = (line.removesuffix("…") for line in output)
            return shlex.split(command.partition(" && hybrid run ")[2]), text, closing_line
    raise AssertionError("README does not show hybrid run")


def test_the_story_is_the_one_that_readme_shows():
    """Compare word for word only on the instruction set that wrote it; others round differently."""
    options, text, closing_line = shown()
    result = run(["-m", "hybrid.run", *options])
    figures = re.compile(r"[\d.,]+")
    assert figures.sub("N", without_isa_note(result.stderr)).startswith(
        figures.sub("N", closing_line)
    )
    if hybrid.active_isa() == "avx512_vnni_bf16":
        assert result.stdout.startswith(text)
    else:
        assert result.stdout.startswith("Once upon a time")
        assert len(result.stdout) > 100


def test_the_library_example_runs():
    (example,) = blocks("python")
    assert run(["-c", example]).stdout


def test_readme_is_short_and_its_links_lead_somewhere():
    lines = README.splitlines()
    assert len(lines) <= 90
    assert not [line for line in lines if len(line) > 110]
    pages = [ROOT / "README.md", ROOT / "DEVELOPERS.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tables_in_developers_md_are_narrow():
    lines = (ROOT / "DEVELOPERS.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith("|") and len(line) > 120]
    assert max(map(len, lines)) <= 130


def test_the_files_on_the_paths_in_developers_md_exist():
    """Each path through the tree names at most twelve files, in order."""
    text = (ROOT / "DEVELOPERS.md").read_text(encoding="utf-8")
    section = text.partition("## Paths through the tree")[2].partition("\n## ")[0]
    tables = [part for part in re.split(r"^\*\*", section, flags=re.MULTILINE) if "|" in part]
    assert len(tables) == 6
    for table in tables:
        cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        files = [name for cell in cells for name in re.findall(r"`([\w/.]+)`", cell)]
        assert 5 <= len(files) <= 12
        for name in files:
            assert (ROOT / name if name.startswith("csrc/") else ROOT / "hybrid" / name).exists()
