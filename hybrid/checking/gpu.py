"""Checks and measures a GPU, unattended, in under eight minutes:

    python -m hybrid.selfcheck --gpu -o checks.json

Correctness: the kernels are compared with torch, and every kind of plan with the CPU engine. Ten
thousand replays must give the same answer, and a thread that never answers must be detected.

Speed: hand-offs are timed with each mechanism, on an idle machine and with every core busy. So are
the kernels, and tokens of a 1 B model: all on the GPU, on the CPU alone, and split at a quarter,
half and three quarters of its bytes, hybrid and by whole layers. The file has predicted and
measured times.

A failed check is recorded, and the next one runs. Please send us the file.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.engine.engine import Engine
from hybrid.engine.gpu import measurement
from hybrid.engine.gpu.device import Device, HostDevice
from hybrid.engine.loading import planning
from hybrid.engine.options import Quant
from hybrid.hub.loading import load
from hybrid.kernels import Format, ThreadPool, active_isa
from hybrid.notices import Notices
from hybrid.placement.hardware import default_threads
from hybrid.placement.plan import ON_CPU, LayerPlacement, PlacementPlan, whole_plan
from hybrid.placement.solver import alternatives

LIMIT_S = 480.0
REPLAYS = 10_000
CONTEXT = 512
BOUND = 4e-2  # share of the largest logit; tests/engine/gpu/hybrid_models.py says why
KERNEL_TESTS = Path("tests/kernels/gpu/test_triton.py")  # exists only in a checkout


class Checks:
    """Runs checks one after the other, and writes their results to a file after each."""

    def __init__(self, out: Path, limit_s: float, report: Callable[[str], None]) -> None:
        self.out, self.ends, self.report = out, time.monotonic() + limit_s, report
        self.results: dict[str, Any] = {}

    def run(self, name: str, check: Callable[[], Any], needs_s: float = 0.0) -> None:
        started = time.monotonic()
        if started + needs_s > self.ends:
            result: Any = {"skipped": "no time left"}
        else:
            try:
                result = check()
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - started, 1)
        self.results[name] = {"seconds": seconds, "result": result}
        self.report(f"{name} ({seconds} s): {json.dumps(result)[:300]}")
        self.out.write_text(json.dumps(self.results, indent=1), encoding="utf-8")


def environment(device: Device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device.name,
        "versions": device.version,
        "python": platform.python_version(),
        "threads": default_threads(),
        "isa": active_isa(),
        "mechanisms": list(device.mechanisms),
    }
    facts |= measurement.measure_memory(device)._asdict()
    if device.torch_device.type == "cuda":
        properties = torch.cuda.get_device_properties(device.torch_device)
        facts |= {
            "sm": f"{properties.major}{properties.minor}",
            "sms": properties.multi_processor_count,
        }
    return facts


def hand_offs(device: Device, pool: ThreadPool, n: int = 52) -> dict[str, Any]:
    """Measure the µs of one hand-off: median, 99th percentile and best of 200 replays."""
    found: dict[str, Any] = {}
    for mechanism in device.mechanisms:
        loop = measurement.HandOffLoop(device, pool, mechanism, n)
        with device.on_stream():
            recording = device.record(loop.launch)
            for _ in range(20):
                loop.replay(recording)
            times = sorted(loop.replay(recording) / n * 1e6 for _ in range(200))
        found[mechanism] = {"median_us": times[100], "p99_us": times[198], "best_us": times[0]}
    return found


def busy_hand_offs(device: Device, pool: ThreadPool) -> dict[str, Any]:
    """Measure the same while another process keeps every core busy."""
    processes = [
        multiprocessing.Process(target=_spin, daemon=True) for _ in range(os.cpu_count() or 1)
    ]
    for process in processes:
        process.start()
    try:
        return hand_offs(device, pool)
    finally:
        for process in processes:
            process.terminate()


def _spin() -> None:
    while True:
        pass


def replays(device: Device, pool: ThreadPool, n: int) -> dict[str, Any]:
    """Replay hand-offs with the mechanism in use, and count wrong answers; all must be zero."""
    mechanism = device.mechanisms[0]
    loop = measurement.HandOffLoop(device, pool, mechanism, 8)
    n_wrong = 0
    with device.on_stream():
        recording = device.record(loop.launch)
        for _ in range(n):
            loop.y.fill_(float("nan"))
            loop.replay(recording)
            n_wrong += bool(loop.y.any())
    return {"replays": n, "mechanism": mechanism, "wrong": n_wrong}


def lost_thread(device: Device, pool: ThreadPool) -> dict[str, Any]:
    """Check that the GPU continues if no thread answers, and that the link reports an error."""
    mechanism = device.mechanisms[0]
    if mechanism == "synchronise":
        return {"skipped": "this mechanism has no flags"}
    loop = measurement.HandOffLoop(device, pool, mechanism, 4, patience_s=0.5)
    with device.on_stream():
        recording = device.record(loop.launch)
        loop.exchange.link.arm()
        started = time.monotonic()
        for step in recording:
            step()
        device.synchronize()
    return {
        "released_after_s": round(time.monotonic() - started, 3),
        "error": loop.exchange.link.error,
        "is_poisoned": bool(torch.isnan(loop.y).all()),
    }


def kernels(device: Device, n_rows: int) -> dict[str, Any]:
    """Measure GB/s of each backend and format, with and without skipped rows, and µs per node."""
    from hybrid.kernels.gpu.torch_kernels import TorchKernels

    backends = {"torch": TorchKernels()}
    fastest = planning.decode_kernels(device, Notices())
    backends.setdefault(fastest.name, fastest)
    found: dict[str, Any] = {"node_us": measurement.node_seconds(device) * 1e6}
    for name, backend in backends.items():
        for format in Format:
            stream, gather = measurement.bandwidths(device, backend, 1536, format, n_rows)
            found[f"{name} {format.name}"] = {"stream_gbs": stream, "gather_gbs": gather}
    return found


def plans_of(plan: PlacementPlan) -> dict[str, PlacementPlan]:
    """Return every kind of split, for a model with any number of layers."""
    n, n_layers = plan.n_neurons, len(plan.layers)
    some = n // 3 // 64 * 64
    whole = LayerPlacement(True, n, n)
    kinds = {
        "attention": [LayerPlacement(True, 0, 0)],
        "all gates": [LayerPlacement(True, n, some)],
        "hot": [LayerPlacement(True, some, some)],
        "everything": [
            ON_CPU,
            LayerPlacement(True, n, some),
            whole,
            LayerPlacement(True, some, some),
        ],
    }
    plans = {"head": replace(plan, is_head_on_gpu=True), "all": whole_plan(plan)}
    for name, kind in kinds.items():
        layers = tuple(kind[i % len(kind)] for i in range(n_layers))
        plans[name] = replace(plan, layers=layers, is_head_on_gpu=name != "hot")
    return plans


def every_plan(model: str, quant: Quant, folder: Path) -> dict[str, Any]:
    """Compare the teacher-forced logits of each kind of plan with the CPU engine's."""

    def logits(**options: Any) -> tuple[np.ndarray, Engine]:
        with load(model, quant=quant, context_size=CONTEXT, **options) as engine:
            ids = np.random.default_rng(0).integers(3, engine.config.vocab_size, 90)
            session = engine.open_session()
            rows = [*session.prefill(ids[:64], all_logits=True)]  # type: ignore[misc]
            for token in ids[64:].tolist():
                session.decode(token)
                rows.append(session.logits.copy())
            return np.array(rows), engine

    expected, engine = logits(device="cpu")
    bound = BOUND * float(np.abs(expected).max())
    top = np.sort(expected)[:, -2:]
    clear = top[:, 1] - top[:, 0] > 2 * bound
    found = {}
    for name, plan in plans_of(engine.plan).items():
        path = folder / "plan.json"
        plan.save(path)
        own, _ = logits(plan=path)
        found[name] = {
            "max_difference": float(np.abs(own - expected).max()),
            "bound": bound,
            "is_within": bool(np.abs(own - expected).max() <= bound),
            "same_argmax": bool((own.argmax(1) == expected.argmax(1))[clear].all()),
        }
    return found


def decode_ms(
    model: str, quant: Quant, threads: int, n: int = 64, **options: Any
) -> dict[str, Any]:
    with load(model, quant=quant, threads=threads, context_size=CONTEXT, **options) as engine:
        engine.wait_for_weights()
        ids = np.random.default_rng(1).integers(3, engine.config.vocab_size, 3 * n + 40)
        session = engine.open_session()
        session.prefill(ids[:32])
        for token in ids[32:40].tolist():
            session.decode(token)
        rounds = []
        for part in range(3):
            started = time.perf_counter()
            for token in ids[40 + part * n :][:n].tolist():
                session.decode(token)
            rounds.append((time.perf_counter() - started) / n * 1e3)
        active = sum(session.active_counts) / (3 * n + 40) / engine.config.n_layers
        return {
            "ms": statistics.median(rounds),
            "tps": 1e3 / statistics.median(rounds),
            "active_fraction": active / engine.config.n_neurons,
            "vram_mib": round(engine.vram_bytes / 2**20),
            "plan": engine.plan.summary(),
        }


def splits(
    model: str, quant: Quant, threads: int, device: Device, folder: Path, shares: tuple[float, ...]
) -> dict[str, Any]:
    """Measure and predict decoding for several plans.

    These are CPU only, all on the GPU, and, for each share of the model's bytes, hybrid and whole
    layers.
    """
    with load(model, quant=quant, threads=threads, context_size=CONTEXT, device="cpu") as engine:
        spec = engine.spec
    notices = Notices()
    backend = planning.decode_kernels(device, notices)
    machine = planning.measured_gpu(device, backend, spec, None, notices)
    assert machine.gpu is not None
    time_model = spec.time_model(machine)
    everything = time_model.sizes.plan(whole_plan(spec.cpu_plan()))
    found: dict[str, Any] = {"machine": asdict(machine), "model_bytes": everything}
    candidates = {
        ("CPU only", 0.0): spec.cpu_plan(),
        ("all on the GPU", 1.0): whole_plan(spec.cpu_plan()),
    }
    for share in shares:
        for way in alternatives(time_model, spec.cpu_plan(), int(share * everything)):
            if way.name in ("whole layers", "hybrid"):
                candidates[way.name, share] = way.plan
    for (name, share), candidate in candidates.items():
        plan = replace(candidate, vram_bytes=time_model.sizes.plan(candidate))
        path = folder / "plan.json"
        plan.save(path)
        where: dict[str, Any] = {"plan": path} if plan.uses_gpu else {"device": "cpu"}
        measured = decode_ms(model, quant, threads, **where)
        predicted = time_model.plan(plan) * 1e3
        measured |= {"predicted_ms": predicted, "error": predicted / measured["ms"] - 1}
        found[f"{name} {share:.0%}"] = measured
    for share in shares:
        hybrid_ms, whole_ms = (
            found.get(f"{n} {share:.0%}", {}).get("ms") for n in ("hybrid", "whole layers")
        )
        if hybrid_ms and whole_ms:
            found[f"hybrid over whole layers at {share:.0%}"] = whole_ms / hybrid_ms
    return found


def kernel_tests(*before: str) -> dict[str, Any]:
    """Run the Triton tests on this GPU, under the tool `before` if given. Needs a checkout."""
    if not KERNEL_TESTS.is_file():
        return {"skipped": f"there is no {KERNEL_TESTS}: run this in a checkout"}
    if before and shutil.which(before[0]) is None:
        return {"skipped": f"{before[0]} is not installed"}
    command = [*before, sys.executable, "-P", "-m", "pytest", "-q", "-x", str(KERNEL_TESTS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=150)
    return {"exit": result.returncode, "last": result.stdout.strip().splitlines()[-1:]}


@contextlib.contextmanager
def _open_device(is_rehearsal: bool) -> Iterator[Device]:
    """The GPU. In a rehearsal it is torch's CPU device, and engines take it for the GPU too."""
    if not is_rehearsal:
        yield planning.open_device()
        return
    device, open_device = HostDevice(), planning.open_device
    planning.open_device = lambda: device
    try:
        yield device
    finally:
        planning.open_device = open_device


def check_gpu(
    out: Path,
    *,
    model: str = "synthetic:MiniCPM-S-1B",
    limit_s: float = LIMIT_S,
    is_rehearsal: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Run all checks, write their results to `out`, and return the names of those that failed.

    `report` receives one line per finished check. A rehearsal tests this program itself, on the CPU
    with a small model. Raises DeviceUnavailable if there is no usable GPU.
    """
    if is_rehearsal:
        model = "stories"
    folder = out.parent
    checks = Checks(out, limit_s, report)
    with _open_device(is_rehearsal) as device:
        threads = default_threads()
        pool = ThreadPool(threads)
        checks.run("environment", lambda: environment(device))
        checks.run("hand-offs", lambda: hand_offs(device, pool))
        if not is_rehearsal:
            checks.run("hand-offs, all cores busy", lambda: busy_hand_offs(device, pool))
            checks.run("kernel tests", kernel_tests, needs_s=60)
        checks.run("replays", lambda: replays(device, pool, 20 if is_rehearsal else REPLAYS))
        checks.run("a lost thread", lambda: lost_thread(device, pool))
        checks.run("kernels", lambda: kernels(device, 64 if is_rehearsal else 1 << 16))
        checks.run("every plan, stories q8", lambda: every_plan("stories", "q8", folder))
        shares = (0.5,) if is_rehearsal else (0.25, 0.5, 0.75)
        quants: tuple[Quant, ...] = ("q8",) if is_rehearsal else ("q8", "q4", "bf16")
        for quant in quants:
            check = partial(splits, model, quant, threads, device, folder, shares)
            checks.run(f"decode, {quant}", check, needs_s=60)
        if not is_rehearsal:
            checks.run("every plan, 1B q8", lambda: every_plan(model, "q8", folder), needs_s=60)
            sanitizer = ("compute-sanitizer", "--error-exitcode", "9")
            checks.run("compute-sanitizer", lambda: kernel_tests(*sanitizer), needs_s=90)
    (folder / "plan.json").unlink(missing_ok=True)
    return [
        name
        for name, entry in checks.results.items()
        if isinstance(entry["result"], dict) and "error" in entry["result"]
    ]
