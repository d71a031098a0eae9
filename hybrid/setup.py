"""Prepare a model once, so that it runs faster on this machine.

    python -m hybrid.setup -m MiniCPM-S-1B --quant q4

The command downloads the model and checks it. It records which neurons fire, on the files of --text
or on texts that the model writes itself. It packs the model with hot neurons first, and trains a
predictor, which needs torch. If there is a GPU, it plans which part of the model goes there.
Results are kept under HYBRID_HOME and are not made again. An interrupted setup continues where it
stopped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrid import Engine, HybridError, InvalidOption, Progress
from hybrid.bench import spread
from hybrid.checking import check_model
from hybrid.cli.command_line import (
    ArgumentParser,
    add_bos_option,
    add_kv_option,
    add_model_options,
    byte_size,
    load_options,
    open_engine,
    printable,
    run_command,
)
from hybrid.cli.progress_bar import progress_bar
from hybrid.engine.loading.planning import machine_here, plan_path, solve_for
from hybrid.engine.loading.prediction import predictor_path
from hybrid.hub.catalog import hybrid_home
from hybrid.notices import Notices
from hybrid.placement.profile import FILE_NAME, load_profile, profile_path
from predictors.errors import PredictorError
from predictors.file import load_predictor_file
from predictors.trace import load_trace
from predictors.train import INSTALL, Options, has_torch, summary, train
from profiler.corpus import PROMPTS, WRITTEN_TOKENS, Corpus, TextFile
from profiler.recorder import RecordingOptions, record
from profiler.statistics import compiled_sums

TRACE_BYTES = 2 << 30
MEASURED_TOKENS = 64
REPORT_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Paths:
    """The files that a setup makes, and the folder that it works in."""

    profile: Path
    predictor: Path
    work: Path

    @classmethod
    def of(cls, engine: Engine) -> Paths:
        home = hybrid_home()
        return cls(
            profile_path(home, engine.model_hash),
            predictor_path(home, engine.model_hash, engine.quant),
            home / "setup" / f"{engine.model_hash[:32]}-{engine.quant}",
        )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hybrid.setup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_bos_option(parser)
    add_kv_option(parser)
    add = parser.add_argument
    add(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files to record on (default: texts that the model writes itself)",
    )
    add("--separator", help="text between two documents of a file (default: none)")
    add("--max-tokens", type=int, help="maximum tokens to use of each text (default: all)")
    add(
        "--trace-budget",
        type=byte_size,
        default=TRACE_BYTES,
        help="maximum size of the trace (default: 2GiB)",
    )
    add("--no-predictor", action="store_true", help="do not train a predictor")
    add(
        "--vram-budget",
        dest="plan_budget",  # for the plan only: recording runs on the CPU, which observes all
        type=byte_size,
        metavar="SIZE",
        help="VRAM that hybrid may use, such as 1GiB; 0 means none (default: all that is free)",
    )
    add("--redo", action="store_true", help="make everything again, even if it is there already")
    args = parser.parse_args(arguments)
    if args.max_tokens is not None and args.max_tokens < 1:
        parser.error("--max-tokens: expected 1 or more")
    return args


def needs_profile(args: argparse.Namespace, engine: Engine, paths: Paths) -> bool:
    """Return whether the model must be recorded.

    A profile in the model's folder is enough, unless --text requests another one.
    """
    is_shipped = engine.neuron_orders is not None and not args.text
    return not paths.profile.is_file() and not is_shipped


def can_predict(args: argparse.Namespace, paths: Paths) -> bool:
    """Return whether the setup ends with a predictor. Training one needs torch."""
    return not args.no_predictor and (paths.predictor.is_file() or has_torch())


def run(args: argparse.Namespace) -> int:
    load_options(args)  # report a wrong value before a model is downloaded
    texts = [TextFile(path, args.separator) for path in args.text]
    for notice in (line for text in texts for line in text.notices):
        print(f"note: {printable(notice)}")
    corpora: list[Corpus] = [*texts]
    started = time.monotonic()
    with open_engine(args) as (engine, _):
        for notice in engine.notices:
            print(f"note: {printable(notice)}")
        if not engine.config.is_sparse:
            raise InvalidOption(
                f"{args.model}: its activation is {engine.config.activation}, which is never zero: "
                "there is nothing to skip, and nothing to set up"
            )
        paths = Paths.of(engine)
        if args.redo:
            for path in (paths.profile, paths.predictor):
                path.unlink(missing_ok=True)
            shutil.rmtree(paths.work, ignore_errors=True)
        if needs_profile(args, engine, paths):
            compiled_sums()  # report a missing package before any long work
        announce(args, engine, paths, corpora)
    check(args)
    with open_engine(args) as (engine, progress):
        if needs_profile(args, engine, paths):
            make_profile(args, engine, paths, corpora, progress)
    print("profile    done")
    if can_predict(args, paths):
        with open_engine(args) as (engine, progress):  # now packed with hot neurons first
            make_predictor(args, engine, paths, corpora, progress)
    elif not args.no_predictor:
        print(f"predictor  none: training needs torch: {INSTALL}")
    has_plan = make_plan(args)
    shutil.rmtree(paths.work, ignore_errors=True)
    report(args, paths, has_plan=has_plan)
    print(f"ready in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def announce(
    args: argparse.Namespace, engine: Engine, paths: Paths, corpora: Sequence[Corpus]
) -> None:
    """Print what will be done, and how much time and disk space it will take."""
    steps, seconds, n_bytes = [], 0.0, engine.stats.weight_bytes
    rates = measure_rates(engine)
    n_texts = sum(map(len, PROMPTS.values()))
    n_tokens = n_texts * min(WRITTEN_TOKENS, engine.n_context // 2)
    if corpora:  # a token has roughly four bytes
        n_tokens = sum(min(c.size // 4, args.max_tokens or c.size) for c in corpora)
    if not paths.profile.is_file():
        steps.append("profile")
        seconds += n_tokens / rates["prefill"]
        if not (corpora or engine.is_synthetic):
            seconds += n_tokens / rates["decode"]
    if can_predict(args, paths) and not paths.predictor.is_file():
        steps.append("predictor")
        config = engine.config
        work = config.n_layers * config.n_neurons * config.hidden_size * 1e-6
        seconds += n_tokens / rates["prefill"] + work  # `work` is training: measured per weight
        n_bytes += args.trace_budget
    if not steps:
        print("everything is there already; use --redo to make it again")
        return
    free = shutil.disk_usage(_existing(paths.work)).free
    print(
        f"to do      {', '.join(steps)}: about {seconds / 60:.0f} min, {n_bytes / 1e9:.1f} GB on "
        f"disk meanwhile ({free / 1e9:.0f} GB are free)"
    )
    if n_bytes > free:
        raise InvalidOption(
            f"{hybrid_home()}: {free / 1e9:.1f} GB are free, {n_bytes / 1e9:.1f} GB are needed; "
            "set HYBRID_HOME to a folder with more room, or lower --trace-budget"
        )


def measure_rates(engine: Engine) -> dict[str, float]:
    """Return the tokens per second of prefill and decode in a short run."""
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, MEASURED_TOKENS)
    with engine.open_session() as session:
        started = time.perf_counter()
        session.prefill(ids)
        between = time.perf_counter()
        for token in ids[:16].tolist():
            session.decode(token)
        ended = time.perf_counter()
    return {"prefill": ids.size / (between - started), "decode": 16 / (ended - between)}


def check(args: argparse.Namespace) -> None:
    with progress_bar() as progress:
        checks = check_model(
            args.model,
            quant=args.quant,
            kv=args.kv,
            threads=args.threads,
            activation=args.activation,
            offline=args.offline,
            progress=progress,
        )
        failed = [check for check in checks if check.verdict == "failed"]
    if failed:
        raise HybridError(
            f"{failed[0].name}: {failed[0].message} {failed[0].advice} "
            "(python -m hybrid.selfcheck shows all checks)"
        )
    print("selfcheck  done", flush=True)


def make_profile(
    args: argparse.Namespace,
    engine: Engine,
    paths: Paths,
    corpora: Sequence[Corpus],
    progress: Progress,
) -> None:
    folder = paths.work / "profile"
    if not (folder / FILE_NAME).is_file():
        options = RecordingOptions(model=args.model, max_tokens=args.max_tokens)
        record(engine, corpora, folder, options, progress)
    profile = load_profile(folder / FILE_NAME)
    try:
        paths.profile.parent.mkdir(parents=True, exist_ok=True)
        profile.save(paths.profile)
    except OSError as error:
        raise HybridError(f"{paths.profile}: cannot be written: {error.strerror}") from error


def make_predictor(
    args: argparse.Namespace,
    engine: Engine,
    paths: Paths,
    corpora: Sequence[Corpus],
    progress: Progress,
) -> None:
    if paths.predictor.is_file():
        print("predictor  done")
        return
    folder = paths.work / "trace"
    if not (folder / FILE_NAME).is_file():
        options = RecordingOptions(
            model=args.model, max_tokens=args.max_tokens, trace_bytes=args.trace_budget
        )
        texts = paths.work / "profile" / "texts"
        if texts.is_dir() and not folder.exists():  # reuse the texts written for the profile
            shutil.copytree(texts, folder / "texts")
        record(engine, corpora, folder, options, progress)
    try:
        file = train(load_trace(folder / "trace"), Options(), progress)
        paths.predictor.parent.mkdir(parents=True, exist_ok=True)
        file.save(paths.predictor)
    except PredictorError as error:
        raise HybridError(str(error)) from error
    except OSError as error:
        raise HybridError(f"{paths.predictor}: cannot be written: {error.strerror}") from error
    print("predictor  done")


def make_plan(args: argparse.Namespace) -> bool:
    """Solve for the plan of what goes on the GPU and save it. Return whether there is a plan.

    `hybrid.run` uses the saved plan automatically.
    """
    if args.kv != "fp16":  # a plan for fp16 is kept
        print(f"plan       all on the CPU: the GPU has no KV cache in {args.kv}")
        return False
    with open_engine(args) as (engine, _):
        spec = engine.spec
    path = plan_path(hybrid_home(), spec)
    path.unlink(missing_ok=True)
    notices = Notices()
    machine = machine_here(spec, hybrid_home(), notices)
    if machine.gpu is None or args.plan_budget == 0:
        why = "as requested" if machine.gpu is not None else "; ".join(notices)
        print(f"plan       all on the CPU: {printable(why)}")
        return False
    notices = Notices()
    plan = solve_for(machine, spec, args.plan_budget, notices)
    for notice in notices:
        print(f"note: {printable(notice)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.save(path)
    except OSError as error:
        raise HybridError(f"{path}: cannot be written: {error.strerror}") from error
    print(f"plan       {printable(plan.summary().removeprefix('plan: '))}, {machine.gpu.name}")
    return True


def report(args: argparse.Namespace, paths: Paths, *, has_plan: bool) -> None:
    """Print what was made, and how fast decoding is now.

    Memory bandwidth changes by the second, and the packed file is still being written to disk. So
    the alternatives are measured one after the other in several rounds, and medians are printed.
    """
    kinds = ["exact", "auto"] if can_predict(args, paths) else ["exact"]
    runs = {kind: load_options(args, predictor=kind) for kind in kinds}
    if has_plan:
        on_gpu = load_options(args, predictor=kinds[-1], device="auto")
        runs[f"{kinds[-1]}, the plan"] = on_gpu
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPORT_ROUNDS):
        for name, options in runs.items():
            with open_engine(args, options) as (engine, _):
                engine.wait_for_weights()
                rates[name].append(measure_rates(engine)["decode"])
                prediction = engine.prediction
    if prediction is not None:
        print("\non held-out tokens; cost of finding the active neurons, relative to all gates:")
        print(summary(load_predictor_file(prediction.path)) + "\n")
    for name, found in rates.items():
        print(f"--predictor {name:16} {spread(found):>24} tok/s")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("hybrid.setup", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
