"""The texts that a recording runs on: text files of any length, or texts that the model writes.

A corpus is a named stream of token windows. Each window runs from an empty KV cache. The stream can
be entered again at any place that it returned, so that an interrupted recording can continue.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hybrid import Engine, GenerationOptions, InvalidOption, Progress
from hybrid.files import open_file, read_bytes, write_atomically
from hybrid.notices import Notices
from hybrid.text.text_file import BOM, text_notices
from predictors import schema

CHUNK_BYTES = 1 << 18
WRITTEN_TOKENS = 256  # maximum length of each text that the model writes
RANDOM_TOKENS = 4096  # length of each of the two texts for a synthetic model


class Corpus(Protocol):
    @property
    def name(self) -> str: ...

    def about(self) -> dict[str, Any]:
        """Return the name, hash and size, for the profile."""

    @property
    def size(self) -> int:
        """The place where it ends."""

    def windows(self, engine: Engine, window: int, place: int) -> Iterator[tuple[list[int], int]]:
        """Yield at most `window` token ids, beginning at `place`, and the place after them."""


class TextFile:
    """UTF-8 text, read a chunk at a time, byte for byte (hybrid/text/text_file.py).

    Places are byte offsets. With a separator, each document begins a new window.
    """

    notices: tuple[str, ...]  # what a user should know about the text, one line each

    def __init__(self, path: Path, separator: str | None = None) -> None:
        """Hash the file. Raises InvalidOption if it cannot be read or is empty."""
        self.path, self.name = path, path.name
        self.separator = separator.encode() if separator else None
        digest = hashlib.sha256()
        has_crlf, last = False, b""
        try:
            with open_file(path) as file:
                self._start = len(BOM) if file.read(len(BOM)) == BOM else 0
                file.seek(0)
                while block := file.read(1 << 22):
                    digest.update(block)
                    has_crlf = has_crlf or b"\r\n" in last + block
                    last = block[-1:]
                self._size = file.tell()
        except OSError as error:
            raise InvalidOption(f"--text {path}: {error.strerror}") from error
        if self._size == self._start:
            raise InvalidOption(f"--text {path}: there is no text in it")
        self.sha256 = digest.hexdigest()
        has_bom = self._start > 0
        self.notices = text_notices(f"--text {path}", has_bom=has_bom, has_crlf=has_crlf)

    @property
    def size(self) -> int:
        return self._size

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "bytes": self._size}

    def windows(self, engine: Engine, window: int, place: int) -> Iterator[tuple[list[int], int]]:
        bos = list(engine.tokenizer.bos)
        for text, end in self._documents(place):
            ids = engine.tokenizer.encode_continuation(text)
            step = window - len(bos)
            for first in range(0, len(ids), step):
                is_last = first + step >= len(ids)
                # Only the end of a document is a place. Resuming inside it would cut other windows.
                yield bos + ids[first : first + step], end if is_last else place
            place = end

    def _documents(self, place: int) -> Iterator[tuple[str, int]]:
        """Yield texts and the place after each. Where a text ends depends only on its start."""
        least = 16 * CHUNK_BYTES if self.separator else CHUNK_BYTES
        place = max(place, self._start)
        with open_file(self.path) as file:
            file.seek(place)
            rest = file.read(least)
            while rest:
                cut = self._cut(rest, least)
                part, rest = rest[:cut], rest[cut:]
                place += cut
                yield self._decode(part, place), place
                if len(rest) < least:
                    rest += file.read(least)

    def _cut(self, rest: bytes, least: int) -> int:
        """Return the length of the next document in bytes.

        `rest` is shorter than `least` only at the end of the file.
        """
        if self.separator and (found := rest.find(self.separator)) >= 0:
            return found + len(self.separator)
        if len(rest) < least:
            return len(rest)
        chunk = rest[:least]
        if newline := chunk.rfind(b"\n") + 1:
            return newline
        cut = least
        while cut > 1 and rest[cut - 1] & 0xC0 == 0x80:  # do not cut inside a character
            cut -= 1
        return cut - 1 if cut > 1 else least

    def _decode(self, part: bytes, place: int) -> str:
        try:
            text = part.decode("utf-8")
        except UnicodeDecodeError as error:
            at = place - len(part) + error.start
            raise InvalidOption(f"--text {self.path}: not UTF-8 text (byte {at})") from error
        if self.separator:
            text = text.removesuffix(self.separator.decode()).strip("\r\n")
        return text


@dataclass(frozen=True, slots=True)
class TokenLists:
    """Sequences of ids in memory. Places count sequences."""

    name: str
    sequences: Sequence[list[int]]

    @property
    def size(self) -> int:
        return len(self.sequences)

    def about(self) -> dict[str, Any]:
        ids = json.dumps(self.sequences).encode()
        return {"name": self.name, "sha256": hashlib.sha256(ids).hexdigest(), "bytes": 0}

    def windows(self, engine: Engine, window: int, place: int) -> Iterator[tuple[list[int], int]]:
        for index in range(place, len(self.sequences)):
            ids = self.sequences[index]
            for first in range(0, len(ids), window):
                is_last = first + window >= len(ids)
                yield ids[first : first + window], index + 1 if is_last else index


def random_corpora(engine: Engine, window: int) -> list[TokenLists]:
    """Make seeded random ids for a synthetic model.

    Text means nothing to such a model, and its own text loops.
    """
    n = max(1, RANDOM_TOKENS // window)
    vocab_size = engine.config.vocab_size
    return [
        TokenLists(
            f"random tokens, seed {seed}",
            np.random.default_rng(seed).integers(0, vocab_size, (n, window)).tolist(),
        )
        for seed in (1, 2)
    ]


def written_corpora(
    engine: Engine, folder: Path, progress: Progress, notices: Notices
) -> list[TokenLists]:
    """Let the model write texts from PROMPTS, one corpus for each kind of text.

    The texts are kept in `folder`, one file each, so that an interrupted recording need not write
    them again. A broken file is written again, with a notice. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(map(len, PROMPTS.values()))
    corpora, done = [], 0
    for kind, prompts in PROMPTS.items():
        sequences = []
        for index, prompt in enumerate(prompts):
            progress("writing texts to record on, texts", done, total)
            path = folder / f"{kind}_{index:02}.json"
            ids = _kept(engine, path, notices)
            if ids is None:
                ids = _write(engine, prompt, seed=index)
                write_atomically(path, json.dumps(ids).encode())
            sequences.append(ids)
            done += 1
        corpora.append(TokenLists(f"self-written: {kind}", sequences))
    progress("writing texts to record on, texts", total, total)
    return corpora


def _kept(engine: Engine, path: Path, notices: Notices) -> list[int] | None:
    """Return the ids of a text that an earlier run wrote, or None if it must be written."""
    token = schema.integer(0, engine.config.vocab_size - 1)
    ids = schema.list_of(token, least=1, most=engine.n_context)
    try:
        kept: list[int] = schema.read_json(read_bytes(path, 1 << 20), ids)
    except FileNotFoundError:
        return None
    except (OSError, schema.Malformed) as error:
        what = error.strerror if isinstance(error, OSError) else error
        notices.add(f"{path}: is not a text of an earlier run ({what}); it was written again")
        return None
    return kept


def _write(engine: Engine, prompt: str, seed: int) -> list[int]:
    """Return the ids of a prompt and its continuation by the model.

    Tokens are drawn from the model's own distribution (temperature 1, no penalty) without its least
    likely twentieth, whatever generation_config.json says of sampling. Its rules about tokens hold,
    since they also hold for the answers that users get.
    """
    room = min(WRITTEN_TOKENS, engine.n_context // 2)
    with engine.open_session() as session:
        options = GenerationOptions(
            max_tokens=room,
            temperature=1.0,
            top_k=0,
            top_p=0.95,
            min_p=0.0,
            repeat_penalty=1.0,
            stop=(),
            seed=seed,
        )
        generation = engine.generate(prompt, session=session, options=options)
        for _ in generation:
            pass
        return list(session.tokens)


# Varied prompts, so that different neurons fire.
PROMPTS = {
    "english": [
        "Tell me a story about a lighthouse keeper who finds a letter.",
        "Explain to a child why the sky is blue and sunsets are red.",
        "Write a polite letter that asks a landlord to mend a broken heater.",
        "What are the arguments for and against working from home?",
        "Describe a market street on a rainy morning.",
        "Summarise how a bill becomes a law in a parliament.",
        "Once upon a time there was a fox who",
        "Give me a recipe for a vegetable soup, with amounts.",
    ],
    "chinese": [
        "请介绍一下中国的四大发明。",
        "写一首关于秋天的短诗。",
        "怎样才能养成早起的习惯?请给出建议。",
        "请解释什么是人工智能,并举两个例子。",
        "讲一个关于诚实的小故事。",
        "请写一封感谢老师的信。",
    ],
    "code": [
        "Write a Python function that returns the n-th Fibonacci number, with a test.",
        "Write a C program that counts the words of a file.",
        "Explain what a hash table is and show one in Java.",
        "Write a SQL query for the three best-paid employees of each department.",
        "def quicksort(items):\n",
        "Write an HTML page with a form for a name and an e-mail address.",
    ],
    "maths": [
        "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Show the steps.",
        "Solve the equation 3x + 7 = 2x - 5 and check the answer.",
        "Prove that the square root of two is irrational.",
        "What is the probability of two sixes in four throws of a die?",
        "Compute the derivative of x^3 sin(x), step by step.",
    ],
}
