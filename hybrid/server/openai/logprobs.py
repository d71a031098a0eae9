"""Log-probabilities, as OpenAI's two completion endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid import TokenLogprobs
from hybrid.text.tokenizer import Tokenizer


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `logprobs` of a chat completion."""

    def scored(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        text = data.decode("utf-8", errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            {
                **scored(entry.token, entry.logprob),
                "top_logprobs": [scored(*likely) for likely in entry.top],
            }
            for entry in entries
        ]
    }


class TextLogprobs:
    """The `logprobs` of one choice of a text completion, as far as they have been sent."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], first: int | None) -> None:
        """`before` are the tokens before the text that the client gets.

        `first` is the first token of that text if nothing predicts it, so that its entry is None.
        """
        self._tokenizer, self._first = tokenizer, first
        self._detokenizer = tokenizer.stream(before)
        self._offset = 0  # of the next token in the text
        self._n_sent = 0

    def following(self, entries: Sequence[TokenLogprobs | None]) -> dict[str, Any] | None:
        """Return what follows what was sent; None if nothing does."""
        found: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for entry in entries[self._n_sent :]:
            token = self._first if entry is None else entry.token
            assert token is not None
            found["tokens"].append(self._tokenizer.decode_token(token))
            found["token_logprobs"].append(None if entry is None else entry.logprob)
            found["top_logprobs"].append(None if entry is None else self._top(entry))
            found["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.push(token))
        self._n_sent = len(entries)
        return found if found["tokens"] else None

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Return the likeliest tokens by their text. Of several with one text the first counts."""
        top: dict[str, float] = {}
        for token, logprob in entry.top:
            top.setdefault(self._tokenizer.decode_token(token), logprob)
        return top
