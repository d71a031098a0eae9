"""The best instruction set is active. HYBRID_ISA can lower it, but not raise it above the CPU's."""

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


def test_a_cap_above_the_cpu_changes_nothing():
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


def symbols_of(object_file: Path) -> list[tuple[str, str]]:
    """Return (kind, name) of every symbol, as nm prints them."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    result = subprocess.run([nm, object_file], check=True, capture_output=True, text=True)
    return [(line.split()[-2], line.split()[-1]) for line in result.stdout.splitlines()]


def check_symbols(object_file: Path) -> None:
    """Assert that an object has no weak symbols, and one symbol of its own: the kernel table.

    The linker could keep a weak symbol compiled with AVX-512 for all instruction sets.
    """
    symbols = symbols_of(object_file)
    assert not [name for kind, name in symbols if kind in "WVuw"]
    assert len([name for kind, name in symbols if kind in "TDRB"]) == 1  # the table


@pytest.mark.parametrize("target", FLAGS)
def test_the_builds_objects_have_no_weak_symbols(target):
    """`pip install .` leaves its objects in build/ in a checkout."""
    name = f"target_{target}.cpp"
    objects = sorted(
        (CSRC.parent / "build").glob(f"*/CMakeFiles/_native.dir/csrc/kernels/{name}.o"),
        key=lambda path: path.stat().st_mtime,
    )
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*")) if CSRC.is_dir() else 0.0
    if not objects or objects[-1].stat().st_mtime < newest:
        pytest.skip("no build of these sources lies in build/: pip install .")
    cache = (objects[-1].parents[4] / "CMakeCache.txt").read_text(encoding="utf-8")
    if "HYBRID_SANITIZE:BOOL=ON" in cache:
        pytest.skip("sanitizers add weak symbols of their own")
    check_symbols(objects[-1])


@pytest.mark.slow
@pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not beside the tests")
@pytest.mark.parametrize("target", FLAGS)
def test_unoptimised_objects_have_no_weak_symbols(target, tmp_path):
    """Without optimisation nothing is inlined, so every function that can be a symbol is one."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source, object_file = CSRC / "kernels" / f"target_{target}.cpp", tmp_path / "target.o"
    flags = ["-std=c++17", "-O0", "-w", "-fPIC", "-I", CSRC, *FLAGS[target]]
    subprocess.run([compiler, *flags, "-c", source, "-o", object_file], check=True)
    check_symbols(object_file)
