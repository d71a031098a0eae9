"""Measure what speculation gains, on texts that are given: decode speed with it and without it.

    python tests/benchmarks/speculation.py -m synthetic:MiniCPM-S-1B --quant q4

A synthetic model's own text is noise. So the sampler does its work as always, but then the next
token of a given text is taken. There are three cases: a program and then its edited copy; an
article and then a summary that quotes it; a tale, which hardly repeats itself. The first part of a
case is the prompt, the second is decoded. Runs alternate, and medians count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hybrid import Engine, GenerationStats, Sampler, SamplingParams, Session, active_isa, load
from hybrid.bench import spread
from hybrid.engine.answer import Answer, AnswerRequest
from hybrid.engine.generation import Generation
from hybrid.engine.options import AnswerLimits
from hybrid.kernels import PREFILL_CHUNK
from hybrid.text.sampling import Floats
from hybrid.text.token_rules import TokenRules

ROOT = Path(__file__).parents[2]
TEXTS = ROOT.parent / "shared" / "data" / "text"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "-m",
        "--model",
        default="synthetic:MiniCPM-S-1B",
        help="model (default: synthetic:MiniCPM-S-1B)",
    )
    add("--quant", choices=("q4", "q8", "bf16"), default="q4", help="weight format (default: q4)")
    add("-t", "--threads", type=int, help="number of threads (default: one per core)")
    add(
        "--tokenizer",
        default="stories",
        help="model whose vocabulary splits the texts; it may not be larger (default: stories)",
    )
    add("--code", type=Path, default=ROOT / "hybrid/engine/generation.py", help="the program")
    add("--article", type=Path, default=TEXTS / "wikitext2_valid.txt", help="the article")
    add("--tale", type=Path, default=TEXTS / "fairytales.txt", help="the tale")
    add("-p", "--prompt", type=int, default=1000, help="most tokens of a prompt (default: 1000)")
    add("-n", "--tokens", type=int, default=256, help="tokens decoded in each run (default: 256)")
    add("--runs", type=int, default=5, help="pairs of runs of each case (default: 5)")
    return parser.parse_args()


class Case(NamedTuple):
    """Token ids: what is read, and what is then said."""

    prompt: list[int]
    said: list[int]


class GivenText(Sampler):
    """Samples, and then returns the next token of a text instead."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(SamplingParams(seed=1))
        self._ids = iter(ids)

    def sample(self, logits: Floats, *others: Any) -> int:
        super().sample(logits, *others)
        return next(self._ids)


def edited(code: str) -> str:
    """Return a program with a name renamed that occurs about five times, and some lines changed."""
    names = re.findall(r"\b[a-z_]{6,}\b", code)
    name = min(sorted(set(names)), key=lambda name: abs(names.count(name) - 5))
    lines = re.sub(rf"\b{name}\b", f"new_{name}", code).splitlines(keepends=True)
    for i in range(9, len(lines), 23):
        lines[i] = "    # This line is new; what stood here is gone.\n"
    return "".join(lines)


def summary(article: str) -> str:
    """Return a summary that quotes one sentence in three."""
    quoted = [s.strip() for s in re.split(r"(?<=[.?!])\s", article) if len(s) > 40][::3]
    links = ("The text begins like this", "It then tells us", "A later part adds", "It also says")
    return " ".join(
        f'{links[min(i, 1 + i % 3)]}: "{sentence}"' for i, sentence in enumerate(quoted)
    )


def read_cases(args: argparse.Namespace) -> dict[str, Case]:
    """Return the cases by name. Where a text is missing, this repository's own takes its place."""
    n, n_prompt = args.tokens, args.prompt
    article = args.article if args.article.exists() else ROOT / "docs" / "quality.md"
    tale = args.tale if args.tale.exists() else ROOT / "DEVELOPERS.md"
    with load(args.tokenizer, threads=1) as engine:
        tokenizer = engine.tokenizer

        def opening(path: Path) -> str:
            text = path.read_text(encoding="utf-8")
            return tokenizer.decode(tokenizer.encode(text[: 20 * n_prompt])[:n_prompt])

        code, news = opening(args.code), opening(article)
        told = tokenizer.encode(tale.read_text(encoding="utf-8")[: 20 * (n_prompt + n)])
        return {
            "edited program": Case(tokenizer.encode(code), tokenizer.encode(edited(code))[:n]),
            "summary": Case(tokenizer.encode(news), tokenizer.encode(summary(news))[:n]),
            "tale": Case(told[:n_prompt], told[n_prompt : n_prompt + n]),
        }


def run(engine: Engine, session: Session, case: Case, *, speculates: bool) -> GenerationStats:
    """Decode what is said. The last part of the prompt is prefilled again, as a chat's would be."""
    session.truncate(max(min(session.position, len(case.prompt) - PREFILL_CHUNK), 0))
    limits = AnswerLimits(len(case.said), (), TokenRules())
    request = AnswerRequest(case.prompt, limits, None, speculates)
    answer = Answer(engine.tokenizer, GivenText(case.said), request, ())
    list(Generation(session, answer, lambda stats: None, owns_session=False))
    assert answer.tokens == case.said
    return answer.stats


def measure(engine: Engine, name: str, case: Case, n_runs: int) -> dict[str, float]:
    """Measure a case in alternating runs, and print it."""
    tps: dict[bool, list[float]] = {False: [], True: []}
    with engine.open_session() as session:
        session.prefill(case.prompt)
        for i in range(n_runs):
            for speculates in (i % 2 == 1, i % 2 == 0):
                stats = run(engine, session, case, speculates=speculates)
                tps[speculates].append(stats.decode_tps)
                if speculates:
                    last = stats
    ratios = [a / b for a, b in zip(tps[True], tps[False], strict=True)]
    accepted = last.accepted_tokens / last.drafted_tokens if last.drafted_tokens else 0.0
    a_pass = 1 + last.accepted_tokens / last.decode_steps
    print(
        f"{name:16}{len(case.prompt):>7}{spread(tps[False]):>26}{spread(tps[True]):>26}"
        f"{statistics.median(ratios):>7.2f}{min(ratios):>7.2f}{accepted:>10.0%}{a_pass:>8.2f}"
    )
    return {
        "plain_tps": round(statistics.median(tps[False]), 2),
        "tps": round(statistics.median(tps[True]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "least_ratio": round(min(ratios), 3),
        "accepted": round(accepted, 3),
        "tokens_a_pass": round(a_pass, 2),
    }


def main() -> int:
    args = parse_arguments()
    cases = read_cases(args)
    with load(args.model, quant=args.quant, threads=args.threads) as engine:
        engine.wait_for_weights()
        streams = [engine.measure_stream_gbs()]
        print(
            f"{'':16}{'prompt':>7}{'plain [min - max]':>26}{'speculating tok/s':>26}{'ratio':>7}"
            f"{'least':>7}{'accepted':>10}{'a pass':>8}"
        )
        found = {name: measure(engine, name, case, args.runs) for name, case in cases.items()}
        streams.append(engine.measure_stream_gbs())
    print(f"memory streams {min(streams):.1f} to {max(streams):.1f} GB/s; {active_isa()}")
    summary_of = {"model": args.model, "quant": args.quant, "isa": active_isa()}
    print(json.dumps(summary_of | {"stream_gbs": round(max(streams), 1), "cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
