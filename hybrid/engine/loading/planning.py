"""Decide which parts of a model go to a GPU: find the device, check the request, choose the plan.

Torch is loaded only if the user requests a GPU or a plan of `hybrid.setup` uses one.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.engine.loading.model_spec import ModelSpec
from hybrid.engine.options import DeviceRequest
from hybrid.errors import DeviceUnavailable, InvalidArtifact
from hybrid.files import has_files
from hybrid.kernels import Format, ThreadPool
from hybrid.notices import Notices
from hybrid.placement.disturbance import OtherLoad
from hybrid.placement.machine import Machine
from hybrid.placement.measurement import (
    kept_machine,
    machine_path,
    measured_machine,
    save_quietly,
)
from hybrid.placement.plan import PlacementPlan, check_plan, load_plan
from hybrid.placement.solver import solve
from hybrid.weights.formats import GPU_FORMATS

if TYPE_CHECKING:
    from hybrid.engine.gpu.device import Device
    from hybrid.kernels.gpu.torch_kernels import TorchKernels


@dataclass(frozen=True, slots=True)
class PlanDecision:
    """A plan, and the device that it needs."""

    plan: PlacementPlan
    device: Device | None = None
    kernels: TorchKernels | None = None  # for decode
    is_solved: bool = False  # for this load, so a smaller plan can be solved if it does not fit


def decide(
    request: DeviceRequest, spec: ModelSpec, home: Path | None, notices: Notices
) -> PlanDecision:
    """Choose the plan and open its device.

    A given plan comes first. If device is "auto" and no budget is given, the plan of `hybrid.setup`
    in `home` is used. If only device "cuda" or a budget is given, a plan is solved. Raises
    InvalidArtifact, DeviceUnavailable.
    """
    on_cpu = PlanDecision(spec.cpu_plan(is_named=False))
    plan = _requested_plan(request, spec, home, notices)
    if plan is None and not request.needs_gpu:
        return on_cpu
    if plan is not None and not plan.uses_gpu:
        return PlanDecision(plan)
    if request.kv != "fp16":
        notices.add(f"plan not used: the GPU's KV cache is fp16, and kv {request.kv} is requested")
        return on_cpu
    if spec.prediction is not None and spec.prediction.stored is not None:
        notices.add("plan not used: the predictors in the model's file run on the CPU only")
        return on_cpu
    try:
        device = device_for(spec.format)
    except DeviceUnavailable as error:
        if request.device == "cuda":
            raise DeviceUnavailable(f"device cuda: {error}; use device cpu") from error
        notices.add(f"{error}: everything runs on the CPU")
        return on_cpu
    kernels = decode_kernels(device, notices)
    if plan is not None:
        return PlanDecision(plan, device, kernels)
    machine = measured_gpu(device, kernels, spec, home, notices)
    plan = solve_for(machine, spec, request.vram_budget, notices)
    return PlanDecision(plan, device if plan.uses_gpu else None, kernels, is_solved=True)


def _requested_plan(
    request: DeviceRequest, spec: ModelSpec, home: Path | None, notices: Notices
) -> PlacementPlan | None:
    """Return the plan of the given file, or the one that `hybrid.setup` keeps for this model.

    A kept plan that cannot be used becomes a notice. Raises InvalidArtifact for a given file.
    """
    if request.plan is not None:
        return _checked_plan(request.plan, spec)
    if request != DeviceRequest(kv=request.kv) or home is None:
        return None
    if not has_files(home / "plans"):
        return None
    path = plan_path(home, spec)
    if not os.path.lexists(path):
        _notice_other_contexts(path, spec, notices)
        return None
    try:
        return _checked_plan(path, spec)
    except InvalidArtifact as error:
        notices.add(f"plan not used: {error}")
        return None


def solve_for(
    machine: Machine, spec: ModelSpec, vram_budget: int | None, notices: Notices
) -> PlacementPlan:
    """Solve the plan for a VRAM budget of the whole process, in bytes. None takes all free VRAM."""
    gpu = machine.gpu
    if gpu is None:
        return spec.cpu_plan()
    largest = gpu.vram_bytes + gpu.context_bytes
    if vram_budget is None:
        vram_budget = largest
    elif vram_budget > largest:
        notices.add(
            f"the VRAM budget is {vram_budget / 2**20:.0f} MiB, but {gpu.name} has only "
            f"{largest / 2**20:.0f} MiB free: planned for those"
        )
        vram_budget = largest
    if vram_budget <= gpu.context_bytes:
        notices.add(
            f"CUDA and torch alone take {gpu.context_bytes / 2**20:.0f} MiB of VRAM, but the "
            f"budget is {vram_budget / 2**20:.0f} MiB: everything runs on the CPU"
        )
        return spec.cpu_plan()
    if spec.frequencies is None:
        notices.add("no profile of this model: the plan treats all neurons as equally hot")
    model = spec.time_model(machine)
    plan = solve(model, spec.cpu_plan(), vram_budget - gpu.context_bytes)
    return replace(
        plan,
        vram_budget=vram_budget,
        context_bytes=gpu.context_bytes,
        torch_bytes=gpu.torch_bytes,
        hand_offs="" if machine.is_modelled else gpu.mechanism,
    )


def plan_path(home: Path, spec: ModelSpec) -> Path:
    """Return where `hybrid.setup` keeps the plan of a model."""
    name = f"{spec.model_hash[:32]}-{spec.format.name}-{spec.n_context}.json"
    return home / "plans" / name


def _notice_other_contexts(path: Path, spec: ModelSpec, notices: Notices) -> None:
    """Say so if `hybrid.setup` made plans, but only for other lengths of context."""
    stem = path.stem.removesuffix(f"-{spec.n_context}")
    found = [re.fullmatch(r".*-(\d+)", p.stem) for p in path.parent.glob(f"{stem}-*.json")]
    sizes = ", ".join(str(n) for n in sorted(int(match[1]) for match in found if match))
    if sizes:
        notices.add(
            f"the plan of hybrid.setup is for a context of {sizes} positions, but {spec.n_context} "
            "are requested: everything runs on the CPU; --vram-budget makes a new plan"
        )


def device_for(format: Format) -> Device:
    """Open this machine's GPU for weights in a format. Raises DeviceUnavailable."""
    check_gpu_has(format)
    return open_device()


def check_gpu_has(format: Format) -> None:
    """Raise DeviceUnavailable if the GPU has no kernels for a format."""
    if format not in GPU_FORMATS:
        names = ", ".join(known.name for known in GPU_FORMATS)
        raise DeviceUnavailable(
            f"the GPU has no kernels for {format.name} weights, only for {names} (--quant)"
        )


def open_device() -> Device:
    """Open this machine's GPU. Raises DeviceUnavailable."""
    try:
        from hybrid.engine.gpu.device import CudaDevice
    except ImportError:
        raise DeviceUnavailable(
            "a GPU needs PyTorch, which is not installed (pip install 'hybrid-inference[gpu]', "
            "with a build of PyTorch for this GPU)"
        ) from None
    return CudaDevice()


def decode_kernels(device: Device, notices: Notices) -> TorchKernels:
    """Return the fastest kernels for one token that are installed."""
    from hybrid.kernels.gpu.torch_kernels import TorchKernels

    if device.torch_device.type == "cuda":
        try:
            from hybrid.kernels.gpu.triton_kernels import TritonKernels

            return TritonKernels()
        except ImportError:
            notices.add(
                "triton is not installed: the GPU uses plain torch operations, which are slow"
            )
    return TorchKernels()


def measured_gpu(
    device: Device, kernels: TorchKernels, spec: ModelSpec, home: Path | None, notices: Notices
) -> Machine:
    """Return this machine with its GPU. Speeds are measured once and kept in `home`."""
    from hybrid.engine.gpu.measurement import measure_gpu, measure_memory

    config, format = spec.config, spec.format
    pool = ThreadPool(spec.n_threads)
    machine = measured_machine(config, format, pool, home, notices)
    path = None
    if home is not None:
        base = machine_path(home, config, format, spec.n_threads)
        gpu = hashlib.sha256(f"{device.name} {device.version} {kernels.name}".encode()).hexdigest()
        path = base.with_name(f"{base.stem}-{gpu[:8]}.json")
        kept = kept_machine(path, notices)
        if kept is not None and kept.gpu is not None:
            memory = measure_memory(device, measures_context=False)
            return replace(machine, gpu=replace(kept.gpu, vram_bytes=memory.free_bytes))
    memory = measure_memory(device)
    load = OtherLoad()
    speeds = measure_gpu(device, kernels, spec.layout, pool, memory)
    machine = replace(machine, gpu=speeds)
    if path is not None and not load.notice(pool.n_threads, notices):
        save_quietly(machine, path)
    return machine


def machine_here(spec: ModelSpec, home: Path | None, notices: Notices) -> Machine:
    """Measure this machine, with its GPU if it has one."""
    try:
        device = device_for(spec.format)
    except DeviceUnavailable as error:
        notices.add(str(error))
        pool = ThreadPool(spec.n_threads)
        return measured_machine(spec.config, spec.format, pool, home, notices)
    return measured_gpu(device, decode_kernels(device, notices), spec, home, notices)


def _checked_plan(path: Path, spec: ModelSpec) -> PlacementPlan:
    plan = load_plan(path)
    check_plan(plan, path, spec.cpu_plan())
    return plan
