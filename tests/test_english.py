"""Words that made our texts hard to understand do not come back; the field has better ones."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = ("subject", "asked", "placed", "moving", "apart", "gathered", "turn", "ways", "crumbs")
# Whole words, and whole parts of names: it finds turns and is_placed, but not return and always.
PATTERN = re.compile(rf"(?i)(?<![a-z])({'|'.join(WORDS)}|turns|crumb)(?![a-z])|k(?:Apart|Gathered)")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".inl", ".md", ".toml", ".txt", ".json"}
DATA = ("tests/data/", "hybrid/models/stories/", "LICENSE")  # texts that are not ours to change
# This list itself, and "turns" as a key of a published data set.
EXEMPT = {"tests/test_english.py", "tests/text/test_tokenizer.py", "tests/text/test_chat_ids.py"}


def files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if not name.startswith(DATA)]
    return [ROOT / name for name in names if name not in EXEMPT and Path(name).suffix in SUFFIXES]


def test_the_words_do_not_occur():
    found = []
    for path in files():
        if not path.exists():
            continue  # removed, not yet committed
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            # Gemma's markers, and why an answer ends in Anthropic's API.
            if match := PATTERN.search(re.sub("(start|end)_of_turn|end_turn", "", line)):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("as asked", True),
        ("is_placed", True),
        ("Turns", True),
        ("RowLayout::kApart", True),
        ("return always", False),
        ("placement, apartment", False),
    ],
)
def test_the_pattern_finds_words_and_parts_of_names(text, is_found):
    assert bool(PATTERN.search(text)) is is_found
