"""The commands: `python -m hybrid COMMAND`, or `hybrid COMMAND`; without one, their list."""

from __future__ import annotations

import importlib
import sys

from hybrid import __version__

COMMANDS = {
    "run": "write text: one answer, a chat, or a text that you and the model write together",
    "selfcheck": "check that a model computes what it should on this machine",
    "setup": "make a model faster on this machine, once: record, pack, train a predictor, plan",
    "plan": "decide what goes to a GPU, and say what that is worth",
    "bench": "measure load, prefill and decode against this machine's memory bandwidth",
    "eval": "measure perplexity, or the accuracy on multiple-choice questions",
}
OTHERS = {
    "profiler.record": "record which neurons fire",
    "profiler.report": "show a recording: a table and plots",
    "profiler.sparsity": "measure how many neurons fire on a text",
    "predictors.train": "train a predictor on a recorded trace",
}


def usage() -> str:
    lines = [
        f"hybrid {__version__}: runs ReLU-sparse language models fast on ordinary PCs",
        "",
        "usage: hybrid COMMAND [OPTIONS]        (or: python -m hybrid.COMMAND [OPTIONS])",
        "",
        *(f"  {name:10} {what}" for name, what in COMMANDS.items()),
        "",
        "`hybrid COMMAND --help` shows a command's options. Tools beside it:",
        "",
        *(f"  python -m {name:17} {what}" for name, what in OTHERS.items()),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names. Returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if given[0] in ("-V", "--version"):
        print(f"hybrid {__version__}")
        return 0
    if given[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"hybrid: no command {given[0]!r}; the commands are {known}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"hybrid.{given[0]}")
    return int(command.main(given[1:]))


if __name__ == "__main__":
    sys.exit(main())
