"""load: a model's name or folder → an Engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hybrid.engine.engine import Engine, Quant
from hybrid.engine.loading.model_spec import DeviceName
from hybrid.engine.loading.prediction import DEFAULT_RECALL
from hybrid.errors import InvalidOption
from hybrid.hub.catalog import hybrid_home, resolve
from hybrid.progress import Progress, ignore_progress


def load(
    model: str | Path = "stories",
    *,
    threads: int | None = None,
    quant: Quant = "q8",
    context_size: int | None = None,
    mmap: bool | None = None,
    mlock: bool = False,
    profile: Path | Literal["auto", "none"] = "auto",
    predictor: Path | Literal["auto", "exact"] = "exact",
    recall: float = DEFAULT_RECALL,
    device: DeviceName = "auto",
    vram_budget: int | None = None,
    plan: Path | None = None,
    hand_offs: str = "auto",
    offline: bool = False,
    progress: Progress = ignore_progress,
) -> Engine:
    """Load a model and return its Engine.

    `model` is a name from the catalog ("stories" is bundled), a Hugging Face repo id, or a folder;
    names are fetched where they are not on this machine, unless `offline`. `threads` defaults to
    the physical cores, `context_size` (in tokens) to 4096 or what the model was trained for.
    `quant`: "q8", "q4" or "bf16".

    A large model is packed once and kept under HYBRID_HOME (the user's cache folder). From there it
    is mapped, which takes no time, and moves into memory while it is already in use, or stays
    mapped with `mmap`: then several processes share it. A file that shrinks while it is mapped ends
    the process. None moves it where it fits; only False reads the checkpoint itself without mapping
    it, too. `mlock` keeps the weights from being swapped out or, where mapped, dropped, and has
    them in memory before `load` returns; where the system allows no such amount, `Engine.notices`
    says so.

    `profile` says which neurons are hot; they are packed first, which changes no result beyond the
    rounding of sums: "auto" takes the one that `hybrid.setup` recorded or that lies in the model's
    folder, "none" leaves the neurons in their order, a path names another one.

    `predictor` names the neurons whose gates are computed at all, so that a token reads less; it
    misses at most about 1 - `recall` of those that fire, so the text is no longer exactly the
    model's. "exact" computes every gate; "auto" takes the predictor that `hybrid.setup` made for
    this model, and exact where there is none; a path names a file of `predictors.train`, of this
    very model and neuron order. `Engine.prediction` says what is in use. With a predictor and a
    large vocabulary (`Engine.previews_head`) only the likeliest tokens' logits are the model's, the
    others are estimates from a copy of the head in 2 bits.

    `device`: "cpu", "cuda", or "auto", which uses a GPU where one is asked for by `vram_budget` or
    `plan`, or by the plan that `hybrid.setup` made. `vram_budget` is what the whole process may
    take of the GPU's memory, in bytes; what does not fit stays on the CPU, by the plan of least
    predicted time. `plan` is a file of `hybrid.plan`; `Engine.plan` says what is where. `hand_offs`
    forces how GPU and CPU wait for each other: "memory-operations", "host-functions" or
    "synchronise", instead of what measured fastest. PyTorch is loaded only where a GPU is used.

    `progress` is told how far downloading and packing are.

    Raises ModelNotFound, DownloadFailed, InvalidCheckpoint, InvalidArtifact, UnsupportedModel,
    InvalidOption, OutOfMemory, DeviceUnavailable, DeviceFailed.
    """
    return Engine(
        resolve(model, offline=offline, progress=progress),
        threads=threads,
        quant=quant,
        context_size=context_size,
        mmap=mmap,
        mlock=mlock,
        profile=profile,
        predictor=predictor,
        recall=recall,
        device=device,
        vram_budget=vram_budget,
        plan=plan,
        hand_offs=hand_offs,
        home=_home(),
        progress=progress,
    )


def _home() -> Path | None:
    """None where this user has no home to keep anything in."""
    try:
        return hybrid_home()
    except InvalidOption:
        return None
