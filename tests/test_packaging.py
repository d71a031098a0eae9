"""An installation brings few packages, and a missing part is reported in one line."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import hybrid
from hybrid.__main__ import COMMANDS, OTHERS, main

ROOT = Path(__file__).parents[1]
DISTRIBUTION = "hybrid-inference"
LARGE = {"llama-cpp-python", "lm-eval", "openai", "litellm", "playwright", "ray"}


def requirements(extra: str = "") -> set[str]:
    """Return the names of the packages that an extra, or the base installation, requires."""
    found = set()
    for line in metadata.requires(DISTRIBUTION) or []:
        name = re.match(r"[\w.-]+", line)
        of = re.search(r"extra == ['\"](\w+)['\"]", line)
        if name and (of[1] if of else "") == extra:
            found.add(name[0].lower())
    return found


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_the_base_installation_names_few_packages():
    assert len(requirements()) <= 8
    assert not requirements() & {"numba", "torch", "scipy", "matplotlib", "transformers"}
    assert "numba" in requirements("train")


def test_the_second_opinion_is_one_that_its_tests_use():
    """With transformers 4 they would skip, and nothing would say so."""
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("the tests lie outside the source tree")
    (least,) = re.findall(r'"transformers>=(\d+)', pyproject.read_text(encoding="utf-8"))
    assert int(least) >= 5


def test_large_packages_for_comparisons_are_separate_extras():
    assert not (requirements() | requirements("test")) & LARGE
    assert "llama-cpp-python" in requirements("peers")
    assert "lm-eval" in requirements("eval")
    assert "openai" in requirements("clients")


def test_the_version_is_defined_once():
    assert metadata.version(DISTRIBUTION) == hybrid.__version__
    result = run("-m", "hybrid.run", "--version")
    assert result.stdout == f"hybrid {hybrid.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for name in (*COMMANDS, *OTHERS):
        assert re.search(rf"^  (python -m )?{re.escape(name)} ", out, re.MULTILINE), name


def test_a_command_runs_by_its_name(capsys):
    assert main(["selfcheck", "-t", "0"]) == 2
    assert "hybrid.selfcheck: " in capsys.readouterr().err
    assert main(["walk"]) == 2
    assert capsys.readouterr().err.startswith("hybrid: unknown command 'walk'")


# The help of hybrid.lm_eval is that of another package (tests/evaluation/test_harness.py).
OURS = [*(f"hybrid.{name}" for name in COMMANDS), *(OTHERS.keys() - {"hybrid.lm_eval"})]


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_listed_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {name}")


def test_sources_without_a_build_say_so_in_one_line():
    if not (ROOT / "CMakeLists.txt").is_file() or list(ROOT.glob("hybrid/kernels/_native*.so")):
        pytest.skip("not a checkout without a build")
    if Path(hybrid.__file__).is_relative_to(ROOT):
        pytest.skip("an editable installation finds the sources and their build")
    for name in ("hybrid.run", "hybrid", "profiler.record"):
        result = run("-m", name, "--help", cwd=ROOT)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert "pip install ." in result.stderr
    result = run("-c", "import hybrid", cwd=ROOT)
    assert result.stderr.splitlines()[-1].startswith("ImportError: Python found the sources")


@pytest.mark.parametrize(
    "arguments",
    [
        ("profiler.record", "-o", "out"),
        ("hybrid.setup", "-m", "synthetic:tiny", "--no-predictor"),
    ],
)
def test_recording_without_numba_says_what_to_install(tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))
    module, *options = arguments
    code = (
        f"import sys; sys.modules['numba'] = None; from {module} import main; "
        f"sys.exit(main({options!r}))"
    )
    result = run("-c", code, cwd=tmp_path)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("calibrating ")]
    assert len(lines) == 1, result.stderr
    assert "pip install 'hybrid-inference[train]'" in lines[0]


def test_a_missing_harness_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['lm_eval'] = None; from hybrid.lm_eval import main; print(main())"
    )
    result = run("-c", code, cwd=tmp_path)
    assert result.stdout == "1\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith("hybrid.lm_eval: ")
    assert "pip install 'hybrid-inference[eval]'" in line


@pytest.mark.slow
def test_numba_needs_no_folder_for_its_cache(tmp_path):
    """Numba works even if neither the package's folder nor the user's can be written."""
    pytest.importorskip("numba")
    code = (
        "import sys; from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from profiler.record import main\n"
        "sys.exit(main(['-o', 'out', '--text', sys.argv[1], '--max-tokens', '40']))"
    )
    text = ROOT / "tests" / "data" / "held_out_story.txt"
    result = run("-c", code, str(text), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "of neurons inactive" in result.stdout
