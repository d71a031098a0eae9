"""The `hybrid` command: `hybrid COMMAND`, or `python -m hybrid COMMAND`.

Without a command it lists the commands.
"""

from __future__ import annotations

import importlib
import sys

from hybrid import __version__
from predictors import interrupts

COMMANDS = {
    "run": "generate text: one answer, a chat, or a text that you and the model write together",
    "serve": "serve a model over HTTP: OpenAI's API, and a chat page for the browser",
    "selfcheck": "check that a model computes correct results on this machine",
    "inspect": "say what a model is, and whether and how it runs on this machine",
    "setup": "prepare a model once, so that it runs faster on this machine",
    "plan": "decide which part of a model goes on the GPU, and predict the speed",
    "bench": "measure how fast a model loads, prefills and decodes on this machine",
    "export": "write a model in the format of transformers, llama.cpp or PowerInfer",
    "eval": "measure a model's perplexity, or its accuracy on multiple-choice questions",
}
OTHERS = {
    "hybrid.lm_eval": "run lm-evaluation-harness with hybrid as one of its models",
    "profiler.record": "record which neurons fire",
    "profiler.report": "show a recording as a table and plots",
    "profiler.sparsity": "measure the share of inactive neurons on a text",
    "predictors.train": "train a predictor on a recorded trace",
}


def usage() -> str:
    lines = [
        f"hybrid {__version__} runs ReLU-sparse language models fast on ordinary PCs.",
        "",
        "usage: hybrid COMMAND [OPTIONS]        (or: python -m hybrid.COMMAND [OPTIONS])",
        "",
        *(f"  {name:10} {what}" for name, what in COMMANDS.items()),
        "",
        "Run `hybrid COMMAND --help` for the options of a command. Further tools:",
        "",
        *(f"  python -m {name:17} {what}" for name, what in OTHERS.items()),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names. Returns the exit code."""
    if arguments is None:  # this process is the command
        interrupts.end_on_interrupt()
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if given[0] in ("-V", "--version"):
        print(f"hybrid {__version__}")
        return 0
    if given[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"hybrid: unknown command {given[0]!r}; expected one of {known}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"hybrid.{given[0]}")
    return int(command.main(given[1:]))


if __name__ == "__main__":
    sys.exit(main())
