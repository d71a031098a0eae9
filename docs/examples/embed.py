"""Use hybrid inside another program: load a model, stream an answer, and print its statistics.

python docs/examples/embed.py "The little robot"
"""

from __future__ import annotations

import sys

import hybrid


def tell(prompt: str) -> None:
    with hybrid.load("stories", threads=2, quant="q8") as engine:
        generation = engine.generate(prompt, max_tokens=120, temperature=0.7)
        print(prompt, end="")
        for piece in generation:
            print(piece, end="", flush=True)
        stats = generation.stats
        print(
            f"\n\n{stats.generated_tokens} tokens at {stats.decode_tps:.0f} tok/s, "
            f"{stats.active_fraction:.1%} of neurons active, ended by: {generation.finish_reason}"
        )


def main() -> int:
    try:
        tell(sys.argv[1] if len(sys.argv) > 1 else "Once upon a time")
    except hybrid.HybridError as error:
        print(f"cannot tell a story: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
