"""Choices that an engine makes when it loads: the order of neurons, and how weights are held."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint
from hybrid.engine.options import LoadOptions
from hybrid.errors import OutOfMemory
from hybrid.kernels import active_isa, available_isas
from hybrid.model.config import ModelConfig
from hybrid.notices import Notices
from hybrid.placement.activation_counts import read_counts
from hybrid.placement.hardware import available_memory_bytes, total_memory_bytes
from hybrid.placement.profile import check_profile, find_profile, load_profile
from hybrid.weights import preview
from hybrid.weights.packed_file import Residence
from hybrid.weights.packing import PART_BYTES, NeuronOrders

# Memory that loading and a short answer need beside the weights: parts of them while one thread
# packs, and then the KV cache. Each further thread that packs needs its own.
WORKING_BYTES = 64 << 20
THREAD_BYTES = 4 * PART_BYTES


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
    if (counts := _foreign_counts(checkpoint, profile, notices)) is not None:
        orders = [np.argsort(-layer, kind="stable") for layer in counts]
        return orders, np.take_along_axis(counts / counts.max(), np.stack(orders), 1)
    if profile == "auto":
        found = find_profile(checkpoint.folder, home, checkpoint.identity, config, notices)
    else:
        found = load_profile(Path(profile))
        check_profile(found, Path(profile), checkpoint.weights_hash, config)
    if found is None:
        return None, None
    orders = found.neuron_orders()
    return orders, np.take_along_axis(found.frequency, np.stack(orders), 1)


def _foreign_counts(
    checkpoint: Checkpoint, profile: Path | Literal["auto"], notices: Notices
) -> NDArray[np.float64] | None:
    """Return the activation counts of a folder of PowerInfer's, if the user named one.

    Of how many tokens they are is not recorded. The neuron that fired most is taken to have fired
    for all of them.
    """
    if profile == "auto" or not Path(profile).is_dir():
        return None
    counts = read_counts(Path(profile), checkpoint.config)
    notices.add(
        f"{profile}: its counts order the neurons; how many tokens they are of is not recorded, so "
        "frequencies are relative to the neuron that fired most"
    )
    return counts


def check_context_memory(config: ModelConfig, n_context: int, n_layers: int) -> None:
    """Raise OutOfMemory if a context can never fit into this machine's memory.

    It counts what a full context uses: the rope tables, and the keys and values of `n_layers`
    layers. The system provides memory for both only as far as the context is used.
    """
    tables = 4 * config.head_dim
    cache = kv_token_bytes(config, n_layers)
    needed, total = n_context * (tables + cache), total_memory_bytes()
    if needed > total:
        raise OutOfMemory(
            f"a context of {n_context:,} tokens needs {needed / 1e9:,.1f} GB, and this machine has "
            f"{total / 1e9:.1f} GB of memory; choose a smaller context_size"
        )


def kv_token_bytes(config: ModelConfig, n_layers: int) -> int:
    """Return the bytes of a token's keys and values in so many layers."""
    return 2 * 2 * config.n_kv_heads * config.head_dim * n_layers


def check_sequences_memory(context_bytes: int, n_sequences: int, cache_bytes: int) -> None:
    """Raise OutOfMemory if full contexts of several sequences and a cache exceed free memory."""
    needed, available = n_sequences * context_bytes + cache_bytes, available_memory_bytes()
    if needed > available:
        raise OutOfMemory(
            f"contexts of {n_sequences} sequences ({context_bytes / 1e6:,.1f} MB each) and "
            f"{cache_bytes / 1e6:,.1f} MB for prefixes need {needed / 1e6:,.1f} MB, and "
            f"{available / 1e6:,.1f} MB of memory is free; choose fewer sequences, a smaller "
            "context_size or a smaller cache"
        )


class PackingNeeds(NamedTuple):
    """What packing takes."""

    weight_bytes: int  # of the packed weights
    n_threads: int  # at most
    held_bytes: int = 0  # of matrices that each thread holds as they are stored


def largest_ffn_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of the largest FFN matrix as it is stored.

    Without mmap, matrices whose rows are packed in another order are read as a whole.
    """
    if checkpoint.is_synthetic:  # its weights are in no file
        return 0
    return max(
        checkpoint.tensor(role, layer).data.nbytes
        for role in ("gate", "up", "down")
        for layer in range(checkpoint.config.n_layers)
    )


def choose_residence(options: LoadOptions, needs: PackingNeeds, notices: Notices) -> Residence:
    """Return how the weights are held in memory, and how many threads bring them there.

    If `options.mmap` is None, the weights are mapped only if free memory is too small for them.
    With little memory fewer than `needs.n_threads` pack. Raises OutOfMemory if the weights may not
    be mapped and do not fit, or if there is not even memory to use mapped weights.
    """
    mmap, available = options.mmap, available_memory_bytes()
    if available < WORKING_BYTES:
        raise OutOfMemory(
            f"{available / 1e6:.0f} MB of memory is free, but loading needs at least "
            f"{WORKING_BYTES / 1e6:.0f} MB beside the weights; close other programs, or raise the "
            "limit of this container"
        )
    needed = needs.weight_bytes + needs.held_bytes
    fits = needed + WORKING_BYTES <= available
    sizes = f"the weights need {needed / 1e9:.2f} GB, {available / 1e9:.2f} GB of memory"
    if mmap is None and not fits:
        notices.add(f"{sizes} is free: they are mapped from disk, which may be slow")
        mmap = True
    if not mmap and not fits:
        raise OutOfMemory(
            f"{sizes} is free; close other programs, use quant q4, or allow mmap (slow)"
        )
    left = available - WORKING_BYTES - (0 if mmap else needed)
    n_threads = min(needs.n_threads, 1 + left // (THREAD_BYTES + needs.held_bytes))
    return Residence(bool(mmap), options.mlock, fits, n_threads)


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
