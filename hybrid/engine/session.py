"""Session: one sequence of tokens that uses an engine's weights and has its own KV cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.engine.session_file import Origin, read_session, write_session
from hybrid.errors import ContextOverflow, EngineClosed, InvalidOption, NumericOverflow
from hybrid.kernels import KvFormat
from hybrid.kernels import Session as CpuSession
from hybrid.model.config import ModelConfig
from hybrid.text.chat import Chat


class NativeSession(Protocol):
    """The session that computes: `kernels.Session`, or `engine.gpu.session.HybridSession`."""

    def prefill(
        self,
        tokens: NDArray[np.int64],
        all_logits: bool = False,
        masks: NDArray[np.uint8] | None = None,
        inputs: NDArray[np.uint16] | None = None,
    ) -> NDArray[np.float32] | None: ...
    def decode(self, token: int) -> None: ...
    def truncate(self, position: int) -> None: ...
    @property
    def logits(self) -> NDArray[np.float32]: ...
    @property
    def position(self) -> int: ...
    @property
    def n_context(self) -> int: ...
    @property
    def kv(self) -> KvFormat: ...
    @property
    def largest_kv(self) -> float: ...
    @property
    def active_counts(self) -> list[int]: ...
    @property
    def predicted_counts(self) -> list[int]: ...
    @property
    def shortlisted_count(self) -> int: ...
    @property
    def decode_bytes(self) -> dict[str, int]: ...
    @property
    def stage_seconds(self) -> dict[str, float]: ...
    def reset_counts(self) -> None: ...


class WeightsCheck(Protocol):
    """Compares the weights with their checksums in the background."""

    def wait(self, seconds: float | None = None) -> bool: ...
    def raise_damage(self) -> None: ...


# From these magnitudes on, rounding to the format gives infinity.
_KV_LIMITS = {KvFormat.fp16: 65520.0, KvFormat.bf16: 511 * 2.0**119}


@dataclass(frozen=True, slots=True)
class Observation:
    """Which neurons fired for some tokens, in each layer.

    Neurons are in packed order (`Engine.neuron_orders`).
    """

    masks: NDArray[np.uint8]  # (n_layers, n, ceil(n_neurons / 8)): bit i % 8 of byte i / 8
    inputs: NDArray[np.float16] | None  # (n_layers, n, hidden): the normed inputs of the FFNs


def common_length(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    first, second = list(tokens), list(others)
    n, step = 0, 256  # lists are compared much faster than their elements one by one
    while n < min(len(first), len(second)) and first[n : n + step] == second[n : n + step]:
        n = min(n + step, len(first), len(second))
    pairs = enumerate(zip(first[n:], second[n:], strict=False), n)
    return next((i for i, (token, other) in pairs if token != other), min(len(first), len(second)))


class Session:
    """A sequence and its KV cache. Open it with `Engine.open_session`.

    Either pass it to `Engine.generate` or `Engine.chat` repeatedly: the prefix that a new prompt
    shares with the session's tokens is not computed again. Or append ids with `prefill` and
    `decode`, and read `logits`.

    Sessions of one engine may run on several threads at once. One session serves one thread at a
    time. Once the background check has found damaged weights, every call raises InvalidArtifact.
    """

    def __init__(
        self,
        native: NativeSession,
        config: ModelConfig,
        engine: object = None,
        weights: WeightsCheck | None = None,
        origin: Origin | None = None,
        is_dense: bool = False,
    ) -> None:
        """`weights` are still being checked, or None if they are sound.

        `origin` is what computes: without it the session can neither be saved nor copied.
        """
        self._native: NativeSession | None = native
        self._config = config
        self._weights, self._origin = weights, origin
        self.is_dense = is_dense  # whether it computes all neurons
        self._engine = engine  # the executor that owns the weights; compared by identity
        self._tokens: list[int] = []
        self._lock = threading.RLock()  # held during each call into the native session
        self._owner: object = None  # identifies the generation that uses this session
        # The last conversation, including its answer, and the ids that stand for it.
        self.chat: tuple[Chat, list[int]] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids in the KV cache."""
        return tuple(self._tokens)

    @property
    def position(self) -> int:
        """The number of tokens, which is the position of the next token."""
        return len(self._tokens)

    @property
    def n_context(self) -> int:
        """The number of tokens that the KV cache can hold."""
        return self._open().n_context

    @property
    def logits(self) -> NDArray[np.float32]:
        """(vocab,) logits of the next token, from the latest `prefill` or `decode`.

        `truncate` does not update them. This is a read-only view that the next call overwrites.
        """
        return self._open().logits

    def prefill(
        self, tokens: Sequence[int] | NDArray[np.integer], *, all_logits: bool = False
    ) -> NDArray[np.float32] | None:
        """Append tokens. With `all_logits`, return the logits (n, vocab) of all of them.

        Raises ContextOverflow if they do not fit, NumericOverflow if keys or values exceed the
        range of the KV cache, EngineClosed, and ValueError for ids that the vocabulary does not
        have. After an error the session holds the tokens that it held before.
        """
        return self._prefill(tokens, all_logits)

    def observe(
        self, tokens: Sequence[int] | NDArray[np.integer], *, inputs: bool = False
    ) -> Observation:
        """Append tokens as `prefill` does, and return which neurons fired for each token.

        With `inputs`, also return the normed inputs of the FFNs. Raises the errors of `prefill`.
        """
        config, n = self._config, len(tokens)
        masks = np.zeros((config.n_layers, n, -(-config.n_neurons // 8)), np.uint8)
        halves = np.empty((config.n_layers, n, config.hidden_size), np.float16) if inputs else None
        self._prefill(tokens, False, masks, None if halves is None else halves.view(np.uint16))
        return Observation(masks, halves)

    def _prefill(
        self,
        tokens: Sequence[int] | NDArray[np.integer],
        all_logits: bool,
        masks: NDArray[np.uint8] | None = None,
        inputs: NDArray[np.uint16] | None = None,
    ) -> NDArray[np.float32] | None:
        ids = np.asarray(tokens)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"tokens: expected integers, found {ids.dtype}")
        ids = ids.astype(np.int64)
        with self._lock:
            native = self._in_step()
            self._check_room(ids.size)
            logits = native.prefill(ids, all_logits, masks, inputs)
            self._check_kv(native)
            self._tokens += ids.tolist()
            return logits

    def decode(self, token: int) -> None:
        """Append one token. Raises the errors of `prefill`."""
        with self._lock:
            native = self._in_step()
            self._check_room(1)
            native.decode(token)
            self._check_kv(native)
            self._tokens.append(int(token))

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on. Raises ValueError if there are fewer tokens."""
        with self._lock:
            self._in_step().truncate(position)
            del self._tokens[position:]

    def reset(self) -> None:
        """Forget all tokens and the conversation. A generation that uses this session ends."""
        with self._lock:
            self._owner = self.chat = None
            self.truncate(0)

    def copy_prefix(self, source: Session, n: int) -> None:
        """Hold the first `n` tokens of `source`, with their keys and values, and no others.

        This forgets the conversation, and a generation that uses this session ends. `logits` are
        not updated. Raises EngineClosed, and InvalidOption if `source` has fewer tokens, is a
        session of another engine, or differs in whether a predictor is used (`dense`), or if a
        plan uses the GPU.
        """
        first, second = sorted((self, source), key=id)  # one order, so that nobody waits forever
        with first._lock, second._lock:
            mine, own = self._with_kv()
            theirs, other = source._with_kv()
            if source._engine is not self._engine or other != own:
                raise InvalidOption("source: belongs to another engine, or computes otherwise")
            if not 0 <= n <= source.position:
                raise InvalidOption(f"n: expected 0 to {source.position} tokens, found {n}")
            tokens = source._tokens[:n]
            self._owner, self.chat, self._tokens = None, None, []  # an interruption leaves no token
            if source is self:
                mine.truncate(n)
            else:
                mine.copy_prefix(theirs, n)
            self._tokens = tokens

    def save(self, file: Path | str) -> None:
        """Write tokens, keys and values to a file, or replace it: `Engine.open_session` reads it.

        This first waits until the weights have been checked. The conversation is not saved, but
        `Engine.chat` finds the tokens that a new conversation begins with. Raises OSError,
        EngineClosed, InvalidOption if a plan uses the GPU, InvalidArtifact if weights are damaged,
        and InvalidCheckpoint if the model's files are no longer those that were loaded.
        """
        self.confirm_weights(None)
        with self._lock:
            native, origin = self._with_kv()
            write_session(Path(file), origin, self._tokens, native)

    def filled_from(self, file: Path) -> Session:
        """Fill this new session from a file, or close it. Raises as `Engine.open_session` does."""
        try:
            with self._lock:
                native, origin = self._with_kv()
                self._tokens = read_session(file, origin, native)
        except BaseException:
            self.close()
            raise
        return self

    def keep_common_prefix(self, tokens: Sequence[int]) -> int:
        """Keep the common prefix with `tokens`, forget the rest, and return how many were kept.

        The last of `tokens` is never kept, because its logits must be computed.
        """
        with self._lock:
            n = common_length(self._tokens, tokens[:-1])
            self.truncate(n)
            return n

    @property
    def active_counts(self) -> list[int]:
        """Per layer: number of (neuron, token) pairs that fired since the last `reset_counts`."""
        return self._open().active_counts

    @property
    def predicted_counts(self) -> list[int]:
        """Per layer: number of (neuron, token) pairs whose gate was computed.

        Those are the pairs that the predictor named, or all pairs if there is no predictor. Counted
        since the last `reset_counts`.
        """
        return self._open().predicted_counts

    @property
    def shortlisted_count(self) -> int:
        """Number of shortlisted rows of a previewed head since the last `reset_counts`."""
        return self._open().shortlisted_count

    @property
    def decode_bytes(self) -> dict[str, int]:
        """Bytes of weights and KV cache that `decode` read, by part of the model.

        The native program counts them, since the last `reset_counts`.
        """
        with self._lock:
            return self._open().decode_bytes

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds of `prefill` and `decode` by part of the model, and of `waiting`.

        They are sums over all threads since the last `reset_counts`. They are zero unless the
        session was opened with `timed=True`.
        """
        with self._lock:
            return self._open().stage_seconds

    def reset_counts(self) -> None:
        """Set all counts, `decode_bytes` and `stage_seconds` to zero."""
        with self._lock:
            self._open().reset_counts()

    def close(self) -> None:
        """Free the KV cache, once a call that runs on another thread has ended."""
        with self._lock:
            self._native = self._owner = None

    def hand_to(self, owner: object) -> None:
        """Make `owner` (any object) the session's owner. The generation before it then ends."""
        with self._lock:
            self._open()
            self._owner = owner

    @contextmanager
    def step(self, owner: object) -> Iterator[bool]:
        """Lock the session for one step of `owner`. Yields False if it is closed or not its own."""
        with self._lock:
            yield self._native is not None and self._owner is owner

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def confirm_weights(self, seconds: float | None) -> bool:
        """Wait until the weights have been checked, at most `seconds`. Return whether they are.

        Raises InvalidArtifact if they are damaged.
        """
        if self._weights is None:
            return True
        is_over = self._weights.wait(seconds)
        self._weights.raise_damage()
        return is_over

    def _open(self) -> NativeSession:
        if self._native is None:
            raise EngineClosed("the session is closed; open another one")
        if self._weights is not None:
            self._weights.raise_damage()
        return self._native

    def _in_step(self) -> NativeSession:
        """Return the native session, after removing tokens that this object does not know.

        A KeyboardInterrupt or an error can end a call before its tokens are stored here. Such
        tokens count as never appended.
        """
        native = self._open()
        if native.position > len(self._tokens):
            native.truncate(len(self._tokens))
        return native

    def _with_kv(self) -> tuple[CpuSession, Origin]:
        """Return the native session, whose keys and values can be read, and what computes them."""
        native = self._in_step()
        if self._origin is None or not isinstance(native, CpuSession):
            raise InvalidOption(
                "session: its keys and values are on the GPU, so it can be neither saved, copied "
                "nor opened from a file; load the model with device cpu"
            )
        return native, self._origin

    def _check_kv(self, native: NativeSession) -> None:
        """Raises NumericOverflow if the call has stored an infinite key or value."""
        kv, largest = native.kv, native.largest_kv
        if largest < _KV_LIMITS[kv]:
            return
        advice = "load it with kv bf16" if kv is KvFormat.fp16 else "its weights must be broken"
        raise NumericOverflow(
            f"the model's KV cache overflows {kv.name} (|k| or |v| up to {largest:.3g}); {advice}"
        )

    def _check_room(self, n: int) -> None:
        n_context = self._open().n_context
        if self.position + n > n_context:
            raise ContextOverflow(
                f"the context holds {n_context} tokens; {self.position} are there and {n} more do "
                "not fit",
                n_tokens=self.position + n,
                n_context=n_context,
            )
