"""The compiled kernels, and the instruction set that they run on.

The kernel contract (layouts, arguments, sums) is in `csrc/kernels/kernels.h`; `reference.py` is its
oracle. The active instruction set is process-wide. It is chosen at import: the best one of this
CPU, capped by the environment variable HYBRID_ISA. The cap is for tests and bug reports; it never
selects an instruction set that the CPU lacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hybrid.errors import UnsupportedIsa
from hybrid.kernels.missing import refuse

try:
    from hybrid.kernels import _native
except ImportError as error:
    refuse(error)
from hybrid.kernels._native import (
    PREFILL_CHUNK,
    Activation,
    Batch,
    Format,
    KvFormat,
    Predictor,
    PredictorInput,
    Preview,
    Program,
    Rows,
    Session,
    ThreadPool,
)

__all__ = [
    "PREFILL_CHUNK",
    "Activation",
    "Batch",
    "Format",
    "KvFormat",
    "Predictor",
    "PredictorInput",
    "Preview",
    "Program",
    "Rows",
    "Session",
    "ThreadPool",
    "active_isa",
    "available_isas",
    "check_isa_cap",
    "using_isa",
]

_isa_cap = os.environ.get("HYBRID_ISA", "").lower()


def check_isa_cap() -> None:
    """Raise UnsupportedIsa if HYBRID_ISA names no instruction set that hybrid knows.

    The import itself never raises it: a program that embeds hybrid must be able to import it.
    """
    if _isa_cap and not _is_cap_applied:
        raise UnsupportedIsa(
            f"HYBRID_ISA={_isa_cap!r} is no instruction set that hybrid knows; "
            "use scalar, avx2, avx2_vnni, avx512 or avx512_vnni_bf16, or unset it"
        )


def available_isas() -> list[str]:
    """Instruction sets that this build holds and this CPU runs, slowest first."""
    return _native.available_isas()


def active_isa() -> str:
    """The instruction set in use, such as "avx2"."""
    return _native.active_isa()


@contextmanager
def using_isa(isa: str) -> Iterator[None]:
    """Run the body on another instruction set, for tests.

    Raises UnsupportedIsa if that instruction set is not available.
    """
    before = active_isa()
    try:
        _native.set_isa(isa)
    except ValueError:
        raise UnsupportedIsa(
            f"instruction set {isa!r} is not available here; available are: "
            + ", ".join(available_isas())
        ) from None
    try:
        yield
    finally:
        _native.set_isa(before)


try:
    _native.set_best_isa(_isa_cap)
    _is_cap_applied = True
except ValueError:
    _native.set_best_isa("")
    _is_cap_applied = False
