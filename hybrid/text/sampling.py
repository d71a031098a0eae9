"""SamplingParams and Sampler choose the next token from the logits.

The steps are, in this order: bias, banned tokens, repeat penalty, frequency and presence penalty,
temperature, top-k, top-p over what top-k kept, min-p over what is left. If logits are equal at a
cut, the lowest ids are kept. What comes after top-k is computed by csrc/sampling.cpp.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hybrid.errors import HybridError, InvalidOption, NumericOverflow
from hybrid.kernels import _native

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

BLOCK = 256  # logits per block of a search in two steps


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Raises InvalidOption for a value out of range."""

    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 0.95  # keep the fewest tokens that have this probability; 0: one, 1: all
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest; 0: none
    repeat_penalty: float = 1.0  # above 1: what the text already has becomes less likely; 1: off
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the answer has
    frequency_penalty: float = 0.0  # the same, as often as the answer has the token
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    seed: int | None = None  # None or -1: a random seed of the operating system

    def __post_init__(self) -> None:
        if not (
            _is_real(self.temperature) and _is_finite(self.temperature) and self.temperature >= 0
        ):
            raise _out_of_range("temperature", self.temperature, "a finite number, 0 or more")
        if not (_is_int(self.top_k) and self.top_k >= 0):
            raise _out_of_range("top_k", self.top_k, "an integer, 0 (off) or more")
        if not (_is_real(self.top_p) and 0 <= self.top_p <= 1):
            raise _out_of_range("top_p", self.top_p, "a number from 0 to 1 (off)")
        if not (_is_real(self.min_p) and 0 <= self.min_p <= 1):
            raise _out_of_range("min_p", self.min_p, "a number from 0 (off) to 1")
        if not (_is_real(self.repeat_penalty) and 0.1 <= self.repeat_penalty <= 10):
            raise _out_of_range("repeat_penalty", self.repeat_penalty, "a number from 0.1 to 10")
        for name in ("presence_penalty", "frequency_penalty"):
            if not (_is_real(value := getattr(self, name)) and -2 <= value <= 2):
                raise _out_of_range(name, value, "a number from -2 to 2")
        for entry in self.logit_bias:
            token, bias = entry
            if not (_is_int(token) and token >= 0 and _is_real(bias) and -100 <= bias <= 100):
                raise _out_of_range("logit_bias", entry, "token ids and numbers from -100 to 100")
        if self.seed is not None and not (_is_int(self.seed) and self.seed >= -1):
            raise _out_of_range("seed", self.seed, "None or -1 (random), or an integer, 0 or more")


class Sampler:
    """Draws tokens. The same seed and logits give the same tokens in any process.

    So they do on any CPU with fused multiply-add.
    """

    params: SamplingParams
    seed: int  # the seed in use, even if the parameters give none

    def __init__(self, params: SamplingParams) -> None:
        seed = params.seed
        self.seed = secrets.randbits(32) if seed is None or seed == -1 else int(seed)
        self.params = params
        self._random = random.Random(self.seed)
        self._biased = np.array([token for token, _ in params.logit_bias], np.intp)
        self._biases = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._native = _native.Sampler()

    def sample(
        self,
        logits: Floats,
        seen: Collection[int] = (),
        banned: Sequence[int] = (),
        counts: Mapping[int, int] = MappingProxyType({}),
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> int:
        """Return the next token for `logits` (vocab,), which are not changed; -inf bans a token.

        The repeat penalty applies to the tokens of `seen`. It divides their positive logits and
        multiplies their negative ones (CTRL, https://arxiv.org/abs/1909.05858). The presence and
        the frequency penalty apply to the tokens of `counts`, which says how often the answer has
        each (OpenAI's API). The tokens of `banned` are never returned, and none but those of
        `allowed` (vocab,), if that is given.

        Raises HybridError if a logit is NaN or +inf, or if every token is banned.
        """
        params = self.params
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
        if self._biased.size or banned:
            logits = logits.copy()
            np.add.at(logits, self._biased, self._biases)  # a token may occur twice
            logits[np.asarray(banned, np.intp)] = -np.inf
        top = logits.max()  # NaN if any logit is
        if not np.isfinite(top):
            problem = "every token is banned (-inf)" if top < 0 else f"found {top}"
            raise HybridError(
                f"the model's logits are not finite: {problem}; its weights or an option that "
                "bans tokens must be broken"
            )
        penalised = self._penalised(logits, seen, counts)
        if penalised is not logits:
            logits, top = penalised, penalised.max()
        if params.temperature == 0:
            return int(logits.argmax())
        ids: Ids | None = None  # ids of the tokens that are left; None: all of them
        if params.top_k > 0:
            ids = _largest(logits, params.top_k)
            logits = logits[ids]
        drawn = self._native.draw(
            logits,
            float(top),
            # At these bounds any gap between logits is already 0 or infinite. Beyond them fp32
            # would compute 0/0.
            min(max(params.temperature, 1e-30), 1e30),
            params.top_p,
            params.min_p,
            self._random.random(),
        )
        return drawn if ids is None else int(ids[drawn])

    def _penalised(
        self, logits: Floats, seen: Collection[int], counts: Mapping[int, int]
    ) -> Floats:
        """Return the logits after all penalties, as a copy if one applies."""
        params, original = self.params, logits
        if params.repeat_penalty != 1 and seen:
            logits = original.copy()
            ids = np.fromiter(set(seen), np.intp)
            penalty = np.float32(params.repeat_penalty)
            logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
        if (params.presence_penalty or params.frequency_penalty) and counts:
            logits = logits.copy() if logits is original else logits
            times = np.fromiter(counts.values(), np.float32, len(counts))
            factor, once = params.frequency_penalty, params.presence_penalty
            logits[np.fromiter(counts, np.intp, len(counts))] -= times * np.float32(factor) + once
        return logits


def log_probabilities(
    logits: Floats, token: int, n_top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return a token's log-probability, and the `n_top` likeliest (token, logprob), best first.

    Logarithms are natural, and exact to about 1e-9. Of equal logits (vocab,) the lowest ids come
    first. Raises NumericOverflow if a logit is NaN or +inf, or if none is finite.
    """
    top = float(logits.max())
    if not math.isfinite(top):
        raise NumericOverflow(f"the model's logits are not finite: found {top}")
    total = _native.log_sum_exp(logits, top)
    ids: Ids = _largest(logits, n_top) if n_top else np.empty(0, np.intp)
    ids = ids[np.lexsort((ids, -logits[ids]))]
    likeliest = tuple((int(other), float(logits[other]) - total) for other in ids)
    return float(logits[token]) - total, likeliest


def _largest(values: Floats, n: int) -> Ids:
    """Return the indices of the `n` largest values, ascending; of equal values the first ones."""
    if n >= values.size:
        return np.arange(values.size)
    ids = np.arange(values.size)
    n_blocks = values.size // BLOCK
    if n < n_blocks:
        # n blocks have a maximum of at least the n-th largest block maximum. So n values are at
        # least as large, and smaller values cannot be among the n largest.
        largest = values[: n_blocks * BLOCK].reshape(n_blocks, BLOCK).max(1)
        ids = np.flatnonzero(values >= np.partition(largest, n_blocks - n)[n_blocks - n])
        values = values[ids]
    cut = np.partition(values, values.size - n)[values.size - n]
    kept = values > cut
    kept[np.flatnonzero(values == cut)[: n - np.count_nonzero(kept)]] = True
    return ids[kept]


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _out_of_range(name: str, value: object, expected: str) -> InvalidOption:
    return InvalidOption(f"{name}: expected {expected}, found {value!r}")
