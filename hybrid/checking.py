"""Is all well with a model on this machine? One check after the other, each with a verdict.

What it is for: the first run on real weights. It finds damaged downloads, broken weights, kernels
that compute something else than the oracle, and, by sparsity and by how well a plain text is
predicted, scales and activations that config.json or we got wrong. It never prints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from hybrid import checksum
from hybrid.catalog import CatalogEntry, catalog, resolve
from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.engine import comparison
from hybrid.engine.comparison import Logits, Run
from hybrid.engine.engine import Engine, Quant
from hybrid.errors import HybridError, InvalidOption, UnsupportedIsa
from hybrid.kernels import Format, active_isa, available_isas, check_isa_cap
from hybrid.loading import load
from hybrid.model_config import ModelConfig
from hybrid.progress import Progress, ignore_progress

Verdict = Literal["ok", "warning", "failed"]

N_POSITIONS = 64
ENGLISH = (
    "Once upon a time there was a little girl who lived with her mother in a small house near the "
    "forest. One day her mother gave her a basket with bread and a bottle of milk, and said: "
    '"Take this to your grandmother. She is old and cannot leave her bed." The girl put on her red '
    "coat and went out of the door. It was a sunny day, and the birds were singing in the trees."
)
CHINESE = "从前有一个小女孩,她和妈妈一起住在森林旁边的一座小房子里。"
N_CHINESE = 20  # positions of the 64, where the vocabulary is MiniCPM's
ACTIVE_TOLERANCE = 0.03  # the text is short, and not the one that the authors measured on
POOR_LOSS = 0.5  # of log(vocab), what guessing costs: no trained model is so poor at plain English
BLUNT = 0.25  # rounding that moves logits by such a share of their deviation hides faults
WEIGHT_BYTES = {"bf16": 2.0, "q8": 34 / 32, "q4": 18 / 32}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    message: str  # one line of plain English
    advice: str = ""  # what to do, where the verdict is not ok
    figures: dict[str, float | int | str] = field(default_factory=dict)


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
            yield check_files(folder)
        stage = "architecture"
        with _open(folder, quant) as checkpoint:
            config = checkpoint.config
        yield check_architecture(config)
        stage = "instruction set"
        yield check_isa()
        yield check_memory(config, quant)
        stage = "weights"
        started = time.perf_counter()
        with load(folder, threads=threads, quant=quant, offline=offline) as engine:
            yield check_threads(engine.n_threads)
            yield _loaded(engine, time.perf_counter() - started)
            ids = text_ids(engine)
            run, at_once = comparison.run_native(engine, ids)
            n_threads = engine.n_threads
        yield check_prefill(run.logits, at_once)
        # A second load, not a second pool: only so is it certain that threads change no weights.
        other = 2 if n_threads == 1 else 1
        with load(folder, threads=other, quant=quant, offline=offline) as engine:
            again = engine.open_session().prefill(np.asarray(ids, np.int64), all_logits=True)
        assert again is not None
        yield check_other_threads(at_once, again, n_threads, other)
        yield check_active_fraction(config, run, entry)
        yield check_text(config, run, ids, entry)
        stage = "oracle"
        yield check_oracle(folder, quant, run, ids, progress)
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


def check_files(folder: Path) -> Check:
    """Hashes whatever has a known checksum, even what was found well before: disks forget."""
    known, wrong = 0, []
    for path in sorted(folder.iterdir()):
        etag = checksum.known_etag(path) if path.is_file() else None
        if etag is not None:
            known += 1
            if checksum.digest(path, etag) != etag:
                wrong.append(path)
    figures = {"checked": known, "wrong": len(wrong)}
    if wrong:
        message = f"Damaged, the checksum is another: {', '.join(path.name for path in wrong)}."
        paths = " ".join(str(path.resolve()) for path in wrong)
        return Check("files", "failed", message, f"Remove {paths} and download again.", figures)
    if not known:
        message = f"{folder}: nothing there tells the files' checksums, so none was checked."
        return Check("files", "ok", message, figures=figures)
    return Check("files", "ok", f"{known} files match their checksums.", figures=figures)


def check_architecture(config: ModelConfig) -> Check:
    activation = {"relu": "ReLU", "fatrelu": f"FATReLU, threshold {config.threshold:g}"}
    message = (
        f"{config.family}: {config.n_layers} layers of {config.hidden_size} with "
        f"{config.n_neurons} neurons, {config.n_heads} heads ({config.n_kv_heads} for keys and "
        f"values), {config.vocab_size} tokens; {activation.get(config.activation, 'SiLU')}; scales "
        f"of embedding {config.embedding_scale:g}, branches {config.residual_scale:.4g}, logits "
        f"{config.logit_scale:.4g}."
    )
    figures: dict[str, float | int | str] = {
        "activation": config.activation,
        "threshold": config.threshold,
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": config.logit_scale,
    }
    if config.family == "minicpm" and config.embedding_scale == 1.0:
        advice = "MiniCPM's config.json gives scale_emb, scale_depth and dim_model_base: fetch it."
        return Check("architecture", "warning", message + " No scales!", advice, figures)
    return Check("architecture", "ok", message, figures=figures)


def check_isa() -> Check:
    try:
        check_isa_cap()
    except UnsupportedIsa as error:
        return Check("instruction set", "failed", str(error), "Unset HYBRID_ISA.")
    best, active = available_isas()[-1], active_isa()
    figures: dict[str, float | int | str] = {"best": best, "active": active}
    if active != best:
        message = f"{active}, although {best} is there: HYBRID_ISA caps it."
        return Check("instruction set", "warning", message, "Unset HYBRID_ISA.", figures)
    if "avx2" not in available_isas():
        message = (
            f"{active}: this CPU or this build lacks AVX2, so the portable kernels run, slowly."
        )
        advice = "If the CPU has AVX2, install hybrid again on this machine."
        return Check("instruction set", "warning", message, advice, figures)
    return Check("instruction set", "ok", f"{active}, the best of this CPU.", figures=figures)


def check_memory(config: ModelConfig, quant: Quant) -> Check:
    attention = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    n_weights = config.hidden_size * (
        config.vocab_size * (1 if config.has_tied_head else 2)
        + config.n_layers * (attention + 3 * config.n_neurons)
    )
    weights, oracle = n_weights * WEIGHT_BYTES[quant], comparison.oracle_bytes(config)
    available = psutil.virtual_memory().available
    message = (
        f"{weights / 1e9:.2f} GB of weights in {quant}, then {oracle / 1e9:.2f} GB for the oracle; "
        f"{available / 1e9:.1f} GB are free."
    )
    figures: dict[str, float | int | str] = {
        "weight_bytes": int(weights),
        "oracle_bytes": oracle,
        "available_bytes": available,
    }
    if max(weights, oracle) > available:
        advice = "Close other programs, or try --quant q4: else the system may swap or end hybrid."
        return Check("memory", "warning", message, advice, figures)
    return Check("memory", "ok", message, figures=figures)


def check_threads(n_threads: int) -> Check:
    cores = psutil.cpu_count(logical=False) or n_threads
    message = f"{n_threads} for {cores} physical cores."
    figures: dict[str, float | int | str] = {"threads": n_threads, "physical_cores": cores}
    if n_threads > cores:
        advice = f"More threads than cores only wait for one another: -t {cores}."
        return Check("threads", "warning", message, advice, figures)
    return Check("threads", "ok", message, figures=figures)


def text_ids(engine: Engine) -> list[int]:
    """The first N_POSITIONS of the text, as far as the context goes."""
    n = min(N_POSITIONS, engine.n_context)
    ids = engine.tokenizer.encode(ENGLISH)
    if engine.tokenizer.has_chat_template and n == N_POSITIONS:  # MiniCPM's vocabulary
        skip_bos = 0 if engine.config.bos_id is None else 1
        ids = ids[: n - N_CHINESE] + engine.tokenizer.encode(CHINESE)[skip_bos:][:N_CHINESE]
    return ids[:n]


def check_prefill(one_by_one: Logits, at_once: Logits) -> Check:
    name, n = "prefill = decode", len(at_once)
    if not np.isfinite(at_once).all():
        message = "The engine computes logits that are not finite."
        return Check(name, "failed", message, "See what the oracle says below.")
    if np.array_equal(one_by_one, at_once):
        return Check(name, "ok", f"Bit-equal over {n} positions.", figures={"positions": n})
    message = f"{n} positions at once give other logits than one by one: a fault of the kernels."
    return Check(name, "failed", message, REPORT)


def check_other_threads(logits: Logits, again: Logits, n_threads: int, other: int) -> Check:
    name = f"{n_threads} = {other} threads"
    if np.array_equal(logits, again, equal_nan=True):
        return Check(name, "ok", "The number of threads changes no bit.")
    message = "The number of threads changes the logits: a fault of the kernels or of the memory."
    return Check(name, "failed", message, REPORT)


def check_active_fraction(config: ModelConfig, run: Run, entry: CatalogEntry | None) -> Check:
    active = float(run.active.sum() / (run.active.size * config.n_neurons))
    figures: dict[str, float | int | str] = {"active_fraction": active}
    expected = entry.expected_active_fraction if entry else None
    if expected is None:
        if not config.is_sparse:
            message = "SiLU: no neuron is ever zero, so none is skipped."
            return Check("active neurons", "ok", message, figures=figures)
        message = f"{active:.1%} of FFN neurons; nothing published to compare with."
        return Check("active neurons", "ok", message, figures=figures)
    figures["expected"] = expected
    message = f"{active:.1%} of FFN neurons; its authors published {expected:.1%}"
    if abs(active - expected) <= ACTIVE_TOLERANCE:
        return Check("active neurons", "ok", f"{message}.", figures=figures)
    message += f", and more than {ACTIVE_TOLERANCE * 100:.0f} points apart is no accident."
    advice = (
        "Wrong scales, threshold or activation: compare the architecture above with the model's "
        "card, fetch config.json again; else report it with this output."
    )
    return Check("active neurons", "failed", message, advice, figures)


def check_text(config: ModelConfig, run: Run, ids: list[int], entry: CatalogEntry | None) -> Check:
    loss, guessing = comparison.mean_loss(run.logits, ids), math.log(config.vocab_size)
    message = (
        f"Perplexity {math.exp(min(loss, 700)):.4g} on a plain text of {len(ids)} tokens; guessing "
        f"would have {config.vocab_size}."
    )
    figures: dict[str, float | int | str] = {"loss": loss, "guessing": guessing}
    if loss <= POOR_LOSS * guessing:
        return Check("text", "ok", message, figures=figures)
    advice = (
        "A trained model does far better: wrong weights, scales or tokenizer. (Weights that are "
        "random on purpose do no better.)"
    )
    return Check("text", "failed" if entry else "warning", message, advice, figures)


def check_oracle(folder: Path, quant: Quant, run: Run, ids: list[int], progress: Progress) -> Check:
    """Engine against the NumPy oracle, which reads the weights itself, from the checkpoint."""
    format, started = Format[quant], time.perf_counter()
    with _open(folder, quant) as checkpoint:
        n_neurons = checkpoint.config.n_neurons
        oracle, unrounded = comparison.run_oracles(checkpoint, format, ids, progress=progress)
    seconds = time.perf_counter() - started
    if not np.isfinite(oracle.logits).all() or not oracle.logits.std() > 0:
        message = (
            "The oracle, too, computes no usable logits: the weights or the config are broken."
        )
        return Check("oracle", "failed", message, "Download the model again.")
    yardstick = comparison.compare(unrounded, oracle, n_neurons)
    bound = comparison.bounds(yardstick)
    found = comparison.compare(run, oracle, n_neurons)
    margin = 2 * bound.largest * float(oracle.logits.std())
    n_equal, n_clear_equal, n_clear = comparison.argmax_agreement(run, oracle, margin)
    figures: dict[str, float | int | str] = {
        "positions": len(ids),
        "seconds": seconds,
        "rms": found.rms,
        "rms_bound": bound.rms,
        "max": found.largest,
        "max_bound": bound.largest,
        "worst_position": found.worst_position,
        "mask_flips": found.flips,
        "mask_flips_bound": bound.flips,
        "argmax_equal": n_equal,
        "argmax_clear": n_clear,
        "argmax_clear_equal": n_clear_equal,
        "rounding_rms": yardstick.rms,
    }
    message = (
        f"Over {len(ids)} positions logits differ by {found.rms:.2%} of their deviation (bound "
        f"{bound.rms:.2%}), at most {found.largest:.2%} ({bound.largest:.2%}), most at position "
        f"{found.worst_position}; at least {found.flips:.3%} of masks flipped ({bound.flips:.3%}); "
        f"likeliest token equal at {n_equal}, at {n_clear_equal} of the {n_clear} where it is "
        f"clear. {seconds:.0f} s."
    )
    if not comparison.is_within(found, bound) or n_clear_equal < n_clear:
        return Check("oracle", "failed", message, REPORT, figures)
    if yardstick.rms > BLUNT:
        advice = "Rounding alone moves the logits so far that a fault could hide: try --quant bf16."
        return Check("oracle", "warning", message, advice, figures)
    return Check("oracle", "ok", message, figures=figures)


REPORT = (
    "Run it again with HYBRID_ISA=scalar: if all is well then, the kernels of this instruction set "
    "are broken; else weights were damaged on the way into memory. Please report it either way."
)


def _loaded(engine: Engine, seconds: float) -> Check:
    memory = psutil.Process().memory_info().rss
    notices = " ".join(engine.notices)
    message = f"All finite, loaded in {seconds:.1f} s, memory {memory / 1e6:.0f} MB. {notices}"
    figures = {"seconds": seconds, "memory_bytes": memory}
    return Check("weights", "ok", message.rstrip(), figures=figures)


def _open(folder: Path, quant: Quant) -> Checkpoint:
    return open_checkpoint(folder)
