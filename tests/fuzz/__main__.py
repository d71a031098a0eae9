"""python -m tests.fuzz --target gguf --seconds 600: damage files of a format and open them.

`--first N --inputs 1` runs input N again. What is found lies in the folder that `--keep` names.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does it

from fuzz.runner import fuzz
from fuzz.seeds import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--inputs", type=int, help="end after so many inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    began = time.monotonic()
    outcome = fuzz(
        options.target,
        options.seconds,
        n_inputs=options.inputs,
        first=options.first,
        keep=options.keep,
    )
    for found in outcome.findings:
        print(f"{found.target} {found.number}: {found.place}: {found.problem}\n{found.details}")
    ends = ", ".join(f"{name or 'used'} {n}" for name, n in outcome.refused.most_common())
    print(
        f"{options.target}: {outcome.n_inputs} inputs in {time.monotonic() - began:.0f} s: {ends}; "
        f"at most {outcome.growth / 2**20:.0f} MB and {outcome.seconds:.2f} s; "
        f"{len(outcome.findings)} findings"
    )
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
