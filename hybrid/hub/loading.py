"""`load` opens a model by its name or folder and returns an Engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.engine.engine import Engine
from hybrid.engine.loading.pipeline import Request, load_parts
from hybrid.engine.options import LoadKeywords, LoadOptions, spelling_out
from hybrid.errors import InvalidOption
from hybrid.hub.catalog import hybrid_home, resolve
from hybrid.notices import Notices
from hybrid.progress import Progress, ignore_progress

if TYPE_CHECKING:
    from typing_extensions import Unpack


@spelling_out(LoadOptions)
def load(
    model: str | Path = "stories",
    *,
    options: LoadOptions | None = None,
    progress: Progress = ignore_progress,
    **keywords: Unpack[LoadKeywords],
) -> Engine:
    """Load a model and return its Engine.

    `model` is a name from the catalog ("stories" is bundled), a Hugging Face repo id, a folder, or
    a GGUF file. "owner/name:Q4_0" is a GGUF model of a repository.
    What looks like a path is always a folder, and "hf://owner/name" always a repo id. A model that
    is not on this machine is downloaded, unless `offline`. `threads` defaults to the physical cores
    that this process may use, or to fewer if a quota of CPU time is less than these. `context_size`
    (in tokens) defaults to 4096, or to the length that the model was trained for if that is less.
    `quant` is "q8", "q4", "bf16" or "f16" (on the CPU only). None suits the type of most weights of
    a GGUF file, as a notice says, and is "q8" for other models. `kv` is what the KV cache stores:
    "fp16", or "bf16" for models whose keys or values exceed 65504 (on the CPU only).

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
    which must be for the same model and neuron order. `Engine.prediction` says what is in use.

    `preview_head` estimates all logits from a 2-bit copy of the output head, so that a token reads
    fewer bytes, and computes the likeliest 4 % in full. Those are the model's own logits, and the
    others are estimates, which may change probabilities by some percent. It has no effect on
    vocabularies below 16,384 tokens, nor on a head on the GPU. `Engine.previews_head` says whether
    it is in use.

    `device` is "cpu", "cuda" or "auto". "auto" uses a GPU if `vram_budget` or `plan` requests one,
    or if `hybrid.setup` made a plan. `vram_budget` is the GPU memory in bytes that the whole
    process may use. The plan with the least predicted time decides what goes there, and the rest
    stays on the CPU. `plan` is a file of `hybrid.plan`; `Engine.plan` says what is where. PyTorch
    is loaded only if a GPU is used.

    `add_bos` says whether a text begins with the BOS token. None does as the model's tokenizer, and
    `Engine.notices` says so where the model's files disagree. Token ids are never changed.

    `activation` is that of a GGUF model, which does not record it: "silu", "relu", or "fatrelu:T"
    with a threshold. None knows some models by name, refuses a name that hints at ReLU, and takes
    SiLU otherwise.

    `chat_template` names one of the model's chat templates, a built-in one (minicpm, chatml,
    llama-2, llama-3, mistral, zephyr, gemma, phi-3, vicuna, alpaca), or a Jinja file. None takes
    the model's own, as transformers does.

    Keywords change what `options` says. `progress` is called during downloading and packing.

    Raises ModelNotFound, DownloadFailed, InvalidCheckpoint, InvalidArtifact, UnsupportedModel,
    InvalidOption, OutOfMemory, DeviceUnavailable, DeviceFailed.
    """
    options = replace(options or LoadOptions(), **keywords)
    notices = Notices()
    folder = resolve(model, offline=options.offline, progress=progress, notices=notices)
    return Engine(load_parts(Request(folder, options, _home(), progress, notices)))


def _home() -> Path | None:
    """Return hybrid's folder, or None if this user has no home directory."""
    try:
        return hybrid_home()
    except InvalidOption:
        return None
