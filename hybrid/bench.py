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
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from hybrid import Engine, active_isa
from hybrid.cli.command_line import (
    ArgumentParser,
    add_device_options,
    add_kv_option,
    add_model_options,
    add_predictor_options,
    open_engine,
    printable,
    run_command,
)
from hybrid.evaluation.speed import Measurements, SpeedOptions, StageTimes, measure_speed


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hybrid.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_options(parser)
    add_kv_option(parser)
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
    stats = engine.stats
    kept = ("mapped" if stats.is_mapped else "in memory") + (", locked" if stats.is_locked else "")
    print(f"model      {args.model}, {engine.quant}, {stats.weight_bytes / 1e6:.0f} MB {kept}")
    options = SpeedOptions(args.tokens, args.runs, args.long_context, args.seed, args.stages)
    found = measure_speed(engine, options)
    print_table(engine, found, copying_s)
    for stages in found.stages.values():
        print_stages(engine, stages, found.stream)
    print(json.dumps(as_json(args, engine, found, copying_s)))


def print_table(engine: Engine, found: Measurements, copying_s: float) -> None:
    """Print the machine, how the model runs, and the speed of prefill and decode.

    `copying_s` passed until the weights were in memory, after the engine was loaded.
    """
    short, dense, streams = found.short, found.dense, found.streams
    print(
        f"machine    {engine.n_threads} threads, {active_isa()}; memory streams "
        f"{found.stream:.1f} GB/s ({min(streams):.1f} to {found.stream:.1f} in {len(streams)} "
        "measurements)"
    )
    if found.stolen_fraction > 0.01:
        print(
            f"           a hypervisor took {found.stolen_fraction:.1%} of the threads' time, so "
            "speeds are too low by about as much"
        )
    copying = f", {copying_s:.2f} s more until the weights were in memory"
    print(
        f"load       {engine.stats.load_s:.2f} s{copying if copying_s > 0.01 else ''}; "
        f"resident {found.rss_bytes / 1e6:.0f} MB"
    )
    if engine.uses_gpu:
        print(f"device     {engine.device_name}; {engine.plan.summary()}")
    if (prediction := engine.prediction) is not None:
        print(
            f"predictor  {prediction.summary}: {short.predicted_fraction:.1%} of the gates "
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
    rows = [[f"prefill {n} tokens", spread(rates)] for n, rates in found.prefill_tps.items()]
    for name, result in (
        (f"decode, context {short.context}", short),
        (f"decode, context {found.long.context}", found.long),
        ("decode, all neurons", dense),
    ):
        row = [name, spread(result.tps)]
        if not engine.uses_gpu:
            share = "–" if engine.fits_in_cache else f"{result.share_of(streams):.0%}"
            row += [f"{result.bytes_per_token / 1e6:.1f}", f"{result.gbs:.1f}", share]
        rows.append(row)
    print(f"{'':28}{'tok/s [min - max]':>26}{'MB/token':>10}{'GB/s':>7}{'of bandwidth':>14}")
    for name, *cells in rows:
        widths = (26, 10, 7, 14)
        print(f"{name:28}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=False)))
    if engine.fits_in_cache:
        print(
            "the weights are under four times the last-level cache: bandwidth does not limit them"
        )


def print_stages(engine: Engine, stages: StageTimes, stream: float) -> None:
    """Print how long each stage of a token takes."""
    title = f"a token at context {stages.context}"
    print(f"\n{title:28}{'ms':>8}{'share':>8}{'MB':>10}{'GB/s':>7}{'of bandwidth':>14}")
    for name, ms in stages.ms.items():
        megabytes = stages.n_bytes[name] / 1e6
        gbs = megabytes / ms if ms else 0.0
        row = f"{name:28}{ms:>8.2f}{ms / sum(stages.ms.values()):>8.1%}"
        if megabytes:
            share = "–" if engine.fits_in_cache else f"{gbs / stream:.0%}"
            row += f"{megabytes:>10.1f}{gbs:>7.1f}{share:>14}"
        print(row)
    print(f"speed while stages are timed: {stages.median_tps:.1f} tok/s")


def as_json(
    args: argparse.Namespace, engine: Engine, found: Measurements, copying_s: float
) -> dict[str, Any]:
    stats, short, prediction = engine.stats, found.short, engine.prediction
    has_mbu = not (engine.fits_in_cache or engine.uses_gpu)
    summary = {
        "model": args.model,
        "quant": engine.quant,
        "kv": args.kv,
        "threads": engine.n_threads,
        "isa": active_isa(),
        "synthetic": engine.is_synthetic,
        "mmap": stats.is_mapped,
        "mlock": stats.is_locked,
        "load_s": round(stats.load_s, 3),
        "copying_s": round(copying_s, 3),
        "prefill_tps": {
            str(n): round(statistics.median(rates), 2) for n, rates in found.prefill_tps.items()
        },
        "decode_tps": round(short.median_tps, 2),
        "device": engine.device_name,
        "vram_bytes": engine.vram_bytes,
        "decode_gbs": round(short.gbs, 2),
        "stream_gbs": round(found.stream, 2),
        "decode_mbu": round(short.share_of(found.streams), 4) if has_mbu else None,
        "stolen_fraction": round(found.stolen_fraction, 4),
        "bytes_per_token": round(short.bytes_per_token),
        "active_fraction": round(short.active_fraction, 5),
        "predictor": None if prediction is None else str(prediction.path),
        "recall": None if prediction is None else prediction.recall,
        "predicted_fraction": round(short.predicted_fraction, 5),
        "shortlisted_rows": round(short.shortlisted, 1),
        "dense_decode_tps": round(found.dense.median_tps, 2),
        "rss_bytes": found.rss_bytes,
    }
    for name, stages in found.stages.items():
        summary[name] = {
            stage: {"ms": round(ms, 4), "bytes": round(stages.n_bytes[stage])}
            for stage, ms in stages.ms.items()
        }
    return summary


def spread(rates: list[float]) -> str:
    """Format rates as "median [least - largest]"."""
    return f"{statistics.median(rates):.1f} [{min(rates):.1f} - {max(rates):.1f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("hybrid.bench", lambda: bench(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
