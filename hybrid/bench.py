"""Measure how fast a model loads, prefills and decodes, relative to the memory bandwidth.

    python -m hybrid.bench -m MiniCPM-S-1B --quant q4
    python -m hybrid.bench -m synthetic:MiniCPM-S-1B        # random weights of the same shape
    python -m hybrid.bench -m MiniCPM-S-1B --stages         # where a token's time goes

All runs decode the same random token ids, so they do the same work. The native program counts the
bytes that it reads. The bandwidth is measured with the same threads before, between and after the
runs. The share of a run refers to the measurements directly before and after it. One GB is 1e9
bytes. The last line is one JSON object, in which shares are fractions, not percentages.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from hybrid import Engine, InvalidOption, Sampler, Session, active_isa
from hybrid.cli.command_line import (
    ArgumentParser,
    add_device_options,
    add_model_options,
    add_predictor_options,
    open_engine,
    printable,
    run_command,
)
from hybrid.placement.disturbance import StolenTime

PREFILL_LENGTHS = (128, 512)
SHORT_CONTEXT = 16


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Repeated decoding of the same tokens from the same position."""

    context: int  # tokens before the first decoded one
    tps: list[float]  # tokens per second of each run
    bytes_per_token: float
    active_fraction: float
    predicted_fraction: float  # share of the gates that is computed
    shortlisted: float  # rows of a previewed head that are computed in full, per token

    @property
    def median_tps(self) -> float:
        return statistics.median(self.tps)

    @property
    def gbs(self) -> float:
        return self.bytes_per_token * self.median_tps / 1e9

    def share_of(self, streams: list[float]) -> float:
        """Return the median share of the bandwidth over all runs.

        A run is compared with the better of the two measurements before and after it. The bandwidth
        of a machine may change while the program runs.
        """
        around = [max(pair) for pair in itertools.pairwise(streams)]
        return statistics.median(
            self.bytes_per_token * tps / 1e9 / level
            for tps, level in zip(self.tps, around, strict=True)
        )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hybrid.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_options(parser)
    add_predictor_options(parser)
    add_device_options(parser)
    add(
        "--profile",
        default="auto",
        metavar="{auto,none,FILE}",
        help="activation profile that sorts the neurons (default: auto)",
    )
    add("-n", "--tokens", type=int, default=128, help="tokens to decode in each run (default: 128)")
    add("--runs", type=int, default=5, help="number of runs; medians are reported (default: 5)")
    add(
        "--long-context",
        type=int,
        default=1024,
        help="tokens in the context of the long decode (default: 1024)",
    )
    add("--seed", type=int, default=0, help="seed of the random token ids (default: 0)")
    add("--stages", action="store_true", help="also measure each stage of a decoded token")
    add("--mlock", action="store_true", help="lock the weights in memory")
    add(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        help="map the weights from disk (default: only if they do not fit in memory)",
    )
    args = parser.parse_args(arguments)
    for name in ("tokens", "runs", "long_context"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more")
    if args.seed < 0:
        parser.error("--seed: expected 0 or more")
    return args


def measure_prefill(engine: Engine, ids: np.ndarray, n_runs: int) -> list[float]:
    """Return the tokens per second of each run."""
    rates = []
    with engine.open_session() as session:
        for _ in range(n_runs):
            session.reset()
            started = time.perf_counter()
            session.prefill(ids)
            rates.append(ids.size / (time.perf_counter() - started))
    return rates


class DecodeBench:
    """Decodes the same tokens in every run, each time from the end of the same context."""

    def __init__(
        self,
        engine: Engine,
        context: np.ndarray,
        ids: np.ndarray,
        *,
        dense: bool = False,
        timed: bool = False,
    ) -> None:
        self.engine, self.ids, self.context = engine, ids, context.size
        self.session: Session = engine.open_session(dense=dense, timed=timed)
        self.session.prefill(context)
        self.tps: list[float] = []
        self.n_bytes = self.n_active = self.n_gates = self.n_shortlisted = 0
        self.dense = dense
        for token in ids[:8].tolist():  # warm-up: the first tokens meet cold caches and pages
            self.session.decode(token)

    def run(self) -> None:
        session = self.session
        session.truncate(self.context)
        session.reset_counts()
        tokens = self.ids.tolist()
        started = time.perf_counter()
        for token in tokens:
            session.decode(token)
        self.tps.append(len(tokens) / (time.perf_counter() - started))
        self.n_bytes = sum(session.decode_bytes.values())
        self.n_active = sum(session.active_counts)
        self.n_gates = sum(session.predicted_counts)
        self.n_shortlisted = session.shortlisted_count

    def result(self) -> DecodeResult:
        n, config = self.ids.size, self.engine.config
        n_neurons = n * config.n_layers * config.n_neurons
        expected = self.engine.expected_decode_bytes(
            n_tokens=n,
            first_position=self.context,
            n_active=n_neurons if self.dense else self.n_active,
            n_gates=None if self.dense else self.n_gates,
            n_shortlisted=self.n_shortlisted,
        )
        if not self.engine.plan.uses_gpu:  # bytes that a GPU reads are not counted
            assert self.n_bytes == expected, f"{self.n_bytes} bytes counted, {expected} expected"
        self.session.close()
        return DecodeResult(
            self.context,
            self.tps,
            self.n_bytes / n,
            self.n_active / n_neurons,
            self.n_gates / n_neurons,
            self.n_shortlisted / n,
        )


def bench(args: argparse.Namespace) -> int:
    with open_engine(args) as (engine, _):
        report(args, engine)
    return 0


def report(args: argparse.Namespace, engine: Engine) -> None:
    started = time.perf_counter()
    engine.wait_for_weights()
    copying_s = time.perf_counter() - started
    for notice in engine.notices:
        print(f"note: {printable(notice)}")
    n_context, n = engine.n_context, args.tokens
    if n_context < SHORT_CONTEXT + n:
        raise InvalidOption(
            f"--tokens {n}: expected at most {n_context - SHORT_CONTEXT}, which is the context "
            f"size minus {SHORT_CONTEXT}"
        )
    ids = np.random.default_rng(args.seed).integers(0, engine.config.vocab_size, n_context)
    stats = engine.stats
    kept = ("mapped" if stats.is_mapped else "in memory") + (", locked" if stats.is_locked else "")
    print(f"model      {args.model}, {args.quant}, {stats.weight_bytes / 1e6:.0f} MB {kept}")
    stolen = StolenTime()
    streams = [engine.measure_stream_gbs()]

    prefill_tps = {}
    lengths = [length for length in PREFILL_LENGTHS if length <= n_context]
    rows = []
    for length in lengths:
        rates = measure_prefill(engine, ids[:length], min(args.runs, 3))
        prefill_tps[str(length)] = round(statistics.median(rates), 2)
        rows.append([f"prefill {length} tokens", spread(rates)])

    long_context = min(args.long_context, n_context - n)
    runs = [
        (f"decode, context {SHORT_CONTEXT}", SHORT_CONTEXT, False),
        (f"decode, context {long_context}", long_context, False),
        ("decode, all neurons", SHORT_CONTEXT, True),
    ]

    def bench_of(context: int, *, dense: bool = False, timed: bool = False) -> DecodeBench:
        decoded = ids[context : context + n]
        return DecodeBench(engine, ids[:context], decoded, dense=dense, timed=timed)

    staged: dict[str, DecodeBench] = {}
    if engine.plan.uses_gpu:  # one session at a time: the budget may not have room for two
        results = []
        for _, context, is_dense in runs:
            decode = bench_of(context, dense=is_dense)
            for _ in range(args.runs):
                decode.run()
                streams.append(engine.measure_stream_gbs())
            results.append(decode.result())
    else:
        benches = [bench_of(context, dense=is_dense) for _, context, is_dense in runs]
        if args.stages:
            staged["stages"] = bench_of(SHORT_CONTEXT, timed=True)
            staged["long_stages"] = bench_of(long_context, timed=True)
        for _ in range(args.runs):  # alternate, because the machine's speed drifts
            for decode in (*benches, *staged.values()):
                decode.run()
            streams.append(engine.measure_stream_gbs())
        results = [decode.result() for decode in benches]
    stream, stolen_share = max(streams), stolen.share(engine.n_threads)
    for (name, _, _), result in zip(runs, results, strict=True):
        row = [name, spread(result.tps)]
        if not engine.plan.uses_gpu:
            share = "–" if engine.fits_in_cache else f"{result.share_of(streams):.0%}"
            row += [f"{result.bytes_per_token / 1e6:.1f}", f"{result.gbs:.1f}", share]
        rows.append(row)

    short, _, dense = results
    rss = psutil.Process().memory_info().rss
    print(
        f"machine    {engine.n_threads} threads, {active_isa()}; memory streams {stream:.1f} GB/s "
        f"({min(streams):.1f} to {stream:.1f} in {len(streams)} measurements)"
    )
    if stolen_share > 0.01:
        print(
            f"           a hypervisor took {stolen_share:.1%} of the threads' time, so speeds are "
            "too low by about as much"
        )
    copying = (
        f", {copying_s:.2f} s more until the weights were in memory" if copying_s > 0.01 else ""
    )
    print(f"load       {stats.load_s:.2f} s{copying}; resident {rss / 1e6:.0f} MB")
    if engine.plan.uses_gpu:
        print(f"device     {engine.device_name}; {engine.plan.summary()}")
    if (prediction := engine.prediction) is not None:
        print(
            f"predictor  recall {prediction.recall:g}: {short.predicted_fraction:.1%} of the gates "
            f"computed; {prediction.n_predicted_layers} of {engine.config.n_layers} layers, "
            f"{prediction.bytes_per_token / 1e6:.1f} MB/token for the predictor; it may miss "
            "neurons: measure what that costs with hybrid.eval perplexity --predictor"
        )
    if engine.previews_head:
        in_full = short.shortlisted / engine.config.vocab_size
        print(f"head       previewed in 2 bits; the likeliest {in_full:.1%} of its rows in full")
    print(
        f"active     {short.active_fraction:.2%} of FFN neurons; sparse over dense "
        f"{short.median_tps / dense.median_tps:.2f}x\n"
    )
    print(f"{'':28}{'tok/s [min - max]':>26}{'MB/token':>10}{'GB/s':>7}{'of bandwidth':>14}")
    for name, *cells in rows:
        widths = (26, 10, 7, 14)
        print(f"{name:28}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=False)))
    if engine.fits_in_cache:
        print(
            "the weights are under four times the last-level cache: bandwidth does not limit them"
        )
    has_mbu = not (engine.fits_in_cache or engine.plan.uses_gpu)
    mbu = round(short.share_of(streams), 4) if has_mbu else None
    summary = {
        "model": args.model,
        "quant": args.quant,
        "threads": engine.n_threads,
        "isa": active_isa(),
        "synthetic": engine.is_synthetic,
        "mmap": stats.is_mapped,
        "mlock": stats.is_locked,
        "load_s": round(stats.load_s, 3),
        "copying_s": round(copying_s, 3),
        "prefill_tps": prefill_tps,
        "decode_tps": round(short.median_tps, 2),
        "device": engine.device_name,
        "vram_bytes": engine.plan.vram_bytes,
        "decode_gbs": round(short.gbs, 2),
        "stream_gbs": round(stream, 2),
        "decode_mbu": mbu,
        "stolen_fraction": round(stolen_share, 4),
        "bytes_per_token": round(short.bytes_per_token),
        "active_fraction": round(short.active_fraction, 5),
        "predictor": None if prediction is None else str(prediction.path),
        "recall": None if prediction is None else prediction.recall,
        "predicted_fraction": round(short.predicted_fraction, 5),
        "shortlisted_rows": round(short.shortlisted, 1),
        "dense_decode_tps": round(dense.median_tps, 2),
        "rss_bytes": rss,
    }
    for name, decode in staged.items():
        summary[name] = stage_table(engine, decode, stream)
    print(json.dumps(summary))


def stage_table(engine: Engine, staged: DecodeBench, stream: float) -> dict[str, dict[str, float]]:
    """Print how long each stage of a token took in the last run, and return it by stage.

    `ms` is milliseconds per token. The stages add up to the token's time, because the threads' time
    in a stage is divided by the number of threads.
    """
    session, n = staged.session, staged.ids.size
    n_bytes = session.decode_bytes
    title = f"a token at context {staged.context}"
    print(f"\n{title:28}{'ms':>8}{'share':>8}{'MB':>10}{'GB/s':>7}{'of bandwidth':>14}")
    ms = {name: s * 1e3 / engine.n_threads / n for name, s in session.stage_seconds.items()}
    ms["sampling"] = sampling_ms(engine, session)
    stages = {}
    for name, time_ms in ms.items():
        if name == "predict" and engine.prediction is None:
            continue
        megabytes = n_bytes.get(name, 0) / n / 1e6
        gbs = megabytes / time_ms if time_ms else 0.0
        row = f"{name:28}{time_ms:>8.2f}{time_ms / sum(ms.values()):>8.1%}"
        if megabytes:
            share = "–" if engine.fits_in_cache else f"{gbs / stream:.0%}"
            row += f"{megabytes:>10.1f}{gbs:>7.1f}{share:>14}"
        print(row)
        stages[name] = {"ms": round(time_ms, 4), "bytes": round(megabytes * 1e6)}
    print(f"speed while stages are timed: {statistics.median(staged.tps):.1f} tok/s")
    return stages


def sampling_ms(engine: Engine, session: Session, n_runs: int = 50) -> float:
    """Return the median milliseconds to sample one token with the model's sampling parameters."""
    sampler = Sampler(engine.default_sampling)
    times = []
    for _ in range(n_runs):
        started = time.perf_counter()
        sampler.sample(session.logits)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def spread(rates: list[float]) -> str:
    """Format rates as "median [least - largest]"."""
    return f"{statistics.median(rates):.1f} [{min(rates):.1f} - {max(rates):.1f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("hybrid.bench", lambda: bench(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
