"""Which instruction set runs: what is forced is what is active, and nothing is raised above the
CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid import UnsupportedIsa, kernels

CSRC = Path(__file__).parents[2] / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS = {
    "scalar": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx2_vnni": [*AVX2, "-mavxvnni"],
    "avx512_vnni_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}


def run_python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HYBRID_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_best_isa_is_the_default():
    result = run_python("import hybrid; print(hybrid.active_isa())", "")
    assert result.stdout.strip() == kernels.available_isas()[-1]


@pytest.mark.parametrize("cap", kernels.available_isas())
def test_hybrid_isa_caps_the_choice(cap):
    result = run_python("import hybrid; print(hybrid.active_isa())", cap)
    assert result.stdout.strip() == cap, result.stderr


def test_a_cap_above_the_cpu_is_no_upgrade():
    result = run_python("import hybrid; print(hybrid.active_isa())", "avx512_vnni_bf16")
    assert result.stdout.strip() == kernels.available_isas()[-1]


def test_a_cap_may_be_written_in_capitals():
    result = run_python("import hybrid; print(hybrid.active_isa())", "SCALAR")
    assert result.stdout.strip() == "scalar"


def test_using_an_unavailable_isa_is_refused_and_changes_nothing():
    before = kernels.active_isa()
    with pytest.raises(UnsupportedIsa, match="sse9"), kernels.using_isa("sse9"):
        pass
    assert kernels.active_isa() == before


@pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not beside the tests")
@pytest.mark.parametrize("target", FLAGS)
def test_target_objects_have_no_weak_symbols(target, tmp_path):
    """A weak symbol compiled with AVX-512 could be the copy that the linker keeps for everyone."""
    compiler, nm = shutil.which("g++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs g++ and nm")
    source = CSRC / "kernels" / f"target_{target}.cpp"
    assert source.exists()
    for optimisation in ("-O0", "-O3"):
        object_file = tmp_path / f"{target}{optimisation}.o"
        subprocess.run(
            [compiler, "-std=c++17", optimisation, "-w", "-fPIC", *FLAGS[target]]
            + ["-c", source, "-o", object_file],
            check=True,
        )
        symbols = subprocess.run(
            [nm, object_file], check=True, capture_output=True, text=True
        ).stdout
        weak = [line for line in symbols.splitlines() if line.split()[-2] in "WVuw"]
        assert not weak
        exported = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2] in "TDRB"]
        assert len(exported) == 1  # the table
