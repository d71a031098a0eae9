"""Commands say so if the portable kernels are in use; tests of other lines leave that line out."""

from __future__ import annotations

ISA_NOTE = "the portable kernels are in use"


def without_isa_note(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if ISA_NOTE not in line)
