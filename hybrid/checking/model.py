"""Is all well with a model on this machine? One check after the other, each with a verdict.

What it is for: the first run on real weights. It finds damaged downloads, broken weights, kernels
that compute something else than the oracle, and, by sparsity and by how well a plain text is
predicted, scales and activations that config.json or we got wrong. It never prints.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from hybrid.checking import arithmetic, setting
from hybrid.checking.check import Check
from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.engine.engine import Engine, Quant
from hybrid.engine.oracle import comparison
from hybrid.errors import HybridError, InvalidOption
from hybrid.hub.catalog import CatalogEntry, catalog, resolve
from hybrid.hub.loading import load
from hybrid.kernels import Format
from hybrid.progress import Progress, ignore_progress

N_POSITIONS = 64
ENGLISH = (
    "Once upon a time there was a little girl who lived with her mother in a small house near the "
    "forest. One day her mother gave her a basket with bread and a bottle of milk, and said: "
    '"Take this to your grandmother. She is old and cannot leave her bed." The girl put on her red '
    "coat and went out of the door. It was a sunny day, and the birds were singing in the trees."
)
CHINESE = "从前有一个小女孩,她和妈妈一起住在森林旁边的一座小房子里。有一天,妈妈给了她一篮面包。"
N_CHINESE = 20  # positions of the 64, where the vocabulary is MiniCPM's


def check_model(
    model: str | Path,
    *,
    quant: Quant = "q8",
    threads: int | None = None,
    offline: bool = False,
    progress: Progress = ignore_progress,
) -> Iterator[Check]:
    """The checks, each as soon as it is done; ends early where a model cannot be used at all.

    Raises InvalidOption; every other error of ours is a failed check.
    """
    stage = "files"
    try:
        folder = resolve(model, offline=offline)
        entry = find_entry(model, folder)
        if folder.is_dir():
            yield setting.check_files(folder)
        stage = "architecture"
        with _open(folder, quant) as checkpoint:
            config = checkpoint.config
        yield setting.check_architecture(config)
        stage = "instruction set"
        yield setting.check_isa()
        yield setting.check_memory(config, quant)
        stage = "weights"
        started = time.perf_counter()
        with load(
            model, threads=threads, quant=quant, device="cpu", offline=offline, progress=progress
        ) as engine:
            yield setting.check_threads(engine.n_threads)
            yield _loaded(engine, time.perf_counter() - started)
            ids = text_ids(engine)
            run, at_once = comparison.run_native(engine, ids)
            n_threads = engine.n_threads
        yield arithmetic.check_prefill(run.logits, at_once)
        # A second load, not a second pool: only so is it certain that threads change no weights.
        other = 2 if n_threads == 1 else 1
        with load(model, threads=other, quant=quant, device="cpu", offline=offline) as engine:
            again = engine.open_session().prefill(np.asarray(ids, np.int64), all_logits=True)
        assert again is not None
        yield arithmetic.check_other_threads(at_once, again, n_threads, other)
        yield arithmetic.check_active_fraction(config, run, entry)
        yield arithmetic.check_text(config, run, ids, entry)
        stage = "oracle"
        with _open(folder, quant) as checkpoint:
            yield arithmetic.check_oracle(checkpoint, quant, run, ids, progress)
    except InvalidOption:
        raise
    except HybridError as error:
        yield Check(
            stage, "failed", str(error), "The rest cannot be checked before this is mended."
        )
    except MemoryError:
        advice = "Try --quant q4, close other programs, or take a machine with more memory."
        yield Check(stage, "failed", "Out of memory.", advice)


def find_entry(model: str | Path, folder: Path) -> CatalogEntry | None:
    """The catalog's entry of a model, also where it is a repository's copy in a folder."""
    text = str(model).casefold()
    for entry in catalog():
        names = [entry.name.casefold()]
        copies = []
        if entry.repo_id is not None:
            names.append(entry.repo_id.casefold())
            copies = [entry.name.casefold(), entry.repo_id.casefold().rpartition("/")[2]]
        if text in names or folder.name.casefold() in copies:
            return entry
    return None


def text_ids(engine: Engine) -> list[int]:
    """The first N_POSITIONS of the text, as far as the context goes."""
    n = min(N_POSITIONS, engine.n_context)
    ids = engine.tokenizer.encode(ENGLISH)
    if engine.tokenizer.has_chat_template and n == N_POSITIONS:  # MiniCPM's vocabulary
        skip_bos = 0 if engine.config.bos_id is None else 1
        ids = ids[: n - N_CHINESE] + engine.tokenizer.encode(CHINESE)[skip_bos:][:N_CHINESE]
    return ids[:n]


def _loaded(engine: Engine, seconds: float) -> Check:
    memory = psutil.Process().memory_info().rss
    notices = " ".join(engine.notices)
    message = f"Loaded in {seconds:.1f} s, memory {memory / 1e6:.0f} MB. {notices}"
    figures = {"seconds": seconds, "memory_bytes": memory}
    return Check("weights", "ok", message.rstrip(), figures=figures)


def _open(folder: Path, quant: Quant) -> Checkpoint:
    return open_checkpoint(folder, Format[quant])
