"""The stories that the bundled model has not seen, and its loss on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from train import VALID_FILE, encode_stories, read_stories

import hybrid
from hybrid.engine.oracle.comparison import mean_loss

STORIES = Path(hybrid.__file__).parent / "models" / "stories"


def read_held_out(data: Path, max_tokens: int) -> list[NDArray]:
    """Return the token ids of each story, cut to `max_tokens`."""
    tokenizer = Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    stories = encode_stories(tokenizer, read_stories(data / VALID_FILE))
    return [ids[:max_tokens] for ids in stories]


class Loss:
    """The mean loss over several stories, in nats per token."""

    def __init__(self) -> None:
        self.total, self.n = 0.0, 0

    def add(self, logits: NDArray[np.float32], ids: NDArray) -> None:
        n = len(ids) - 1  # the first token is not predicted
        self.total += n * mean_loss(logits, ids.tolist())
        self.n += n

    @property
    def mean(self) -> float:
        return self.total / self.n
