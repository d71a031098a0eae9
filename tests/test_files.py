"""A file that is replaced has its old content or its new one, whatever happens to the writer."""

from __future__ import annotations

import ast
import errno
import os
import time
from pathlib import Path

import pytest

import hybrid
from hybrid.files import replacing, write_atomically
from predictors.writing import replacing as replacing_for_predictors


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a [file].json"
    path.write_bytes(b"old")
    return path


def test_a_file_is_replaced_by_its_new_content(path):
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("replacing", [replacing, replacing_for_predictors])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_old_file_alone(path, replacing, error):
    def write() -> None:
        with replacing(path) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_of_two_writers_at_once_the_last_wins(path):
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no space")
def test_a_full_disk_is_an_error_before_any_work(path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="No space"), replacing(path, 1 << 20):
        pytest.fail("the body ran")
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "file", b"")


def test_files_that_a_killed_process_left_are_removed(path):
    for name, age_s in (("old", 7200), ("new", 0)):
        left = path.with_name(f".{path.stem}.{name}.tmp")
        left.write_bytes(b"x")
        os.utime(left, (time.time() - age_s,) * 2)
    write_atomically(path, b"new")
    assert sorted(path.parent.iterdir()) == [path.with_name(f".{path.stem}.new.tmp"), path]


PACKAGE = Path(hybrid.__file__).parent
# They read the kernel's own files in /proc and /sys, which never wait and are short.
OF_THE_KERNEL = {"limits.py", "placement/hardware.py"}


def reads_of(path: Path) -> list[int]:
    """Return the lines that open a file for reading, not by hybrid/files.py."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(attr="read_bytes" | "read_text"):
                lines.append(node.lineno)
            case ast.Name(id="open") | ast.Attribute(attr="open"):
                modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if (not node.args and not node.keywords) or any(
                    str(mode) in ("r", "rb", "rt") for mode in modes
                ):
                    lines.append(node.lineno)
    return lines


def test_files_are_read_through_one_opener():
    found = {
        path.relative_to(PACKAGE).as_posix(): lines
        for path in PACKAGE.rglob("*.py")
        if "training" not in path.parts and (lines := reads_of(path))
    }
    assert found.keys() == OF_THE_KERNEL, found


def test_a_models_json_has_one_reader():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "training" not in path.parts and "json.load" in path.read_text(encoding="utf-8")
    }
    # The lines of a user's questions, and what the Hub answers.
    assert found == {"evaluation/choices.py", "hub/transfer.py"}
