"""Batch: passes over tokens of several sessions.

One pass reads the weights once for up to 64 tokens, one of each session or several. Each session
gets the bits that it gets alone (csrc/session/runner.h). What is wrong with a session is found
before anything runs; what goes wrong in it during a pass concerns no other.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.session import NativeSession, Session
from hybrid.errors import InvalidOption, NumericOverflow
from hybrid.kernels import PREFILL_CHUNK
from hybrid.kernels import Batch as CpuBatch
from hybrid.kernels import Session as CpuSession


class BatchPart(NamedTuple):
    """The next tokens of a session in a pass."""

    session: Session
    tokens: Sequence[int]
    wants_logits: bool = True  # whether `Session.logits` must become those of the last token


class Batch:
    """Runs passes over sessions of one engine. Open it with `Engine.open_batch`.

    With a plan that uses the GPU, a pass takes the sessions one after the other. Any thread may
    call it; calls wait for one another.
    """

    def __init__(self, executor: object) -> None:
        """`executor` must be that of the sessions."""
        self._executor = executor
        self._native: CpuBatch | None = None
        if isinstance(executor, CpuExecutor):
            self._native = CpuBatch(executor.program, executor.pool, executor.n_context)
        self._lock = threading.Lock()

    def decode(self, sessions: Sequence[Session], tokens: Sequence[int]) -> None:
        """Append one token to each session: `tokens[i]` to `sessions[i]`, up to 64 in one pass.

        Raises the errors of `append`.
        """
        if len(sessions) != len(tokens):
            raise InvalidOption(
                f"tokens: expected one for each of {len(sessions)} sessions, found {len(tokens)}"
            )
        self.append([BatchPart(s, [token]) for s, token in zip(sessions, tokens, strict=True)])

    def append(self, parts: Sequence[BatchPart]) -> None:
        """Append tokens to sessions, up to 64 in all.

        Raises InvalidOption for sessions of another engine, for dense ones, for one that occurs
        twice and for too many tokens, ContextOverflow, EngineClosed, and ValueError for ids that
        the vocabulary does not have: then nothing was appended. Raises NumericOverflow if keys or
        values of a session exceed the range of the KV cache: then that session holds the tokens
        that it held before, and all others hold the new ones.
        """
        for i, error in self.run(parts).items():
            raise NumericOverflow(f"session {i + 1} of {len(parts)}: {error}") from None

    def run(self, parts: Sequence[BatchPart]) -> dict[int, NumericOverflow]:
        """Append as `append` does, but return NumericOverflow by the index of the part."""
        self._check(parts)
        with ExitStack() as locks:
            locks.enter_context(self._lock)
            for part in sorted(parts, key=lambda part: id(part.session)):  # so nobody waits forever
                locks.enter_context(part.session._lock)
            natives = []
            for session, tokens, _ in parts:
                natives.append(session._in_step())
                session._check_room(len(tokens))
            self._pass(natives, parts)
            return _kept(natives, parts)

    @property
    def decode_bytes(self) -> dict[str, int]:
        """Bytes of weights and KV cache that passes read, by part of the model.

        These are counts since the last `reset_counts`, and so are the next three. What a pass reads
        for several sessions counts once. Like those, it raises InvalidOption if a plan uses the
        GPU, because then each session counts its own.
        """
        return self._counting().decode_bytes

    @property
    def active_counts(self) -> list[int]:
        """Per layer: number of (neuron, token) pairs that fired."""
        return self._counting().active_counts

    @property
    def predicted_counts(self) -> list[int]:
        """Per layer: number of (neuron, token) pairs whose gate was computed."""
        return self._counting().predicted_counts

    @property
    def shortlisted_count(self) -> int:
        """Number of shortlisted rows of a previewed head."""
        return self._counting().shortlisted_count

    def reset_counts(self) -> None:
        with self._lock:
            self._counting().reset_counts()

    @property
    def counts(self) -> bool:
        """Whether passes count what they read: unless a plan uses the GPU."""
        return self._native is not None

    def _counting(self) -> CpuBatch:
        if self._native is None:
            raise InvalidOption("batch: a plan uses the GPU, so its sessions count, not the batch")
        return self._native

    def _check(self, parts: Sequence[BatchPart]) -> None:
        n_tokens = sum(len(part.tokens) for part in parts)
        if not parts or not all(len(part.tokens) for part in parts) or n_tokens > PREFILL_CHUNK:
            raise InvalidOption(
                f"a pass takes 1 to {PREFILL_CHUNK} tokens and at least one of each session, found "
                f"{n_tokens} of {len(parts)} sessions"
            )
        if len({id(part.session) for part in parts}) < len(parts):
            raise InvalidOption("sessions: one of them occurs twice in the pass")
        for i, part in enumerate(parts):
            if part.session._engine is not self._executor:
                raise InvalidOption(f"session {i + 1} of {len(parts)}: belongs to another engine")
            if part.session.is_dense:
                raise InvalidOption(
                    f"session {i + 1} of {len(parts)}: it computes all neurons (dense), and passes "
                    "over several sessions skip what is zero; open it without dense"
                )

    def _pass(self, natives: Sequence[NativeSession], parts: Sequence[BatchPart]) -> None:
        if self._native is not None:
            sessions = [native for native in natives if isinstance(native, CpuSession)]
            wants = [part.wants_logits for part in parts]
            self._native.run(sessions, [part.tokens for part in parts], wants)
            return
        for native, part in zip(natives, parts, strict=True):
            _append_alone(native, part.tokens)


def _append_alone(native: NativeSession, tokens: Sequence[int]) -> None:
    if len(tokens) == 1:
        native.decode(int(tokens[0]))
    else:
        native.prefill(np.asarray(tokens, np.int64))


def _kept(
    natives: Sequence[NativeSession], parts: Sequence[BatchPart]
) -> dict[int, NumericOverflow]:
    """Note the new tokens of each session, unless its keys or values have overflowed."""
    errors = {}
    for i, (native, part) in enumerate(zip(natives, parts, strict=True)):
        try:
            part.session._check_kv(native)
        except NumericOverflow as error:
            errors[i] = error
        else:
            part.session._tokens += map(int, part.tokens)
    return errors
