"""Our predictors in PowerInfer's form: fc2 · relu(fc1 · x) >= 0, for x before the norm, no bias.

Ours are b (a h) + bias >= 0 for the normed input h = w ∘ x / rms(x). Multiplied by rms(x), which is
positive, this is b (a ∘ w) x + bias · rms(x) >= 0. The first part is exact: z = relu(z) - relu(-z),
so the rank doubles. rms(x) is no linear function of x, but it grows with x as relu(fc1 x) does.
So it is approximated by a sum of these same numbers, fitted on tokens that the model writes, and
the rank does not grow. How well the result finds active neurons is measured on other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid.checking.model import ENGLISH
from hybrid.engine.engine import Engine
from hybrid.engine.session import Observation
from hybrid.errors import NumericOverflow
from hybrid.progress import Progress
from predictors.predictors import WIDE_RANK, LowRank

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
N_TEXTS, TEXT_TOKENS = 8, 192  # that the model writes
_HELD_OUT = 4  # every fourth text measures, the others are fitted on
_RIDGE = 1e-3  # of the number of tokens
_LEAST_RANK = 32  # of a layer whose gates are all computed


class Observed(NamedTuple):
    """What a layer saw. `x` is divided by its root mean square, which changes no sign."""

    x: Floats  # (tokens, hidden): before the norm
    active: NDArray[np.bool_]  # (tokens, n_neurons), in packed order


class Converted(NamedTuple):
    """A layer's predictor in PowerInfer's form. Neurons are in the checkpoint's order."""

    fc1: Halves  # (rank, hidden)
    fc2: Halves  # (n_neurons, rank)
    found: int  # active (neuron, token) pairs that it names, on held-out tokens
    active: int  # all of them
    named: int  # all pairs that it names
    pairs: int


def write_texts(engine: Engine, progress: Progress) -> list[list[int]]:
    """Let the model continue a tale, each time from another place. Returns each text's tokens."""
    sentences = ENGLISH.split(". ")
    texts = []
    for at in range(N_TEXTS):
        progress("writing texts, texts", at, N_TEXTS)
        prompt = ". ".join(sentences[: 1 + at % len(sentences)]) + "."
        n = min(TEXT_TOKENS, engine.n_context - 1)
        text = prompt + "".join(engine.generate(prompt, max_tokens=n, temperature=1.0, seed=at))
        texts.append(engine.tokenizer.encode(text)[:n])
    progress("writing texts, texts", N_TEXTS, N_TEXTS)
    return texts


def observe(
    engine: Engine, texts: Sequence[Sequence[int]], norms: Sequence[Floats]
) -> list[tuple[Observed, Observed]]:
    """Return what each layer saw: the tokens to fit on, and the held-out ones.

    `norms` are the weights of each layer's norm before its FFN.
    """
    fit: list[Observation] = []
    held: list[Observation] = []
    for at, ids in enumerate(texts):
        with engine.open_session() as session:
            group = held if at % _HELD_OUT == _HELD_OUT - 1 else fit
            group.append(session.observe(ids, inputs=True))
    n_neurons = engine.config.n_neurons
    return [
        (_joined(fit, layer, w, n_neurons), _joined(held, layer, w, n_neurons))
        for layer, w in enumerate(norms)
    ]


def _joined(seen: Sequence[Observation], layer: int, w: Floats, n_neurons: int) -> Observed:
    masks = np.concatenate([part.masks[layer] for part in seen])
    h = np.concatenate([part.inputs[layer] for part in seen if part.inputs is not None])
    bits = np.unpackbits(masks, axis=1, bitorder="little")[:, :n_neurons]
    x = np.divide(h.astype(np.float32), w, out=np.zeros(h.shape, np.float32), where=w != 0)
    return Observed(x, bits.astype(np.bool_))


def convert(
    predictor: LowRank | None,
    margin: float,
    norm: Floats,
    seen: tuple[Observed, Observed],
    order: NDArray[np.intp] | None,
) -> Converted:
    """Convert a layer's predictor. None names every neuron.

    `order` holds the checkpoint's neurons in packed order. Raises NumericOverflow.
    """
    fit, held = seen
    n_neurons = fit.active.shape[1]
    if predictor is None:  # a score of 0 counts as active
        fc1 = np.zeros((_LEAST_RANK, norm.size), np.float16)
        return _measured(fc1, np.zeros((n_neurons, _LEAST_RANK), np.float16), held)
    a = predictor.a * norm
    # Only the signs of scores count, so rows of `fc1` may have any size.
    size = np.maximum(np.abs(a).max(1, keepdims=True), np.float32(1e-20))
    columns = np.where(np.arange(predictor.rank) < WIDE_RANK, 0, 1)
    b = predictor.b * predictor.b_scale[:, columns] * size.T
    fc1 = np.concatenate([a / size, -a / size]).astype(np.float16)
    features = np.maximum(fit.x @ fc1.astype(np.float32).T, 0)
    bias = predictor.bias + np.float32(margin)
    fc2 = np.concatenate([b, -b], axis=1) + np.outer(bias, root_mean_square(features))
    largest = np.abs(fc2).max(1, keepdims=True)
    scaled = fc2 / np.where(largest > 0, largest, 1)
    if not np.isfinite(scaled).all():
        raise NumericOverflow("the predictor has values that are not finite; train it again")
    converted = _measured(fc1, scaled.astype(np.float16), held)
    if order is None:
        return converted
    in_order = np.empty_like(converted.fc2)
    in_order[order] = converted.fc2
    return converted._replace(fc2=in_order)


def root_mean_square(features: Floats) -> Floats:
    """Return weights (k,) such that features (tokens, k) times them are about 1.

    The inputs that they belong to have a root mean square of 1.
    """
    size = np.sqrt(np.square(features).mean(0)) + np.float32(1e-9)
    scaled = (features / size).astype(np.float64)
    squares = scaled.T @ scaled + _RIDGE * len(features) * np.eye(features.shape[1])
    weights = np.linalg.solve(squares, scaled.sum(0)) / size
    return weights.astype(np.float32)


def _measured(fc1: Halves, fc2: Halves, held: Observed) -> Converted:
    features = np.maximum(held.x @ fc1.astype(np.float32).T, 0)
    named = features @ fc2.astype(np.float32).T >= 0
    found = int((named & held.active).sum())
    return Converted(fc1, fc2, found, int(held.active.sum()), int(named.sum()), named.size)


def quality(layers: Sequence[Converted]) -> str:
    """Return what was measured, as a line for the user."""
    active = sum(layer.active for layer in layers)
    recall = sum(layer.found for layer in layers) / active if active else 1.0
    worst = min((layer.found / layer.active for layer in layers if layer.active), default=1.0)
    named = sum(layer.named for layer in layers) / sum(layer.pairs for layer in layers)
    return (
        f"the exported predictor finds {recall:.2%} of the active neurons ({worst:.2%} in the "
        f"worst layer) on texts that it was not fitted on, and names {named:.1%} of all neurons"
    )
