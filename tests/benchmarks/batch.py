"""Measure decode of several sequences at once, beside llama.cpp's parallel decode at equal bits.

    python tests/benchmarks/batch.py -m synthetic:MiniCPM-S-1B --quant q4 -t 2
    python tests/benchmarks/batch.py -m MODEL --predictor auto --alone

hybrid runs the steps of its batching loop: passes, sampling on all threads, detokenizing. A
synthetic model's text is noise. So both engines sample as always, and then each sequence takes the
next of random ids of its own. llama.cpp decodes one token of each sequence in one llama_decode, and
then samples with its usual chain (top-k 40, top-p 0.95, temperature 0.8) on one thread. It reads
random weights in the same shape, and computes all of them.

Each engine has its own process, and only one works at a time. Runs of all sizes and of both engines
alternate, and medians count. Ratios are those of the same round. GB are 1e9 bytes. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from compare_llama_cpp import LlamaWorker, Process, dense_file, ratio, share_of_stream
from speculation import GivenText

from hybrid import Engine, active_isa, load
from hybrid.bench import spread
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.answer import Answer, AnswerRequest
from hybrid.engine.batch.steps import Steps
from hybrid.engine.batch.stream import Stream
from hybrid.engine.options import AnswerLimits
from hybrid.evaluation.speed import SHORT_CONTEXT
from hybrid.hub.catalog import resolve
from hybrid.kernels import Format
from hybrid.text.token_rules import TokenRules

Rounds = list[dict[str, float]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "-m",
        "--model",
        default="synthetic:MiniCPM-S-1B",
        help="model that gives the shape and hybrid's weights (default: synthetic:MiniCPM-S-1B)",
    )
    add("--quant", choices=("q4", "q8", "bf16"), default="q4", help="weight format (default: q4)")
    add("-t", "--threads", type=int, default=2, help="threads of each engine (default: 2)")
    add("-n", "--tokens", type=int, default=64, help="tokens of each sequence (default: 64)")
    add(
        "--sequences",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="how many at once; the first one is what ratios refer to (default: 1 2 4 8)",
    )
    add("--runs", type=int, default=5, help="rounds that count (default: 5)")
    add("--predictor", default="exact", help="predictor: auto, or a file (default: exact, none)")
    add("--recall", type=float, default=0.99, help="recall of the predictor (default: 0.99)")
    add("--preview-head", action="store_true", help="preview the head (default: off)")
    add("--alone", action="store_true", help="measure hybrid only")
    add("--folder", type=Path, help="folder to keep the GGUF file in (default: a temporary one)")
    return parser.parse_args()


def random_ids(n_sequences: int, n: int, vocab_size: int) -> list[list[int]]:
    """Return ids of each sequence; those of the first ones do not depend on how many there are."""
    return [
        np.random.default_rng(i).integers(0, vocab_size, n).tolist() for i in range(n_sequences)
    ]


class HybridWorker:
    """hybrid's part; `decode` is its task."""

    def __init__(self, args: argparse.Namespace, gguf_path: Path | None) -> None:
        known = ("exact", "auto", "own")
        self.engine: Engine = load(
            args.model,
            quant=args.quant,
            threads=args.threads,
            predictor=args.predictor if args.predictor in known else Path(args.predictor),
            recall=args.recall,
            preview_head=args.preview_head,
        )
        self.engine.wait_for_weights()
        self.n = args.tokens
        self.about = f"hybrid, {active_isa()}, {args.threads} threads"
        if self.engine.prediction is not None:
            self.about += f", predicted, {self.engine.prediction.summary}"
        self.about += ", head previewed" * self.engine.previews_head

    def decode(self, n_sequences: int) -> dict[str, float]:
        engine, config = self.engine, self.engine.config
        steps = Steps(engine, token_bytes=0, cache_bytes=0)
        n_ids = SHORT_CONTEXT + self.n + n_sequences  # the first ones begin some passes earlier
        for ids in random_ids(n_sequences, n_ids, config.vocab_size):
            steps.admit(Stream(self.answer(ids)))
        while not all(stream.is_decoding for stream in steps.streams):
            steps.step()
        steps._batch.reset_counts()
        n_before = sum(len(stream.answer.tokens) for stream in steps.streams)
        started = time.perf_counter()
        for _ in range(self.n):
            steps.step()
        seconds = time.perf_counter() - started
        n_tokens = sum(len(stream.answer.tokens) for stream in steps.streams) - n_before
        assert n_tokens == n_sequences * self.n
        result = {
            "tps": n_tokens / seconds,
            "bytes": sum(steps._batch.decode_bytes.values()) / n_tokens,
            "active": sum(steps._batch.active_counts)
            / (n_tokens * config.n_layers * config.n_neurons),
        }
        steps.close()
        return result

    def answer(self, ids: list[int]) -> Answer:
        request = AnswerRequest(ids[:SHORT_CONTEXT], AnswerLimits(None, (), TokenRules()), None)
        return Answer(self.engine.tokenizer, GivenText(ids[SHORT_CONTEXT:]), request, ())

    def stream(self) -> dict[str, float]:
        return {"gbs": self.engine.measure_stream_gbs()}


class ParallelLlamaWorker(LlamaWorker):
    """llama.cpp with several sequences in one context; `decode_many` is its task."""

    def __init__(self, args: argparse.Namespace, gguf_path: Path) -> None:
        super().__init__(args, gguf_path)
        api = self.api
        self.batch = api.llama_batch_init(SHORT_CONTEXT + max(args.sequences), 0, 1)
        self.chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for sampler in (
            api.llama_sampler_init_top_k(40),
            api.llama_sampler_init_top_p(0.95, 1),
            api.llama_sampler_init_temp(0.8),
            api.llama_sampler_init_dist(1),
        ):
            api.llama_sampler_chain_add(self.chain, sampler)

    def choose_context(self, context: Any, args: argparse.Namespace) -> None:
        context.n_seq_max = max(args.sequences)
        context.n_ctx = context.n_seq_max * (SHORT_CONTEXT + args.tokens + 256)
        context.n_batch = context.n_ubatch = 512

    def decode_many(self, n_sequences: int) -> dict[str, float]:
        self.reset()
        sequences = random_ids(n_sequences, SHORT_CONTEXT + self.n, 1000)
        for i, ids in enumerate(sequences):
            self.run([(id, at, i) for at, id in enumerate(ids[:SHORT_CONTEXT])])
        started = time.perf_counter()
        for at in range(SHORT_CONTEXT, SHORT_CONTEXT + self.n):
            self.run([(ids[at], at, i) for i, ids in enumerate(sequences)])
            for i in range(n_sequences):
                self.api.llama_sampler_sample(self.chain, self.context, i)
        return {"tps": n_sequences * self.n / (time.perf_counter() - started)}

    def run(self, tokens: list[tuple[int, int, int]]) -> None:
        """Decode (token, position, sequence) and compute the logits of all of them."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.api.llama_synchronize(self.context)


def measure(args: argparse.Namespace, path: Path | None) -> dict[str, Any]:
    """Measure in alternating rounds, and print the tables."""
    ours, theirs = Process(HybridWorker, args, path), None
    print(ours.about)
    if path is not None:
        theirs = Process(ParallelLlamaWorker, args, path)
        print(theirs.about)
    found: dict[int, Rounds] = {n: [] for n in args.sequences}
    other: dict[int, Rounds] = {n: [] for n in args.sequences}
    streams = []
    for run in range(-1, args.runs):
        results = {n: ours.measure("decode", n) for n in args.sequences}
        others = {n: theirs.measure("decode_many", n) for n in args.sequences} if theirs else {}
        streams.append(ours.ask("stream")["gbs"])
        for n in args.sequences if run >= 0 else ():  # pages and caches are cold in the first round
            found[n].append(results[n])
            if theirs:
                other[n].append(others[n])
    print(f"memory streams {max(streams):.1f} GB/s ({min(streams):.1f} to {max(streams):.1f})\n")
    print(
        f"{'sequences':12}{'tok/s [min - max]':>26}{'over one':>10}{'MB/token':>10}{'GB/s':>7}"
        f"{'of bandwidth':>14}{'active':>8}"
    )
    rows = {n: row(n, found, streams) for n in args.sequences}
    if theirs:
        print(f"\n{'llama.cpp':12}{'tok/s [min - max]':>26}{'over one':>10}{'hybrid over it':>16}")
        for n in args.sequences:
            rows[n] |= other_row(n, found, other)
    return {
        "model": args.model,
        "quant": args.quant,
        "threads": args.threads,
        "hybrid": ours.about,
        "llama_cpp": theirs.about if theirs else None,
        "stream_gbs": round(max(streams), 2),
        "sequences": rows,
    }


def rates(rounds: Rounds) -> list[float]:
    return [result["tps"] for result in rounds]


def row(n: int, found: dict[int, Rounds], streams: list[float]) -> dict[str, float]:
    """Print hybrid's row of `n` sequences, and return it."""
    tps, one = rates(found[n]), rates(next(iter(found.values())))
    n_bytes = statistics.median(result["bytes"] for result in found[n])
    active = statistics.median(result["active"] for result in found[n])
    over_one, share = ratio(tps, one)[0], share_of_stream(tps, n_bytes, streams)
    gbs = n_bytes * statistics.median(tps) / 1e9
    print(
        f"{n:<12}{spread(tps):>26}{over_one:>10.2f}{n_bytes / 1e6:>10.1f}{gbs:>7.1f}{share:>14.0%}"
        f"{active:>8.1%}"
    )
    return {
        "tps": round(statistics.median(tps), 2),
        "over_one": round(over_one, 3),
        "bytes_per_token": round(n_bytes),
        "mbu": round(share, 4),
        "active": round(active, 4),
    }


def other_row(n: int, found: dict[int, Rounds], other: dict[int, Rounds]) -> dict[str, float]:
    """Print llama.cpp's row of `n` sequences, and return it."""
    tps, one = rates(other[n]), rates(next(iter(other.values())))
    over_one, over_it = ratio(tps, one)[0], ratio(rates(found[n]), tps)[0]
    print(f"{n:<12}{spread(tps):>26}{over_one:>10.2f}{over_it:>16.2f}")
    return {
        "llama_tps": round(statistics.median(tps), 2),
        "llama_over_one": round(over_one, 3),
        "over_llama": round(over_it, 3),
    }


def main() -> int:
    args = parse_arguments()
    if args.alone:
        print(json.dumps(measure(args, None)))
        return 0
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print("error: llama-cpp-python is not installed; use --alone", file=sys.stderr)
        return 1
    config = open_checkpoint(resolve(args.model), Format[args.quant]).config
    with tempfile.TemporaryDirectory() as temporary:
        path = dense_file(args.folder or Path(temporary), config, args.quant)
        print(json.dumps(measure(args, path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
