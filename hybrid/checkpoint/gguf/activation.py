"""The activation that a model meant. GGUF files do not record it, and other engines compute SiLU.

A model that was trained with ReLU writes nonsense with SiLU, fluently. So the activation is taken
from the user, from a key of our own, or from the name of a known model, and a name that hints at a
sparse model is refused rather than guessed.
"""

from __future__ import annotations

import math
import re
from shlex import quote
from typing import NamedTuple

from hybrid.checkpoint.gguf.reader import GgufFile
from hybrid.errors import InvalidCheckpoint, InvalidOption, UnsupportedModel

KEY = "hybrid.activation"  # such as "fatrelu:0.03", in the files that hybrid writes
_WISH = re.compile(r"(silu|relu)|fatrelu:([0-9.eE+-]+)")
# Names of published models, and what their config.json says.
_KNOWN = (
    (r"minicpm-s-1b.*llama|prosparse-minicpm-1b.*llama", "relu", 0.0),
    (r"minicpm-s-1b|prosparse-minicpm-1b", "fatrelu", 0.03),
    (r"prosparse-llama-2-(7b|13b)", "fatrelu", 0.01),
    (r"relullama-(7b|13b|70b)", "relu", 0.0),
)
_HINTS = re.compile("prosparse|relu|bamboo|sparse|minicpm-s|smallthinker|spif", re.IGNORECASE)
# FFNs that this engine lacks, by the name of their activation.
DRELU = "dReLU (ReLU on gate and up)"
_MISSING = {
    "drelu": DRELU,
    "relu2": "ReLU² (the square of ReLU, in an FFN without a gate)",
}


class ChosenActivation(NamedTuple):
    name: str  # "silu", "relu" or "fatrelu"
    threshold: float
    notice: str | None  # for the user
    source: str | None = "the file's metadata"  # where it is known from; None: it is guessed


def parse_activation(text: str) -> tuple[str, float]:
    """Return the name and the threshold that an option names.

    Raises InvalidOption, and UnsupportedModel for an FFN that this engine lacks.
    """
    if text in _MISSING:
        raise UnsupportedModel(f"activation: not supported yet: {_MISSING[text]}")
    match = _WISH.fullmatch(text)
    try:
        threshold = float(match[2]) if match and match[2] else 0.0
    except ValueError:
        match = None
    if match is None or not 0 <= threshold < math.inf:
        raise InvalidOption(
            f"activation: expected silu, relu or fatrelu:T with a threshold, found {text!r:.60}"
        )
    return match[1] or "fatrelu", threshold


def choose_activation(file: GgufFile, wish: str | None) -> ChosenActivation:
    """Return a file's activation. Raises InvalidOption and UnsupportedModel."""
    if wish is not None:
        return ChosenActivation(*parse_activation(wish), None, "--activation")
    if (own := file.single(KEY)) is not None:
        try:
            return ChosenActivation(*parse_activation(str(own)), None, KEY)
        except InvalidOption as error:
            raise InvalidCheckpoint(f"{file.path}: {KEY}: {error}") from None
    if file.is_powerinfers and file.single("general.architecture") == "llama":
        notice = f"{file.path.name}: computed with relu, as PowerInfer computes such files"
        return ChosenActivation("relu", 0.0, notice, "PowerInfer's format")
    if file.single("general.architecture") == "prosparse-llama":
        notice = f"{file.path.name}: computed with fatrelu 0.01, as Kairox computes such files"
        return ChosenActivation("fatrelu", 0.01, notice, "Kairox's architecture")
    named = ("general.name", "general.basename", "general.finetune", "general.description")
    values = [file.single(key) for key in named]
    names = [file.path.stem, *[value for value in values if isinstance(value, str)]]
    architecture = file.single("general.architecture")
    for name in names:
        plain = re.sub(r"[\s_]+", "-", name.lower())
        for pattern, activation, threshold in _KNOWN:
            if re.search(pattern, plain):
                if architecture == "llama" and "minicpm" in pattern:
                    activation, threshold = "relu", 0.0  # the scales are folded into the weights
                shown = activation + (f" {threshold:g}" if activation == "fatrelu" else "")
                return ChosenActivation(
                    activation,
                    threshold,
                    f"{file.path.name}: computed with {shown}, because {name!r:.80} is known; "
                    "GGUF files do not say (--activation)",
                    f"the name {name!r:.80}",
                )
    if hint := next((name for name in names if _HINTS.search(name)), None):
        raise UnsupportedModel(
            f"{file.path}: GGUF files do not say which activation a model has, and {hint!r:.80} "
            "hints at ReLU: choose it with --activation relu (or silu, or fatrelu:0.01); "
            f"hybrid selfcheck -m {quote(str(file.path))} finds the one that fits"
        )
    return ChosenActivation("silu", 0.0, None, None)
