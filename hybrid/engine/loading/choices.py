"""Choices that an engine makes when it loads: the order of neurons, and how weights are held."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint
from hybrid.errors import OutOfMemory
from hybrid.kernels import active_isa, available_isas
from hybrid.notices import Notices
from hybrid.placement.hardware import available_memory_bytes
from hybrid.placement.profile import check_profile, find_profile, load_profile
from hybrid.weights import preview
from hybrid.weights.packing import NeuronOrders


def choose_orders(
    checkpoint: Checkpoint,
    profile: Path | Literal["auto", "none"],
    home: Path | None,
    notices: Notices,
) -> tuple[NeuronOrders | None, NDArray[np.float64] | None]:
    """Return the order in which neurons are packed, and their activation frequencies.

    With a profile, hot neurons come first. Frequencies are (n_layers, n_neurons) in packed order.
    Without a profile, order and frequencies are None. Raises InvalidArtifact if the profile at a
    given path is broken or of another model.
    """
    config = checkpoint.config
    if profile == "none":
        return None, None
    if profile == "auto":
        found = find_profile(checkpoint.folder, home, checkpoint.identity, config, notices)
    else:
        found = load_profile(Path(profile))
        check_profile(found, Path(profile), checkpoint.weights_hash, config)
    if found is None:
        return None, None
    orders = found.neuron_orders()
    return orders, np.take_along_axis(found.frequency, np.stack(orders), 1)


def choose_mmap(mmap: bool | None, weight_bytes: int, notices: Notices) -> tuple[bool, bool]:
    """Return whether to map the weights, and whether they fit into memory.

    If `mmap` is None, the weights are mapped only if free memory is too small for them. Raises
    OutOfMemory if they may not be mapped and do not fit.
    """
    available = available_memory_bytes()
    fits = weight_bytes <= available
    sizes = f"the weights need {weight_bytes / 1e9:.2f} GB, {available / 1e9:.2f} GB of memory"
    if mmap is None and not fits:
        notices.add(f"{sizes} is free: they are mapped from disk, which may be slow")
        return True, False
    if not mmap and not fits:
        raise OutOfMemory(
            f"{sizes} is free; close other programs, use quant q4, or allow mmap (slow)"
        )
    return bool(mmap), fits


def choose_preview(preview_head: bool, vocab_size: int, notices: Notices) -> bool:
    """Return whether the head gets a preview: if one is requested and the vocabulary is large."""
    if preview_head and vocab_size < preview.LEAST_ROWS:
        notices.add(
            f"preview_head has no effect: the vocabulary has {vocab_size:,} tokens, and a preview "
            f"pays from {preview.LEAST_ROWS:,} on"
        )
        return False
    return preview_head


def notice_isa(notices: Notices) -> None:
    """Say so if the portable kernels are in use."""
    if active_isa() != "scalar":
        return
    why = "HYBRID_ISA=scalar"
    if len(available_isas()) == 1:
        why = "this CPU or this build has no AVX2"
    notices.add(f"{why}: the portable kernels are in use; they are slow")
