"""The compiled kernels and the instruction set that they run on.

The kernel contract (layouts, arguments, sums) stands in `csrc/kernels/kernels.h`; `reference.py` is
its oracle. The active instruction set is process-wide: the best one of this CPU, chosen at import,
capped by the environment variable HYBRID_ISA (tests and bug reports; it never raises what the CPU
can do).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hybrid.errors import UnsupportedIsa
from hybrid.kernels import _native
from hybrid.kernels._native import Activation, Format, Program, Rows, Session, ThreadPool

__all__ = [
    "Activation",
    "Format",
    "Program",
    "Rows",
    "Session",
    "ThreadPool",
    "active_isa",
    "available_isas",
    "using_isa",
]


def available_isas() -> list[str]:
    """Instruction sets that this build holds and this CPU runs, slowest first."""
    return _native.available_isas()


def active_isa() -> str:
    """The instruction set in use, such as "avx2"."""
    return _native.active_isa()


@contextmanager
def using_isa(isa: str) -> Iterator[None]:
    """Run the body on another instruction set: for tests. Raises UnsupportedIsa where it is not
    available.
    """
    before = active_isa()
    try:
        _native.set_isa(isa)
    except ValueError:
        raise UnsupportedIsa(
            f"instruction set {isa!r} is not available here; there are: "
            + ", ".join(available_isas())
        ) from None
    try:
        yield
    finally:
        _native.set_isa(before)


def _apply_cap(cap: str) -> None:
    try:
        _native.set_best_isa(cap)
    except ValueError:
        raise UnsupportedIsa(
            f"HYBRID_ISA={cap!r} is no instruction set that hybrid knows; "
            "use scalar, avx2, avx512 or avx512_vnni_bf16, or unset it"
        ) from None


_apply_cap(os.environ.get("HYBRID_ISA", ""))
