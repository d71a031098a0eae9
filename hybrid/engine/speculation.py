"""Speculation: tokens that the text probably repeats are computed along with the next one.

Prompt lookup (A. Saxena, "Prompt Lookup Decoding", 2023): the longest end of the sequence that
occurred before is found, and the draft is what followed there. One pass computes the next token and
the draft. It gives the logits that decoding one by one gives, bit by bit, so tokens are chosen from
them as always. The first token that differs from the draft ends it, and the rest is forgotten. So
the text does not depend on the draft, greedy or sampled.

How long a draft is depends on two things that are measured all the time: how often a guess came
true after a match of that length, and how long a pass of so many tokens takes.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from hybrid.engine.answer import Answer
from hybrid.engine.context_shift import Room
from hybrid.engine.session import Session
from hybrid.errors import NumericOverflow
from hybrid.kernels import PREFILL_CHUNK

LENGTHS = (2, 3, 4, 5, 6)  # of the ends that are looked up
GROUPS = (*LENGTHS, 8, 16)  # matches from one of these lengths to the next one share a rate
SIZES = (1, 3, 7, 15, 31)  # of drafts: with the next token, passes fill tiles of four
LEAST_GAIN = 1.05  # a draft must promise so many times the speed without it
LOSS = 0.01  # share of the time that wrong drafts may cost
PROBE_AFTER = 64  # passes until a draft is tried that does not promise most
_MEMORY = 24  # events that a mean of rates or times remembers


class Lookup:
    """A sequence, and where its longest end occurred before. Appending takes microseconds.

    Ends of up to `LENGTHS[-1]` tokens are compared: the longest match counts, then the latest.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self.length = 0  # of the match in tokens; 0: there is none
        self._at = 0  # the index of the token that followed the match
        self._following: dict[tuple[int, ...], int] = {}  # n-gram → index of what followed it last
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> bool:
        """Append a token. Return whether it is what followed the match."""
        for n in LENGTHS[: bisect_right(LENGTHS, len(self.tokens))]:
            self._following[tuple(self.tokens[-n:])] = len(self.tokens)
        is_guessed = self.length > 0 and self.tokens[self._at] == token
        self.tokens.append(token)
        if is_guessed:  # no end can match longer than one token more than before
            self._at += 1
            self.length += 1
        else:
            self._search()
        return is_guessed

    def draft(self, n: int) -> list[int]:
        """Return the `n` tokens that followed the match; a text that ends in a loop goes on so."""
        period = len(self.tokens) - self._at
        return [self.tokens[self._at + i % period] for i in range(n)] if self.length else []

    def _search(self) -> None:
        for n in reversed(LENGTHS):
            at = self._following.get(tuple(self.tokens[-n:]))
            if at is not None:
                self._at, self.length = at, n
                return
        self.length = 0


class Rates:
    """How often the token that followed a match came again, by the match's length."""

    def __init__(self) -> None:
        # Between those of English texts and those of programs (docs/log.md); soon this text's own.
        self._rates = [0.2, 0.25, 0.35, 0.45, 0.6, 0.7, 0.85]
        self._n_seen = [4] * len(GROUPS)  # the first rates count as so many events

    def of(self, length: int) -> float:
        """Return the rate after a match of `length` tokens, at least `LENGTHS[0]`."""
        return self._rates[bisect_right(GROUPS, length) - 1]

    def note(self, length: int, came: bool) -> None:
        group = bisect_right(GROUPS, length) - 1
        self._n_seen[group] = min(self._n_seen[group] + 1, _MEMORY)
        self._rates[group] += (came - self._rates[group]) / self._n_seen[group]


class PassTimes:
    """Seconds of a pass by its number of tokens: means of what was measured."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, int]] = {}  # tokens → mean, passes in it

    def note(self, n_tokens: int, seconds: float) -> None:
        mean, n = self._known.get(n_tokens, (0.0, 0))
        n = min(n + 1, _MEMORY)
        self._known[n_tokens] = mean + (seconds - mean) / n, n

    def of(self, n_tokens: int) -> float:
        """Return the mean, or a straight line through the nearest sizes that were measured.

        A larger pass takes no less. A size beyond all others is on the line through the smallest
        and the largest one. If only one size was measured, others seem to take the same time.
        """
        sizes = sorted(self._known)
        at = bisect_left(sizes, n_tokens)
        if n_tokens in self._known:
            return min(self._known[size][0] for size in sizes[at:])
        if at == 0 or len(sizes) == 1:
            return self._known[sizes[0]][0]
        low, high = (sizes[at - 1], sizes[at]) if at < len(sizes) else (sizes[0], sizes[-1])
        slope = (self._known[high][0] - self._known[low][0]) / (high - low)
        return self._known[low][0] + max(slope, 0.0) * (n_tokens - low)


class DraftLength:
    """Decides how many tokens to draft, so that the text comes as fast as possible.

    Wrong drafts never cost more than the time of one token and `LOSS` of all time: a draft is too
    long if it would, should all of it be wrong. What right drafts save is added to that.
    """

    def __init__(self) -> None:
        self.rates, self.times = Rates(), PassTimes()
        self._saved_s = self._total_s = 0.0
        self._n_since = 0  # passes since a draft was tried that did not promise most

    def note_pass(self, n_drafted: int, n_accepted: int, seconds: float) -> None:
        """Note how long a pass took, and how many tokens of its draft became text."""
        self.times.note(1 + n_drafted, seconds)
        self._total_s += seconds
        self._n_since += 1
        if n_drafted:
            self._saved_s += (1 + n_accepted) * self.times.of(1) - seconds

    def choose(self, length: int, room: int) -> int:
        """Return how many tokens to draft after a match of `length`, at most `room`."""
        if not length or room < 1:
            return 0
        costs = self._affordable_costs(room)
        one, expected = self.times.of(1), self._expected(length, len(costs))
        gains = [text * one / cost for text, cost in zip(expected, costs, strict=True)]
        best = max(range(len(gains)), key=gains.__getitem__, default=-1)
        if best < 0:
            return 0
        is_worth_it = gains[best] >= LEAST_GAIN
        if self._n_since >= PROBE_AFTER and (is_worth_it or length >= LENGTHS[-1]):
            # A time that was measured in a bad moment would otherwise stand for ever.
            self._n_since = 0
            return SIZES[min(best + is_worth_it, len(gains) - 1)]
        return SIZES[best] if is_worth_it else 0

    def _affordable_costs(self, room: int) -> list[float]:
        """Return the seconds of passes with the first of SIZES, as many as are not too long."""
        one, costs = self.times.of(1), []
        budget = self._saved_s + LOSS * self._total_s + one
        for size in SIZES:
            cost = self.times.of(1 + size)
            if size > room or cost - one > budget:
                break
            costs.append(cost)
        return costs

    def _expected(self, length: int, n_sizes: int) -> list[float]:
        """Return the expected tokens of text from passes with the first `n_sizes` of SIZES."""
        chance, text, expected = 1.0, 1.0, []
        for i in range(SIZES[n_sizes - 1] if n_sizes else 0):
            chance *= self.rates.of(length + i)
            text += chance
            if i + 1 in SIZES:
                expected.append(text)
        return expected


class Speculation:
    """Chooses and computes the tokens of one answer, several in a pass where the text repeats.

    After each step the session holds tokens of the text only: all of them, or all but the latest.
    """

    def __init__(self, session: Session, answer: Answer, room: Room) -> None:
        """The prompt was prefilled; the time that this took is the first measurement."""
        self._session, self._answer, self._room = session, answer, room
        self._lookup, self._policy = Lookup(answer.prompt), DraftLength()
        self._next: int | None = None  # chosen, but not yet in the session
        stats = answer.stats
        if stats.prefilled_tokens > 1:
            n_passes = -(-stats.prefilled_tokens // PREFILL_CHUNK)
            n_tokens = round(stats.prefilled_tokens / n_passes)
            self._policy.times.note(n_tokens, stats.prefill_s / n_passes)

    def step(self) -> str:
        """Run one pass, if another token is to follow. Return the text that this completed."""
        session, text = self._session, ""
        if self._next is None:
            text = self._choose(session.logits, session.position)
        if self._next is not None and self._answer.finish_reason is None:
            text += self._run(self._next)
        return text

    def _choose(self, logits: NDArray[np.float32], position: int) -> str:
        """Choose the token at a position. Return the text that it completes."""
        lookup = self._lookup
        chosen = self._answer.choose(logits, self._room.tokens(position))
        self._next = chosen[0] if chosen else None  # an answer with a grammar has no drafts
        if self._next is not None:
            length = lookup.length
            came = lookup.append(self._next)
            if length:
                self._policy.rates.note(length, came)
        return self._answer.take()

    def _draft(self) -> list[int]:
        answer, session, lookup = self._answer, self._session, self._lookup
        is_over = answer.is_cancelled or answer.finish_reason is not None
        if is_over or not answer.stats.decode_steps:
            return []
        room = session.n_context - session.position - 1
        if answer.request.limits.max_tokens is not None:
            room = min(room, answer.request.limits.max_tokens - len(answer.tokens) - 1)
        return lookup.draft(self._policy.choose(lookup.length, room))

    def _run(self, token: int) -> str:
        """Append a token and what comes true of its draft. Return the text that this completes."""
        if not self._room.make():
            self._next = None
            return ""
        session, stats, draft = self._session, self._answer.stats, self._draft()
        position, started, text = session.position, time.perf_counter(), ""
        n_kept = position + 1
        try:
            rows = self._pass(token, draft)
            seconds = time.perf_counter() - started
            self._next = None
            for row, guess in zip(rows, draft, strict=False):
                text += self._choose(row, n_kept)
                if self._next != guess or self._answer.finish_reason is not None:
                    break
                self._next, n_kept = None, n_kept + 1
            n_drafted, n_accepted = max(len(rows) - 1, 0), n_kept - position - 1
        finally:
            if session.position > n_kept:
                session.truncate(n_kept)
        stats.decode_steps += 1
        stats.drafted_tokens += n_drafted
        stats.accepted_tokens += n_accepted
        self._policy.note_pass(n_drafted, n_accepted, seconds)
        return text

    def _pass(self, token: int, draft: list[int]) -> list[NDArray[np.float32]]:
        """Append a token and its draft. Return the logits after each; none without a draft."""
        if draft:
            with suppress(NumericOverflow):  # of a guess; the text itself may have none
                rows = self._session.prefill([token, *draft], all_logits=True)
                assert rows is not None
                return list(rows)
        self._session.decode(token)
        return []
