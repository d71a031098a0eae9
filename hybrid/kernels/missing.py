"""What is said if the compiled kernels are missing: in a checkout they always are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

CHECKOUT = Path(__file__).parents[2]


def refuse(error: ImportError) -> NoReturn:
    """Raises ImportError. A process that is `python -m hybrid…` ends with one line instead, since
    nobody else can be told, and a traceback hides what to do.
    """
    message = _explain(error)
    arguments = sys.orig_argv
    module = arguments[arguments.index("-m") + 1] if "-m" in arguments[:-1] else ""
    if module.partition(".")[0] in ("hybrid", "predictors", "profiler"):
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
