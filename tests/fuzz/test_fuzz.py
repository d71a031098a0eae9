"""Damaged models are used or refused in one line, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.runner import fuzz, started_worker, written
from fuzz.seeds import TARGETS, seeds_of

pytest.importorskip("gguf", reason="gguf")
pytest.importorskip("torch", reason="torch writes pytorch_model.bin")

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
