"""Checks whether a model works correctly on this machine: a list of checks, each with a verdict.

It is meant for the first run on real weights. It finds damaged downloads, broken weights, and
kernels that differ from the oracle. The sparsity and the loss on a plain text also reveal wrong
scales and activations, whether the fault is in config.json or in our code. It never prints.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from hybrid.checking import activations, arithmetic, setting
from hybrid.checking.check import Check
from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.name import model_name
from hybrid.checkpoint.roles import unused_notice
from hybrid.engine.engine import Engine
from hybrid.engine.options import KvName, LoadOptions, Quant
from hybrid.engine.oracle import comparison
from hybrid.errors import HybridError, InvalidOption
from hybrid.hub.catalog import CatalogEntry, catalog, resolve
from hybrid.hub.loading import load
from hybrid.kernels import KvFormat
from hybrid.progress import Progress, ignore_progress

N_POSITIONS = 64
ENGLISH = (
    "Once upon a time there was a little girl who lived with her mother in a small house near the "
    "forest. One day her mother gave her a basket with bread and a bottle of milk, and said: "
    '"Take this to your grandmother. She is old and cannot leave her bed." The girl put on her red '
    "coat and went out of the door. It was a sunny day, and the birds were singing in the trees."
)
CHINESE = "从前有一个小女孩,她和妈妈一起住在森林旁边的一座小房子里。有一天,妈妈给了她一篮面包。"
N_CHINESE = 20  # of the 64 positions, if the vocabulary is MiniCPM's


def check_model(
    model: str | Path,
    *,
    quant: Quant | None = None,
    kv: KvName = "fp16",
    threads: int | None = None,
    activation: str | None = None,
    offline: bool = False,
    progress: Progress = ignore_progress,
) -> Iterator[Check]:
    """Yield each check as soon as it is done. Ends early if the model cannot be used at all.

    If nothing says which activation a GGUF file has, each candidate is tried on a text. If the file
    does not run until one is chosen, the checks go on with the one that fits. `activation` is that
    of `hybrid.load`.

    Raises InvalidOption. Every other HybridError becomes a failed check.
    """
    stage = "files"
    options = LoadOptions(
        quant=quant,
        kv=kv,
        threads=threads,
        activation=activation,
        device="cpu",
        offline=offline,
    )
    try:
        folder = resolve(model, offline=offline)
        entry = find_entry(model, folder)
        if folder.is_dir():
            yield setting.check_files(folder)
        stage = "activation"
        if activations.needs_attempts(folder, activation):
            attempts = activations.try_activations(folder, ENGLISH, options, progress)
            yield activations.check_activation(attempts, folder, activation)
            if activations.is_refused(folder, activation):
                if attempts.fitting is None:
                    return
                options = replace(options, activation=attempts.fitting.activation)
        stage = "architecture"
        with open_checkpoint(folder, options.format, activation=options.activation) as checkpoint:
            config, format = checkpoint.config, checkpoint.format
        assert format is not None
        yield setting.check_architecture(config)
        yield setting.check_tensors(checkpoint.unused_tensors)
        stage = "instruction set"
        yield setting.check_isa()
        yield setting.check_memory(config, format)
        stage = "weights"
        started = time.perf_counter()
        with load(model, options=options, progress=progress) as engine:
            seconds = time.perf_counter() - started
            engine.wait_for_weights()  # a check of damaged weights says nothing of the model
            yield setting.check_threads(engine.n_threads)
            yield _loaded(engine, unused_notice(checkpoint.unused_tensors), seconds)
            ids = text_ids(engine)
            run, at_once = comparison.run_native(engine, ids)
            n_threads = engine.n_threads
        yield arithmetic.check_prefill(run.logits, at_once)
        # Load again rather than use a second pool, to prove that threads change no weights either.
        other = 2 if n_threads == 1 else 1
        with load(model, options=options, threads=other) as engine:
            engine.wait_for_weights()
            again = engine.open_session().prefill(np.asarray(ids, np.int64), all_logits=True)
        assert again is not None
        yield arithmetic.check_other_threads(at_once, again, n_threads, other)
        yield arithmetic.check_active_fraction(config, run, entry)
        yield arithmetic.check_text(config, run, ids, entry)
        stage = "oracle"
        started = time.perf_counter()
        with open_checkpoint(folder, format, activation=options.activation) as checkpoint:
            runs = comparison.run_oracles(
                checkpoint, format, ids, kv=KvFormat[kv], progress=progress
            )
        seconds = time.perf_counter() - started
        yield arithmetic.check_oracle(runs, run, ids, config.n_neurons, seconds)
        yield arithmetic.check_rounding(runs, format.name, config.n_neurons)
    except InvalidOption:
        raise
    except HybridError as error:
        yield Check(
            stage, "failed", str(error), "The rest cannot be checked before this is repaired."
        )
    except MemoryError:
        advice = "Try --quant q4, close other programs, or use a machine with more memory."
        yield Check(stage, "failed", "Out of memory.", advice)


def find_entry(model: str | Path, folder: Path) -> CatalogEntry | None:
    """Return a model's entry in the catalog, even if it is a copy of a repository in a folder."""
    text = str(model).casefold()
    for entry in catalog():
        names = [entry.name.casefold()]
        copies = []  # names of folders that hold the repository
        if entry.repo_id is not None:
            names.append(entry.repo_id.casefold())
            copies = [*names, entry.repo_id.casefold().rpartition("/")[2]]
        if text in names or model_name(folder).casefold() in copies:
            return entry
    return None


def text_ids(engine: Engine) -> list[int]:
    """Return the ids of the text's first N_POSITIONS, or fewer if the context is smaller."""
    n = min(N_POSITIONS, engine.n_context)
    ids = engine.tokenizer.encode(ENGLISH)
    chinese = engine.tokenizer.encode_continuation(CHINESE)
    if len(chinese) < len(CHINESE) and n == N_POSITIONS:  # the vocabulary has Chinese words
        ids = ids[: n - N_CHINESE] + chinese[:N_CHINESE]
    return ids[:n]


def _loaded(engine: Engine, told: str, seconds: float) -> Check:
    """Describe the loading. `told` is a notice that another check has shown."""
    memory = psutil.Process().memory_info().rss
    notices = "; ".join(notice for notice in engine.notices if notice != told)
    message = f"Loaded in {seconds:.1f} s, memory {memory / 1e6:.0f} MB. {notices}"
    figures = {"seconds": seconds, "memory_bytes": memory}
    return Check("weights", "ok", message.rstrip(), figures=figures)
