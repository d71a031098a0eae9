"""Fp32Engine: the oracle as an engine for evaluation. It is slow, and rounds nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import open_checkpoint
from hybrid.engine.options import DEFAULT_CONTEXT
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.text.tokenizer import Tokenizer


class EvaluatedSession(Protocol):
    """The methods of a sequence that evaluation needs; `hybrid.Session` has them."""

    def reset(self) -> None: ...
    def truncate(self, position: int) -> None: ...
    def prefill(
        self, tokens: Sequence[int] | NDArray[np.integer], *, all_logits: bool = False
    ) -> NDArray[np.float32] | None: ...


class _Fp32Session:
    def __init__(self, engine: Fp32Engine) -> None:
        self._engine, self._tokens = engine, list[int]()
        self.reset()

    def reset(self) -> None:
        self._tokens.clear()
        self._session = ReferenceSession(self._engine.weights, self._engine.config)

    def truncate(self, position: int) -> None:
        if position == len(self._tokens):
            return
        kept = self._tokens[:position]
        self.reset()
        if kept:
            self.prefill(kept)

    def prefill(
        self, tokens: Sequence[int] | NDArray[np.integer], *, all_logits: bool = False
    ) -> NDArray[np.float32]:
        ids = np.asarray(tokens, np.int64)
        self._tokens += ids.tolist()
        with np.errstate(all="ignore"):  # what is not finite is found in the losses
            return self._session.prefill(ids.tolist())


class Fp32Engine:
    """A model's folder in fp32. It takes four bytes per weight, and runs at NumPy's speed."""

    is_synthetic = False

    def __init__(
        self, folder: Path, *, add_bos: bool | None = None, activation: str | None = None
    ) -> None:
        """Read the weights and the tokenizer. The options are those of `hybrid.load`.

        Raises what `open_checkpoint` and `Tokenizer.from_folder` raise, and InvalidCheckpoint for
        weights that are not finite.
        """
        with open_checkpoint(folder, activation=activation) as checkpoint:
            self.config = checkpoint.config
            self.is_synthetic = checkpoint.is_synthetic
            self.weights = read_weights(checkpoint, None)
        self.n_context = min(self.config.max_context, DEFAULT_CONTEXT)
        self.tokenizer = Tokenizer.from_folder(
            checkpoint.gguf or folder,
            vocab_size=self.config.vocab_size,
            bos_id=self.config.bos_id,
            add_bos=add_bos,
        )
        self.notices = (*checkpoint.notices, *self.tokenizer.notices)

    @contextmanager
    def open_session(self) -> Iterator[_Fp32Session]:
        yield _Fp32Session(self)

    def __enter__(self) -> Fp32Engine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass
