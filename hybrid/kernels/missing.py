"""The error if the compiled kernels are missing, as they always are in a plain checkout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from predictors.interrupts import is_our_command

CHECKOUT = Path(__file__).parents[2]


def refuse(error: ImportError) -> NoReturn:
    """Raise ImportError, or end a process that is `python -m hybrid…` with one line.

    Such a process has no caller that could handle the error, and a traceback would hide what to do.
    """
    message = _explain(error)
    if is_our_command():
        sys.exit(f"hybrid: {message}")
    raise ImportError(message) from error


def _explain(error: ImportError) -> str:
    if not (CHECKOUT / "CMakeLists.txt").is_file():
        return (
            f"the compiled kernels are missing or are not for this Python ({error}); install "
            "hybrid-inference again with this Python"
        )
    return (
        f"Python found the sources in {CHECKOUT}, which hold no compiled kernels. Run "
        "`pip install .` there once, then use the command `hybrid`, or `python -m` in another "
        "folder; or run `pip install -e .` to use the sources themselves."
    )
