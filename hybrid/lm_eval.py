"""Run lm-evaluation-harness with hybrid as one of its models.

    python -m hybrid.lm_eval --model hybrid --model_args pretrained=stories,quant=q8 --tasks piqa

The command and its options are the harness's own (`lm_eval`, https://github.com/EleutherAI/
lm-evaluation-harness). --model_args takes `pretrained`, which is what -m is for the other commands,
and the options of `hybrid.load`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hybrid import HybridError, InvalidOption
from hybrid.cli.command_line import printable
from predictors.interrupts import INTERRUPTED, raising_interrupts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the harness. Errors of hybrid become one line. Returns the exit code."""
    before = sys.argv
    try:
        # Registers the model, or says that the harness is not installed.
        import hybrid.evaluation.harness  # noqa: F401, I001
        from lm_eval.__main__ import cli_evaluate

        if arguments is not None:  # the harness reads those of the process only
            sys.argv = ["hybrid.lm_eval", *arguments]
        with raising_interrupts():
            cli_evaluate()
    except HybridError as error:
        print(f"hybrid.lm_eval: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, InvalidOption) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
