"""Tries activations on a model whose file records none, and names the one that fits.

A model predicts a plain text far better with the activation that it was trained with: the bundled
model and two published ones had 14 to 630 times the perplexity with SiLU in place of ReLU, or the
reverse. Thresholds of FATReLU change it by a percent or two, so a short text cannot tell them from
plain ReLU. ReLU is then named: it leaves out nothing that a threshold keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import cast

import numpy as np

from hybrid.checking.arithmetic import POOR_LOSS
from hybrid.checking.check import Check, Verdict
from hybrid.checkpoint.gguf import is_gguf
from hybrid.checkpoint.gguf.activation import choose_activation, parse_activation
from hybrid.checkpoint.gguf.architecture import architecture_of
from hybrid.checkpoint.gguf.reader import read_gguf
from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.loading.pipeline import Parts, Request, load_parts
from hybrid.engine.options import LoadOptions
from hybrid.engine.oracle.comparison import mean_loss
from hybrid.errors import UnsupportedModel
from hybrid.model.config import Activation
from hybrid.progress import Progress, ignore_progress

CANDIDATES = ("silu", "relu", "fatrelu:0.01", "fatrelu:0.03")
CLEAR = 3.0  # times the perplexity of the best
ALIKE = 1.05  # a threshold that lowers the perplexity by less than this factor proves nothing
ACTIVE = (0.01, 0.5)  # share of the neurons of published ReLU models, with some room
_UNKNOWN = "The model's card or config.json says it: choose --activation silu, relu or fatrelu:T."


@dataclass(frozen=True, slots=True)
class Attempt:
    """A model's computation with one activation."""

    activation: str  # as --activation spells it
    perplexity: float  # inf if the logits are not finite
    active: float  # share of the neurons that fire

    @property
    def is_relu(self) -> bool:
        return self.activation != "silu"


@dataclass(frozen=True, slots=True)
class Attempts:
    all: tuple[Attempt, ...]
    n_tokens: int
    vocab_size: int

    @property
    def fitting(self) -> Attempt | None:
        """The activation that fits clearly better than those of the other kind, if one does."""
        best = min(self.all, key=lambda attempt: attempt.perplexity)
        others = [a.perplexity for a in self.all if a.is_relu != best.is_relu]
        if not best.perplexity * CLEAR <= min(others):
            return None
        if best.perplexity > self.vocab_size**POOR_LOSS:  # weights that are random, or broken
            return None
        fitting = self.alike(best)[0]
        least, most = ACTIVE if fitting.is_relu else (0.0, 1.0)
        return fitting if least <= fitting.active <= most else None

    def alike(self, best: Attempt) -> list[Attempt]:
        """Return the attempts of the same kind that are no worse, the plainest first."""
        kind = [a for a in self.all if a.is_relu == best.is_relu]
        return [a for a in kind if a.perplexity <= best.perplexity * ALIKE]


def needs_attempts(path: Path, wish: str | None) -> bool:
    """Return whether nothing but the user or a guess says which activation a model has.

    Raises InvalidCheckpoint, and UnsupportedModel for its architecture.
    """
    if not is_gguf(path):
        return False
    architecture_of(read_gguf(path))  # another one has another FFN, perhaps
    return wish is not None or is_refused(path, wish) or _is_guessed(path)


def _is_guessed(path: Path) -> bool:
    return choose_activation(read_gguf(path), None).source is None


def is_refused(path: Path, wish: str | None) -> bool:
    """Return whether a GGUF file does not run unless its activation is chosen."""
    try:
        choose_activation(read_gguf(path), wish)
    except UnsupportedModel:
        return True
    return False


def try_activations(
    path: Path, text: str, options: LoadOptions, progress: Progress = ignore_progress
) -> Attempts:
    """Compute a text with each candidate and with the activation that the user chose.

    Packed weights do not depend on the activation, so the model is packed once, in memory. Raises
    what `hybrid.load` raises.
    """
    wish = options.activation
    candidates = dict.fromkeys((*CANDIDATES, *([wish] if wish else [])))
    parts = load_parts(Request(path, replace(options, activation=CANDIDATES[0]), None, progress))
    ids = parts.tokenizer.encode(text)[: parts.spec.n_context]
    attempts = tuple(_attempt(parts, candidate, ids) for candidate in candidates)
    return Attempts(attempts, len(ids), parts.spec.config.vocab_size)


def _attempt(parts: Parts, candidate: str, ids: list[int]) -> Attempt:
    name, threshold = parse_activation(candidate)
    spec = parts.spec
    config = replace(spec.config, activation=cast(Activation, name), threshold=threshold)
    executor = CpuExecutor(
        parts.loaded.model,
        replace(spec.layout, config=config),
        n_threads=spec.n_threads,
        n_context=spec.n_context,
    )
    session = executor.open_session(kv=spec.kv)
    logits = session.prefill(np.asarray(ids, np.int64), all_logits=True)
    assert logits is not None
    loss = mean_loss(logits, ids)
    # A wrong activation may overflow.
    perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf
    n_neurons = len(ids) * config.n_layers * config.n_neurons
    return Attempt(candidate, perplexity, sum(session.active_counts) / n_neurons)


def check_activation(attempts: Attempts, path: Path, wish: str | None) -> Check:
    """Compare the activation that would be used with the one that fits."""
    name, found = "activation", attempts.fitting
    figures = {f"perplexity_{a.activation}": a.perplexity for a in attempts.all}
    figures |= {f"active_{a.activation}": a.active for a in attempts.all}
    table = (
        f"{'activation':14}{'perplexity':>11}{'active':>9}",
        *(f"{a.activation:14}{a.perplexity:>11.4g}{a.active:>9.1%}" for a in attempts.all),
    )
    begin = f"The file does not record it. Over {attempts.n_tokens} tokens of plain text"
    must_choose = is_refused(path, wish)
    if found is None:
        verdict: Verdict = "failed" if must_choose else "warning"
        message = f"{begin} none fits well, and clearly better than the others."
        return Check(name, verdict, message, _UNKNOWN, figures, table)
    message = f"{begin} {found.activation} fits."
    alike = [a.activation for a in attempts.alike(found)]
    if len(alike) > 1:
        message += f" Such a text cannot tell {', '.join(alike)} from one another."
    advice = f"Run it with: -m {quote(str(path))} --activation {found.activation}"
    if must_choose:
        return Check(name, "warning", message, advice, figures, table)
    used = wish or "silu"
    if used in alike:
        return Check(name, "ok", message, figures=figures, table=table)
    return Check(name, "failed", f"{message} {used} does not.", advice, figures, table)
