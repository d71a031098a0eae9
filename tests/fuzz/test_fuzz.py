"""Damaged models are used or refused in one line, in bounded time and memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fuzz.runner import checked, fuzz, started_worker, written
from fuzz.seeds import TARGETS, seeds_of

pytest.importorskip("gguf", reason="gguf")
pytest.importorskip("torch", reason="torch writes pytorch_model.bin")

if not Path("/proc/self/clear_refs").exists():
    pytest.skip("the peak of memory is measured on Linux", allow_module_level=True)

N_INPUTS = {"gguf": 150, "safetensors": 250, "bin": 250, "tokenizer": 60}


def expect_no_finding(target: str, n: int, keep: Path, first: int = 0) -> None:
    outcome = fuzz(target, 600.0, n_inputs=n, first=first, keep=keep)
    assert outcome.n_inputs == n
    assert not outcome.findings, f"{outcome.findings[0]}; its files are in {keep}"
    assert outcome.refused["InvalidCheckpoint"] > n / 10  # the damage is seen


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_end_in_an_error_of_ours(target: str, tmp_path: Path) -> None:
    expect_no_finding(target, N_INPUTS[target], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_damaged_files_end_in_an_error_of_ours(target: str, tmp_path: Path) -> None:
    expect_no_finding(target, 12 * N_INPUTS[target], tmp_path, first=1_000_000)


@pytest.mark.parametrize(
    ("action", "place"),
    [
        ("os.abort()", "SIGABRT"),
        ("os._exit(3)", "exit code 3"),
        ("spin()", "no end: .*program.py.*spin"),
        ("answer(growth=1 << 30)", "memory"),
        ("answer(seconds=9)", "time"),
        ("answer(problem='no HybridError', place='x.py:1')", r"x\.py:1"),
    ],
)
def test_what_no_model_may_do_is_found(tmp_path: Path, action: str, place: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(_MISBEHAVES + action)
    seed = seeds_of("safetensors")[0]
    with started_worker(program) as worker:
        found = checked(worker.run(tmp_path, seed), seed)
    assert re.match(place, found["place"])


# It answers the first request, and then does what stands behind it.
_MISBEHAVES = """
import faulthandler, json, os, signal

def answer(**changes):
    print(json.dumps({"refused": "", "growth": 0, "seconds": 0.0} | changes), flush=True)

def spin():
    while True:
        pass

faulthandler.register(signal.SIGUSR1)
input()
answer()
input()
"""


@pytest.mark.parametrize("target", TARGETS)
def test_files_without_damage_are_used(target: str) -> None:
    refused = []
    with started_worker() as worker:
        for seed in seeds_of(target):
            with written(seed.files) as folder:
                answer = worker.run(folder, seed)
            assert "problem" not in answer, answer
            refused.append(answer["refused"])
    # Some have no chat template, and torch's old format is never read.
    n_read = refused.count("") + refused.count("InvalidOption")
    assert n_read == len(refused) - 2 * (target == "bin"), refused
