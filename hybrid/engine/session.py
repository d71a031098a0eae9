"""Session: one sequence of tokens over an engine's weights, with a KV cache of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ContextOverflow, EngineClosed
from hybrid.model.config import ModelConfig
from hybrid.text.tokenizer import ChatMessage


class NativeSession(Protocol):
    """What computes: `kernels.Session`, or `gpu_executor.HybridSession` over two devices."""

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


@dataclass(frozen=True, slots=True)
class Observation:
    """Which neurons fired for some tokens, layer by layer, in the order in which they are packed
    (`Engine.neuron_orders`).
    """

    masks: NDArray[np.uint8]  # (n_layers, n, ceil(n_neurons / 8)): bit i % 8 of byte i / 8
    inputs: NDArray[np.float16] | None  # (n_layers, n, hidden): the normed inputs of the FFNs


class Session:
    """A sequence and its KV cache; open it with `Engine.open_session`.

    Two ways to use it. Hand it to `Engine.generate` or `Engine.chat`, again and again: what a new
    prompt shares with the tokens that are already here is not computed again. Or feed it ids
    with `prefill` and `decode` and look at `logits`.

    Sessions of one engine may run on several threads at once; one session serves one at a time.
    """

    def __init__(self, native: NativeSession, config: ModelConfig, engine: object = None) -> None:
        self._native: NativeSession | None = native
        self._config = config
        self._engine = engine  # whose weights these are; compared by identity
        self._tokens: list[int] = []
        self._lock = threading.RLock()  # held for each call into the native session
        self._owner: object = None  # the generation that is running on it
        # The last conversation, its answer included, and the ids that stand for it.
        self.chat: tuple[tuple[ChatMessage, ...], list[int]] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids in the KV cache."""
        return tuple(self._tokens)

    @property
    def position(self) -> int:
        """How many tokens there are; the next one stands at this position."""
        return len(self._tokens)

    @property
    def n_context(self) -> int:
        """How many tokens the KV cache can hold."""
        return self._open().n_context

    @property
    def logits(self) -> NDArray[np.float32]:
        """(vocab,) logits that the latest `prefill` or `decode` left: of the token that follows,
        until something is truncated. A read-only view, overwritten by the next call.
        """
        return self._open().logits

    def prefill(
        self, tokens: Sequence[int] | NDArray[np.integer], *, all_logits: bool = False
    ) -> NDArray[np.float32] | None:
        """Append tokens. Returns the logits (n, vocab) of all of them where asked for.

        Raises ContextOverflow where they do not fit, EngineClosed, and ValueError for ids that the
        vocabulary does not have.
        """
        return self._prefill(tokens, all_logits)

    def observe(
        self, tokens: Sequence[int] | NDArray[np.integer], *, inputs: bool = False
    ) -> Observation:
        """Append tokens as `prefill` does and tell which neurons fired for each, and with `inputs`
        for what. Raises as `prefill` does.
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
            self._tokens += ids.tolist()
            return logits

    def decode(self, token: int) -> None:
        """Append one token. Raises as `prefill` does."""
        with self._lock:
            native = self._in_step()
            self._check_room(1)
            native.decode(token)
            self._tokens.append(int(token))

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on. Raises ValueError where there are fewer."""
        with self._lock:
            self._in_step().truncate(position)
            del self._tokens[position:]

    def reset(self) -> None:
        """Forget everything: the next prompt begins a new text. A generation that is running on
        this session ends.
        """
        with self._lock:
            self._owner = self.chat = None
            self.truncate(0)

    def keep_common_prefix(self, tokens: Sequence[int]) -> int:
        """Forget all but what `tokens` begin with, their last one excluded, since its logits are
        wanted. Returns how many tokens were kept.
        """
        with self._lock:
            n = 0
            for mine, theirs in zip(self._tokens, tokens[:-1], strict=False):
                if mine != theirs:
                    break
                n += 1
            self.truncate(n)
            return n

    @property
    def active_counts(self) -> list[int]:
        """Per layer: (neuron, token) pairs that fired since the last `reset_counts`."""
        return self._open().active_counts

    @property
    def predicted_counts(self) -> list[int]:
        """Per layer: (neuron, token) pairs whose gate was computed since the last `reset_counts`:
        those that the predictor named, or all.
        """
        return self._open().predicted_counts

    @property
    def shortlisted_count(self) -> int:
        """Rows of a previewed head that were computed in full since the last `reset_counts`."""
        return self._open().shortlisted_count

    @property
    def decode_bytes(self) -> dict[str, int]:
        """Bytes of weights and KV cache that `decode` has read since the last `reset_counts`, by
        the part of the model, as the native program counted them.
        """
        with self._lock:
            return self._open().decode_bytes

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Where the time of `prefill` and `decode` went since the last `reset_counts`, by the part
        of the model and `waiting`, all threads together; zeros unless the session was opened with
        `timed=True`.
        """
        with self._lock:
            return self._open().stage_seconds

    def reset_counts(self) -> None:
        """Begin `active_counts`, `decode_bytes` and `stage_seconds` anew."""
        with self._lock:
            self._open().reset_counts()

    def close(self) -> None:
        """Give the KV cache back, as soon as a call that runs on another thread has ended."""
        with self._lock:
            self._native = self._owner = None

    def hand_to(self, owner: object) -> None:
        """Make `owner`, any object, that of the generation that runs here; the one before ends."""
        with self._lock:
            self._open()
            self._owner = owner

    @contextmanager
    def step(self, owner: object) -> Iterator[bool]:
        """Hold the session for one step of `owner`; yields False where it is another's by now."""
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

    def _open(self) -> NativeSession:
        if self._native is None:
            raise EngineClosed("the session is closed; open another one")
        return self._native

    def _in_step(self) -> NativeSession:
        """The native session, without tokens of a call that KeyboardInterrupt cut off before they
        were noted here: those count as never given.
        """
        native = self._open()
        if native.position > len(self._tokens):
            native.truncate(len(self._tokens))
        return native

    def _check_room(self, n: int) -> None:
        n_context = self._open().n_context
        if self.position + n > n_context:
            raise ContextOverflow(
                f"the context holds {n_context} tokens; {self.position} are there and {n} more do "
                "not fit"
            )
