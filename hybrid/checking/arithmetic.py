"""Compares what the engine computes with itself, with the oracle, and with published figures."""

from __future__ import annotations

import math

import numpy as np

from hybrid.checking.check import Check, Figures
from hybrid.engine.oracle import comparison
from hybrid.engine.oracle.comparison import Logits, OracleRuns, Run
from hybrid.hub.catalog import CatalogEntry
from hybrid.model.config import ModelConfig

ACTIVE_TOLERANCE = 0.03  # the text is short, and is not the one that the authors measured on
POOR_LOSS = 0.5  # share of log(vocab), the loss of guessing; trained models do better on English
PERPLEXITY_TOLERANCE = 0.1  # share of the perplexity; q4 changes it by 2 %
BLUNT = 0.25  # if rounding changes logits by this share of their deviation, it hides faults
# If rounding the weights changes logits by these shares of their deviation, that is a warning, or a
# failure. The bundled model and random ones of 2 to 12 layers had up to 0.003 in bf16, 0.033 in q8
# and 0.43 in q4. Unrelated logits differ by 1.4.
COARSE = {"bf16": 0.15, "f16": 0.15, "q8": 0.15, "q4": 0.5}
DESTRUCTIVE = {"bf16": 0.3, "f16": 0.3, "q8": 0.3, "q4": 1.0}
REPORT = (
    "Run it again with HYBRID_ISA=scalar. If all checks pass then, the kernels of this instruction "
    "set are broken; else the weights were damaged while they were loaded. Please report it in "
    "either case."
)


def check_prefill(one_by_one: Logits, at_once: Logits) -> Check:
    name, n = "prefill = decode", len(at_once)
    if not np.isfinite(at_once).all():
        message = "The engine computes logits that are not finite."
        return Check(name, "failed", message, "See the result of the oracle below.")
    if np.array_equal(one_by_one, at_once):
        return Check(name, "ok", f"Bit-equal over {n} positions.", figures={"positions": n})
    message = f"{n} positions give other logits at once than one by one: the kernels are faulty."
    return Check(name, "failed", message, REPORT)


def check_other_threads(logits: Logits, again: Logits, n_threads: int, other: int) -> Check:
    name = f"{n_threads} = {other} threads"
    if np.array_equal(logits, again, equal_nan=True):
        return Check(name, "ok", "The number of threads does not change a single bit.")
    message = "The number of threads changes the logits: the kernels or the memory are faulty."
    return Check(name, "failed", message, REPORT)


def check_active_fraction(config: ModelConfig, run: Run, entry: CatalogEntry | None) -> Check:
    active = float(run.active.sum() / (run.active.size * config.n_neurons))
    figures: dict[str, float] = {"active_fraction": active}
    expected = entry.expected_active_fraction if entry else None
    if expected is None:
        if not config.is_sparse:
            message = "SiLU: no neuron is ever zero, so none is skipped."
            return Check("active neurons", "ok", message, figures=figures)
        message = f"{active:.1%} of FFN neurons; there is no published figure to compare with."
        return Check("active neurons", "ok", message, figures=figures)
    figures["expected"] = expected
    message = f"{active:.1%} of FFN neurons; its authors published {expected:.1%}"
    if abs(active - expected) <= ACTIVE_TOLERANCE:
        return Check("active neurons", "ok", f"{message}.", figures=figures)
    message += f"; a difference of more than {ACTIVE_TOLERANCE * 100:.0f} points is an error."
    advice = (
        "The scales, the threshold or the activation are wrong. Compare the architecture above "
        "with the model's card, and download config.json again. If that does not help, report it "
        "with this output."
    )
    return Check("active neurons", "failed", message, advice, figures)


def check_text(config: ModelConfig, run: Run, ids: list[int], entry: CatalogEntry | None) -> Check:
    loss, guessing = comparison.mean_loss(run.logits, ids), math.log(config.vocab_size)
    message = (
        f"Perplexity {math.exp(min(loss, 700)):.4g} on a plain text of {len(ids)} tokens; guessing "
        f"would give {config.vocab_size}."
    )
    figures: dict[str, float] = {"loss": loss, "guessing": guessing}
    expected = entry.expected_perplexity if entry else None
    if expected is not None:
        figures["expected_perplexity"] = expected
        message = f"{message[:-1]}, and {expected:.4g} is expected."
        if not abs(math.exp(min(loss, 700)) / expected - 1) <= PERPLEXITY_TOLERANCE:
            advice = "Weights, scales or tokenizer are of another model: install this one again."
            return Check("text", "failed", message, advice, figures)
    if loss <= POOR_LOSS * guessing:
        return Check("text", "ok", message, figures=figures)
    advice = (
        "A trained model does far better, so the weights, scales or tokenizer are wrong. (Weights "
        "that are random on purpose do no better.)"
    )
    return Check("text", "failed" if entry else "warning", message, advice, figures)


def check_rounding(runs: OracleRuns, quant: str, n_neurons: int) -> Check:
    """Compare the oracle with rounded weights and the one that rounds nothing.

    Weights that a format cannot hold are found here alone: engine and oracle round them alike.
    """
    if not np.isfinite(runs.fp32.logits).all() or not runs.fp32.logits.std() > 0:
        message = "In fp32 too, the model computes no usable logits: it is broken."
        return Check("rounding", "failed", message, "Download the model again.")
    found = comparison.compare(runs.rounded_weights, runs.fp32, n_neurons)
    figures: Figures = {
        "rms": found.rms,
        "max": found.largest,
        "worst_position": found.worst_position,
    }
    message = (
        f"Rounding the weights to {quant} changes logits by {found.rms:.2%} of their deviation, at "
        f"most by {found.largest:.2%}."
    )
    advice = "" if quant == "bf16" else "Try --quant bf16."
    if not found.rms <= DESTRUCTIVE[quant]:
        message += f" More than {DESTRUCTIVE[quant]:.0%} means that the format cannot hold them."
        return Check("rounding", "failed", message, advice, figures)
    if found.rms > COARSE[quant]:
        message += f" More than {COARSE[quant]:.0%} changes the text."
        return Check("rounding", "warning", message, advice, figures)
    return Check("rounding", "ok", message, figures=figures)


def check_oracle(
    runs: OracleRuns, run: Run, ids: list[int], n_neurons: int, seconds: float
) -> Check:
    """Compare the engine with the NumPy oracle, which reads the checkpoint's weights itself.

    `seconds` is how long the oracles took.
    """
    oracle, unrounded, _ = runs
    if not np.isfinite(oracle.logits).all() or not oracle.logits.std() > 0:
        message = "The oracle also computes no usable logits: the weights or the config are broken."
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
        f"{bound.rms:.2%}), at most by {found.largest:.2%} (bound {bound.largest:.2%}), at "
        f"position {found.worst_position}. At least {found.flips:.3%} of the masks flipped (bound "
        f"{bound.flips:.3%}). The likeliest token is equal at {n_equal} positions, and at "
        f"{n_clear_equal} of the {n_clear} positions that have a clear one. {seconds:.0f} s."
    )
    if not comparison.is_within(found, bound) or n_clear_equal < n_clear:
        return Check("oracle", "failed", message, REPORT, figures)
    if yardstick.rms > BLUNT:
        advice = "Rounding alone changes the logits enough to hide a fault: try --quant bf16."
        return Check("oracle", "warning", message, advice, figures)
    return Check("oracle", "ok", message, figures=figures)
