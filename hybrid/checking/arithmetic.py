"""What the engine computes: against itself, against the oracle, and against what is known of the
model.
"""

from __future__ import annotations

import math
import time

import numpy as np

from hybrid.checking.check import Check, Figures
from hybrid.checkpoint import Checkpoint
from hybrid.engine.engine import Quant
from hybrid.engine.oracle import comparison
from hybrid.engine.oracle.comparison import Logits, Run
from hybrid.hub.catalog import CatalogEntry
from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.progress import Progress

ACTIVE_TOLERANCE = 0.03  # the text is short, and not the one that the authors measured on
POOR_LOSS = 0.5  # of log(vocab), what guessing costs: no trained model is so poor at plain English
PERPLEXITY_TOLERANCE = 0.1  # of it; q4 moves it by 2 %
BLUNT = 0.25  # rounding that moves logits by such a share of their deviation hides faults
REPORT = (
    "Run it again with HYBRID_ISA=scalar: if all is well then, the kernels of this instruction set "
    "are broken; else weights were damaged on the way into memory. Please report it either way."
)


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
    figures: dict[str, float] = {"active_fraction": active}
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
    figures: dict[str, float] = {"loss": loss, "guessing": guessing}
    expected = entry.expected_perplexity if entry else None
    if expected is not None:
        figures["expected_perplexity"] = expected
        message = f"{message[:-1]}, and {expected:.4g} is expected."
        if not abs(math.exp(min(loss, 700)) / expected - 1) <= PERPLEXITY_TOLERANCE:
            advice = "Weights, scales or tokenizer are not those of this model: install it again."
            return Check("text", "failed", message, advice, figures)
    if loss <= POOR_LOSS * guessing:
        return Check("text", "ok", message, figures=figures)
    advice = (
        "A trained model does far better: wrong weights, scales or tokenizer. (Weights that are "
        "random on purpose do no better.)"
    )
    return Check("text", "failed" if entry else "warning", message, advice, figures)


def check_oracle(
    checkpoint: Checkpoint, quant: Quant, run: Run, ids: list[int], progress: Progress
) -> Check:
    """Engine against the NumPy oracle, which reads the weights itself, from the checkpoint."""
    format, started = Format[quant], time.perf_counter()
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
    figures: Figures = {
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
