"""What an engine chooses for itself when it loads: the neurons' order, how weights are held."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint
from hybrid.errors import OutOfMemory
from hybrid.kernels import active_isa, available_isas
from hybrid.placement.hardware import available_memory_bytes
from hybrid.placement.profile import check_profile, find_profile, load_profile
from hybrid.weights.packing import NeuronOrders


def choose_orders(
    checkpoint: Checkpoint, profile: Path | Literal["auto", "none"], home: Path | None
) -> tuple[NeuronOrders | None, NDArray[np.float64] | None, tuple[str, ...]]:
    """The order in which neurons are packed, hot ones first where their frequencies are known;
    those, (n_layers, n_neurons) in that order; and notices.
    """
    config = checkpoint.config
    notices: tuple[str, ...] = ()
    if profile == "none":
        return None, None, ()
    if profile == "auto":
        found, notices = find_profile(
            checkpoint.folder, home, checkpoint.weights_hash, config.n_layers, config.n_neurons
        )
    else:
        found = load_profile(Path(profile))
        check_profile(
            found, Path(profile), checkpoint.weights_hash, config.n_layers, config.n_neurons
        )
    if found is None:
        return None, None, notices
    orders = found.neuron_orders()
    return orders, np.take_along_axis(found.frequency, np.stack(orders), 1), notices


def choose_mmap(mmap: bool | None, weight_bytes: int) -> tuple[bool, list[str]]:
    """Whether to map the weights: as asked for, else where memory has no room for them."""
    available = available_memory_bytes()
    fits = weight_bytes <= available
    sizes = f"the weights have {weight_bytes / 1e9:.2f} GB, {available / 1e9:.2f} GB of memory"
    if mmap is None and not fits:
        return True, [f"{sizes} are free: they are mapped from disk, which may be slow"]
    if not mmap and not fits:
        raise OutOfMemory(
            f"{sizes} are free; close other programs, use quant q4, or allow mmap (slow)"
        )
    return bool(mmap), []


def isa_notices() -> list[str]:
    if active_isa() != "scalar":
        return []
    if len(available_isas()) > 1:
        return ["HYBRID_ISA=scalar: the portable kernels are in use, which are slow"]
    return ["this CPU has no AVX2, or this build lacks it: the portable kernels are slow"]
