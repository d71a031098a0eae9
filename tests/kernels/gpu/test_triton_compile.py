"""Every Triton kernel compiles for every kind of GPU that hybrid supports. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hybrid

# Turing, Ampere (Ada and its other chips share its instructions), Hopper, Blackwell.
ARCHS = ("75", "80", "90", "120")
PROGRAM = Path(__file__).with_name("compile_triton.py")


@pytest.mark.slow
def test_all_kernels_compile_for_all_kinds_of_gpus(tmp_path):
    for package in ("torch", "triton"):  # without importing them
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = str(Path(hybrid.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, str(PROGRAM), *ARCHS], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    compiled = {tuple(line.split()[:2]) for line in result.stdout.splitlines()}
    names = {name for _, name in compiled}
    assert len(names) == 9
    assert compiled == {(arch, name) for arch in ARCHS for name in names}
