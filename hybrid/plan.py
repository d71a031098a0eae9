"""Decide which part of a model goes on the GPU, and predict the speed of each alternative.

    python -m hybrid.plan -m MiniCPM-S-1B --vram-budget 1GiB --explain
    python -m hybrid.plan -m MiniCPM-S-1B --vram-budget 1GiB --hardware ddr4-rtx3050 --plot tps.png

The command measures this machine once, which takes some seconds. It then solves for the plan with
the least predicted time within the VRAM budget, and shows every alternative. --hardware takes a
JSON file whose fields replace measured ones (docs/formats.md), or the name of a modelled machine.
Its figures are then predictions, not measurements.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from hybrid import InvalidOption, MissingPackage
from hybrid.cli.command_line import (
    ArgumentParser,
    add_context_option,
    add_model_options,
    byte_size,
    load_options,
    printable,
    run_command,
)
from hybrid.cli.progress_bar import progress_bar
from hybrid.engine.loading.model_spec import ModelSpec, read_model_spec
from hybrid.engine.loading.planning import check_gpu_has, machine_here, solve_for
from hybrid.hub.catalog import hybrid_home, resolve
from hybrid.notices import Notices
from hybrid.placement.machine import MODELLED, Machine, override, read_overrides
from hybrid.placement.plan import LayerPlacement, PlacementPlan, whole_plan
from hybrid.placement.solver import Alternative, alternatives
from hybrid.placement.time_model import TimeModel

WORTH = 1.05  # a smaller speed-up is reported as not worth it
PLOT_POINTS = 13


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = [(name, make()) for name, make in MODELLED.items()]
    machines = "\n".join(
        f"  {name:14} {machine.name}, {machine.gpu.name if machine.gpu else ''}"
        for name, machine in made
    )
    parser = ArgumentParser(
        prog="hybrid.plan",
        description=__doc__,
        epilog=f"modelled machines:\n{machines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser)
    add = parser.add_argument
    add_context_option(parser)
    add(
        "--vram-budget",
        type=byte_size,
        metavar="SIZE",
        help="VRAM that the process may use, such as 1GiB (default: all that is free)",
    )
    add(
        "--hardware",
        metavar="FILE|NAME",
        help="plan for the machine of this JSON file or name (default: this machine)",
    )
    add(
        "--explain", action="store_true", help="also print what goes where, layer by layer, and why"
    )
    add(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the plan to this file, for hybrid.run --plan FILE (default: none)",
    )
    add(
        "--plot",
        type=Path,
        metavar="PNG",
        help="plot the predicted speed against the VRAM budget into this file (default: none)",
    )
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    options, notices = load_options(args), Notices()
    with progress_bar() as progress:
        folder = resolve(args.model, offline=args.offline, progress=progress, notices=notices)
        spec = read_model_spec(
            folder, options, home=hybrid_home(), notices=notices, progress=progress
        )
    machine = find_machine(args, spec, notices)
    plan = solve_for(machine, spec, args.vram_budget, notices)
    model = spec.time_model(machine)
    budget = max(0, plan.vram_budget - plan.context_bytes)
    candidates = alternatives(model, spec.cpu_plan(), budget)
    for notice in notices:
        print(f"note: {printable(notice)}", file=sys.stderr)
    if args.json:
        print(json.dumps(as_json(machine, plan, candidates)))
    else:
        print_plan(machine, plan, candidates)
        if args.explain:
            print_layers(model, plan)
    if args.save is not None:
        try:
            plan.save(args.save)
        except OSError as error:
            raise InvalidOption(f"--save {args.save}: {error.strerror}") from error
    if args.plot is not None:
        plot(args.plot, machine, spec)
    return 0


def find_machine(args: argparse.Namespace, spec: ModelSpec, notices: Notices) -> Machine:
    """Return the machine to plan for. Raises DeviceUnavailable."""
    name = args.hardware
    if name is not None:
        check_gpu_has(spec.format)
    if name in MODELLED:
        machine = MODELLED[name]()
        notices.add(f"{machine.name} is modelled, not measured")
        return machine
    if name is None:
        return machine_here(spec, hybrid_home(), notices)
    path = Path(name)
    if not path.is_file():
        names = ", ".join(MODELLED)
        raise InvalidOption(f"--hardware {name}: expected a JSON file, or one of {names}")
    of_this_machine = Notices()
    machine = machine_here(spec, hybrid_home(), of_this_machine)
    machine = override(machine, read_overrides(path), path)
    if machine.gpu is None:
        notices.add(*of_this_machine)
    return machine


def print_plan(machine: Machine, plan: PlacementPlan, candidates: list[Alternative]) -> None:
    """Print the machine, the budget, and the predicted speed of every alternative."""
    cpu, gpu = machine.cpu, machine.gpu
    print(
        f"CPU     {machine.name}: {machine.n_threads} threads, streams {cpu.stream_gbs:.1f} GB/s, "
        f"gathers {cpu.gather_gbs:.1f} GB/s; {cpu.layer_us:.0f} µs more per layer"
    )
    if gpu is None:
        print("GPU     none")
    else:
        print(
            f"GPU     {gpu.name}: streams {gpu.stream_gbs:.0f} GB/s, gathers {gpu.gather_gbs:.0f} "
            f"GB/s; {gpu.node_us:.1f} µs per kernel, {gpu.hand_off_us:.1f} µs per hand-off "
            f"({gpu.mechanism})"
        )
        print(
            f"budget  {plan.vram_budget / 2**20:.0f} MiB, of which CUDA takes "
            f"{(plan.context_bytes - plan.torch_bytes) / 2**20:.0f} and torch "
            f"{plan.torch_bytes / 2**20:.0f}; the KV cache holds {plan.n_context} tokens"
        )
    print(f"\n{'predicted':16}{'tok/s':>8}{'VRAM MiB':>10}")
    fastest = min(candidates, key=lambda way: way.seconds)
    for way in candidates:
        mark = "  <" if way is fastest else ""
        print(f"{way.name:16}{1 / way.seconds:>8.1f}{way.plan.vram_bytes / 2**20:>10.0f}{mark}")
    print(f"\n{plan.summary()}\n{verdict(candidates)}")


def verdict(candidates: list[Alternative]) -> str:
    """Say in plain words whether splitting layers is worth it."""
    by_name = {way.name: way.seconds for way in candidates}
    if len(candidates) == 1:
        return "There is no GPU, or it has no room: the CPU computes everything."
    best_other = min(seconds for name, seconds in by_name.items() if name != "hybrid")
    other = min((name for name in by_name if name != "hybrid"), key=lambda n: by_name[n])
    over_cpu = by_name["CPU only"] / min(by_name.values())
    if "hybrid" not in by_name:
        return (
            f"No layer can be split within this budget. The best alternative is {other}, "
            f"{over_cpu:.2f}x as fast as CPU only."
        )
    gain = best_other / by_name["hybrid"]
    if over_cpu < WORTH:
        return "A GPU is not worth it here: the CPU alone is as fast."
    if gain < WORTH:
        return (
            f"Splitting layers is not worth it here: it is {gain:.2f}x as fast as {other}. "
            f"This plan is {over_cpu:.2f}x as fast as CPU only."
        )
    return (
        f"Hybrid is worth it: {gain:.2f}x as fast as {other}, {over_cpu:.2f}x as fast as CPU only."
    )


def print_layers(model: TimeModel, plan: PlacementPlan) -> None:
    """Print what is on the GPU, and what each layer's time consists of."""
    print(f"\n{'layers':10}{'what is on the GPU':50}{'GPU µs':>8}{'CPU µs':>8}{'both µs':>9}")
    for layers, placement in runs(plan):
        times = [model.layer(layer, placement) for layer in layers]
        n = len(times)
        gpu = cpu = sum(t.total for t in times) / n * 1e6
        if placement.is_on_gpu:
            gpu = sum(t.before + t.hot + t.after for t in times) / n * 1e6
            cpu = sum(t.cold for t in times) / n * 1e6
        else:
            gpu = 0.0
        both = sum(t.total for t in times) / n * 1e6
        name = f"{layers[0]}-{layers[-1]}" if n > 1 else str(layers[0])
        print(
            f"{name:10}{describe(model, plan, layers, placement):50}"
            f"{gpu:>8.0f}{cpu:>8.0f}{both:>9.0f}"
        )
    head = model.head(plan.is_head_on_gpu) * 1e6
    where = "all of it" if plan.is_head_on_gpu else "nothing"
    print(f"{'head':10}{where:50}{'':16}{head:>9.0f}")
    print(
        "\nA split layer takes as long as the slower device. The head and attention go on the GPU "
        "first, because every token reads all of them.\nHot neurons come next, because their rows "
        "are read most often per byte of VRAM."
    )


def runs(plan: PlacementPlan) -> Iterator[tuple[list[int], LayerPlacement]]:
    """Yield groups of neighbouring layers that have the same placement."""
    for placement, group in groupby(range(len(plan.layers)), key=lambda i: plan.layers[i]):
        yield list(group), placement


def describe(
    model: TimeModel, plan: PlacementPlan, layers: list[int], placement: LayerPlacement
) -> str:
    if not placement.is_on_gpu:
        return "nothing"
    if plan.is_whole(placement):
        return "all of them"
    n = plan.n_neurons
    text = "attention, KV"
    if placement.n_gate:
        text += ", all gates" if placement.n_gate == n else f", {placement.n_gate} gates"
    if placement.n_hot:
        hot = sum(model.active(layer, 0, placement.n_hot) for layer in layers)
        share = hot / max(sum(model.active(layer, 0, n) for layer in layers), 1e-9)
        text += f", {placement.n_hot} neurons ({share:.0%} of firing)"
    return text


def as_json(machine: Machine, plan: PlacementPlan, candidates: list[Alternative]) -> dict[str, Any]:
    return {
        "machine": asdict(machine),
        "plan": asdict(plan),
        "predicted_tps": {way.name: round(1 / way.seconds, 2) for way in candidates},
        "vram_bytes": {way.name: way.plan.vram_bytes for way in candidates},
        "verdict": verdict(candidates),
    }


def plot(path: Path, machine: Machine, spec: ModelSpec) -> None:
    """Plot the predicted tok/s of each alternative against the budget, up to the whole model.

    Raises MissingPackage without matplotlib, and InvalidOption if there is no GPU or the file
    cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage(
            "--plot needs matplotlib: pip install 'hybrid-inference[train]'"
        ) from None
    if machine.gpu is None:
        raise InvalidOption("--plot: this machine has no GPU; name one with --hardware")
    model = spec.time_model(machine)
    needed = model.sizes.plan(whole_plan(spec.cpu_plan())) + (8 << 20)
    curves: dict[str, list[tuple[float, float]]] = {}
    for step in range(PLOT_POINTS):
        budget = needed * step // (PLOT_POINTS - 1)
        for way in alternatives(model, spec.cpu_plan(), budget):
            at = (budget + machine.gpu.context_bytes) / 2**20
            curves.setdefault(way.name, []).append((at, 1 / way.seconds))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    kind = "modelled" if machine.is_modelled else "predicted"
    axes.set(xlabel="VRAM budget, MiB", ylabel=f"{kind} tok/s", ylim=(0, None))
    axes.set_title(f"{spec.format.name}, {machine.name}, {machine.gpu.name}", fontsize=9)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InvalidOption(f"--plot {path}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("hybrid.plan", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
