"""`hybrid.run --session FILE` keeps tokens, keys and values from one run to the next."""

from __future__ import annotations

import json
import re
from pathlib import Path

from test_run import Result, hybrid_run

PROMPT = "Once upon a time there was a little dog"


def notes(result: Result) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("note: session ")]


def run(file: Path, *arguments: str, code: int = 0, stdin: bytes = b"") -> Result:
    result = hybrid_run("--session", file, "-n", "20", "--seed", "3", *arguments, stdin=stdin)
    assert result.code == code, result.err
    return result


def test_a_second_run_takes_the_prompt_from_the_file(tmp_path):
    file = tmp_path / "dog.session"
    first = run(file, "-p", PROMPT)
    (written,) = notes(first)
    assert re.fullmatch(
        rf"note: session {re.escape(str(file))}: 29 tokens, 0\.\d MB, written in \d+\.\d\d s",
        written,
    )
    again = run(file, "-p", PROMPT, "-t", "1")
    assert again.out == first.out
    read, written = notes(again)
    assert re.fullmatch(
        rf"note: session {re.escape(str(file))}: 29 tokens, 0\.\d MB, read in \d+\.\d\d s; "
        r"9 of the prompt's 10 tokens were there",
        read,
    )
    assert "29 tokens" in written
    # The whole answer is now a prompt.
    longer = json.loads(run(file, "-p", first.out.strip(), "--json").out)
    assert longer["stats"]["cached_tokens"] > 20


def test_a_session_is_kept_by_an_interactive_run(tmp_path):
    file = tmp_path / "dog.session"
    assert len(notes(run(file, "-i", stdin=b"Once upon a time\n/quit\n"))) == 1
    again = run(file, "-i", stdin=b"Once upon a time\nThe dog\n/quit\n")
    read, written = notes(again)
    assert "4 of the prompt's 5 tokens were there" in read
    assert "written" in written


def test_a_file_that_cannot_be_used_is_left_alone(tmp_path):
    file = tmp_path / "dog.session"
    run(file, "-p", PROMPT)
    content = file.read_bytes()
    other = run(file, "-p", PROMPT, "--quant", "q4", code=1)
    assert "another weight format: q8, this engine has q4" in other.err
    assert "holds 29 tokens" in run(file, "-p", PROMPT, "-c", "10", code=1).err
    assert file.read_bytes() == content
    file.write_text("my notes")
    assert "is not a session" in run(file, "-p", PROMPT, code=1).err
    assert file.read_text() == "my notes"


def test_a_missing_folder_is_said_before_the_model_is_loaded(tmp_path):
    file = tmp_path / "none" / "dog.session"
    result = run(file, "-m", "no-such-model", code=2)
    assert f"--session {file}: there is no folder {file.parent}" in result.err
