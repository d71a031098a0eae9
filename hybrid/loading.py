"""load: a model's name or folder → an Engine."""

from __future__ import annotations

from pathlib import Path

from hybrid.catalog import resolve
from hybrid.engine.engine import Engine, Quant


def load(
    model: str | Path = "stories",
    *,
    threads: int | None = None,
    quant: Quant = "q8",
    context_size: int | None = None,
    offline: bool = False,
) -> Engine:
    """Load a model and return its Engine.

    `model` is a name from the catalog ("stories" is bundled), a Hugging Face repo id, or a folder;
    names are fetched where they are not on this machine, unless `offline`. `threads` defaults to
    the physical cores, `context_size` (in tokens) to 4096 or what the model was trained for.
    `quant`: "q8", "q4" or "bf16".

    While it downloads, huggingface_hub shows its progress bar on standard error; its variable
    HF_HUB_DISABLE_PROGRESS_BARS turns that off.

    Raises ModelNotFound, DownloadFailed, InvalidCheckpoint, UnsupportedModel, InvalidOption.
    """
    return Engine(
        resolve(model, offline=offline), threads=threads, quant=quant, context_size=context_size
    )
