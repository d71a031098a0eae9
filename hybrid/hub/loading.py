"""`load` opens a model by its name or folder and returns an Engine."""

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
    offline: bool = False,
    progress: Progress = ignore_progress,
) -> Engine:
    """Load a model and return its Engine.

    `model` is a name from the catalog ("stories" is bundled), a Hugging Face repo id, or a folder.
    A model that is not on this machine is downloaded, unless `offline`. `threads` defaults to the
    physical cores. `context_size` (in tokens) defaults to 4096, or to the length that the model was
    trained for if that is less. `quant` is "q8", "q4" or "bf16".

    A large model is packed once and kept under HYBRID_HOME (default: the user's cache folder). Its
    packed file is first mapped, which takes no time, and then copied into memory while the model is
    already in use. With `mmap=True` it stays mapped, so that several processes share it. A file
    that shrinks while it is mapped ends the process. With `mmap=None` the file is copied if it fits
    into memory. With `mmap=False` even the checkpoint is read without mapping it. `mlock` keeps the
    weights from being swapped out or, if mapped, dropped. They are then in memory before `load`
    returns. If the system does not allow to lock so much, `Engine.notices` says so.

    `profile` says which neurons are hot. They are packed first, which changes results only by the
    rounding of sums. "auto" uses the profile that `hybrid.setup` recorded, or the one in the
    model's folder. "none" leaves the neurons in their order. A path names another profile.

    `predictor` names the neurons whose gates are computed, so that a token reads fewer bytes. It
    misses at most about 1 - `recall` of the neurons that fire, so the text is no longer exactly the
    model's. "exact" computes every gate. "auto" uses the predictor that `hybrid.setup` made for
    this model, or computes every gate if there is none. A path names a file of `predictors.train`,
    which must be for the same model and neuron order. `Engine.prediction` says what is in use. With
    a predictor and a large vocabulary (`Engine.previews_head`) only the likeliest tokens have the
    model's own logits. The others are estimates from the preview, a 2-bit copy of the head.

    `device` is "cpu", "cuda" or "auto". "auto" uses a GPU if `vram_budget` or `plan` requests one,
    or if `hybrid.setup` made a plan. `vram_budget` is the GPU memory in bytes that the whole
    process may use. The plan with the least predicted time decides what goes there, and the rest
    stays on the CPU. `plan` is a file of `hybrid.plan`; `Engine.plan` says what is where. PyTorch
    is loaded only if a GPU is used.

    `progress` is called during downloading and packing.

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
        home=_home(),
        progress=progress,
    )


def _home() -> Path | None:
    """Return hybrid's folder, or None if this user has no home directory."""
    try:
        return hybrid_home()
    except InvalidOption:
        return None
