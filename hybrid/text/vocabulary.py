"""Vocabulary: a model's tokenizer in the `tokenizers` library, checked, and what its tokens mean.

The library encodes: its normalizer, added tokens, pre-tokenizer and model (BPE, Unigram, WordLevel)
apply to every text, whatever the file's layout is. What hybrid has to know about a layout, it finds
out from what the library does with probes.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import tokenizers

from hybrid.checkpoint.name import model_name
from hybrid.errors import InvalidOption, UnsupportedModel, one_line
from hybrid.text.decoding import read_decoding
from hybrid.text.markers import MarkedText, Span
from hybrid.text.vocabulary_file import is_library_error, read_vocabulary

LONG = 10_000  # characters of a text that takes milliseconds to encode
_MAX_ROUNDS = 8  # of finding control tokens that a text must not have
# Characters that no piece joins with others in some vocabulary: private use, control, punctuation.
_SEPARATORS = (*map(chr, range(0xE000, 0xE010)), *map(chr, range(1, 9)), *"\n\t|~^☂")
_RARE = "\U0010fffd☂\ue000"  # no vocabulary has them as pieces


class Vocabulary:
    """Text ↔ ids. Immutable, so threads may share it."""

    size: int  # of the model: ids are below it
    library: tokenizers.Tokenizer  # never encodes a special token that a text spells
    notices: tuple[str, ...]  # one line each
    longest_piece: int
    special: tuple[str, ...]  # texts of the tokens that no text may become
    ordinary: tuple[str, ...]  # texts of the added tokens that a text does become

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        size: int,
        layout: dict[str, Any] | None = None,
    ) -> None:
        """Read tokenizer.json, or else tokenizer.model; `read_settings` gives the rest.

        Raises InvalidCheckpoint if a file is missing, broken or has ids that the model lacks, and
        UnsupportedModel for tokenizers of other kinds.
        """
        file = read_vocabulary(folder, settings, size, layout)
        library, added, unknown = file.library, file.added, file.unknown
        self.size, self._path = size, file.path
        self._decoding = read_decoding(file.path, library, file.decoder, file.pieces, size)
        self.special = tuple(token.content for token in added.values() if token.special)
        self.ordinary = tuple(token.content for token in added.values() if not token.special)
        # The token of unknown characters controls nothing.
        self._harmless = {None if unknown is None else library.token_to_id(unknown)}
        self._control = {id for id, token in added.items() if token.special} - self._harmless
        self.library, self._marked = library, _twin(library)
        library.encode_special_tokens = True  # "</s>" in a text is four characters, not an id
        self.longest_piece = max(map(len, file.pieces), default=1)  # in characters
        self._before = self._find_text_before(file.pieces)
        self._n_before = len(self._encode(library, self._before).ids)
        self.notices = (*file.notices, *self._notice_unknown(folder, unknown))

    def token_id(self, text: str) -> int | None:
        token: int | None = self.library.token_to_id(text)
        return None if token is None or token >= self.size else token

    def has_piece(self, text: str) -> bool:
        return self.library.token_to_id(text) is not None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without BOS. Special tokens that it spells stay text."""
        return self._encode_parts(self.library, MarkedText(text), self._control)

    def encode_after(self, text: str) -> list[int]:
        """Return the tokens that `text` has after other text."""
        return self._encode_parts(self.library, MarkedText(text), self._control, follows=True)

    def encode_marked(
        self, marked: MarkedText, markers: Iterable[str], *, follows: bool = False
    ) -> list[int]:
        """Return the tokens of a text that has control tokens, in its genuine places only.

        These are the special tokens, and `markers` that are tokens. What is imitated gets other
        tokens, which decode to the same text. `follows`: other text is before it. Raises
        InvalidOption if the vocabulary has no other tokens for it.
        """
        control = self._control | {self.library.token_to_id(marker) for marker in markers}
        return self._encode_parts(self._marked, marked, control - self._harmless, follows=follows)

    def join(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that tokens add to a text. Raises InvalidOption."""
        piece, size = self._decoding.piece, self.size
        ids = list(ids)
        strange = [token for token in ids if not 0 <= token < size]
        if strange:
            raise InvalidOption(f"token id {strange[0]}: expected 0 to {size - 1}")
        return b"".join([piece(token) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return self._decoding.text_of(self.join(ids))

    @property
    def drops_space(self) -> bool:
        """Whether a text has one leading space less than its tokens."""
        return self._decoding.drops_space

    def _encode_parts(
        self,
        library: tokenizers.Tokenizer,
        marked: MarkedText,
        control: Set[int | None],
        *,
        follows: bool = False,
    ) -> list[int]:
        """Return the tokens of a text, with control tokens in its genuine places only.

        The caller knows imitations that the text spells. Two things could make others: a normalizer
        that makes those of a token of other characters, and a model that finds a special token's
        piece in a text (Unigram). They are found in the result, which is then made again.
        """
        imitated = _merged(marked.imitated)
        for _ in range(_MAX_ROUNDS):
            ids: list[int] = []
            forged: list[Span] = []
            at = 0
            for first, last in [*imitated, (len(marked.text), len(marked.text))]:
                if first > at:
                    run, spans = self._encode_run(
                        library, marked.text[at:first], control, follows=follows or at > 0
                    )
                    ids += run
                    found = [(a + at, b + at) for a, b in spans]
                    forged += [span for span in found if not _holds(span, marked.genuine)]
                if last > first:
                    ids += self._spell(marked.text[first:last])
                at = last
            if not forged:
                return ids
            imitated = _merged([*imitated, *forged])
        raise InvalidOption("text: the tokenizer makes control tokens of it in too many places")

    def _encode_run(
        self, library: tokenizers.Tokenizer, text: str, control: Set[int | None], *, follows: bool
    ) -> tuple[list[int], list[Span]]:
        """Return a text's tokens, and where control tokens are among them."""
        before, n = (self._before, self._n_before) if follows else ("", 0)
        encoding = self._encode(library, before + text)
        ids: list[int] = encoding.ids[n:]
        if control.isdisjoint(ids):
            return ids, []
        spans = [encoding.token_to_chars(n + at) for at, id in enumerate(ids) if id in control]
        return ids, [(a - len(before), b - len(before)) for a, b in spans]

    def _encode(self, library: tokenizers.Tokenizer, text: str) -> Any:
        try:
            if len(text) > LONG:  # `encode` keeps the GIL, `encode_batch` does not
                return library.encode_batch([text], add_special_tokens=False)[0]
            return library.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not is_library_error(error):
                raise
            raise InvalidOption(
                f"text: the model's tokenizer cannot encode it: {one_line(error, 200)}; perhaps it "
                "has no token for unknown characters"
            ) from None

    def _spell(self, text: str) -> list[int]:
        """Return tokens that decode to `text`, and that differ from those of a marker."""
        byte_ids = self._decoding.byte_ids
        ids: list[int] = []
        for character in text:
            if byte_ids is not None:
                ids += [byte_ids[byte] for byte in character.encode()]
            else:
                ids += self._encode(self.library, self._before + character).ids[self._n_before :]
        usual = self._encode(self._marked, self._before + text).ids[self._n_before :]
        if ids == usual or not self._control.isdisjoint(ids):
            raise InvalidOption(
                f"the text spells {text!r:.60}, which this model's vocabulary cannot tell from a "
                "control token or a marker of its chat template; remove it"
            )
        return ids

    def _find_text_before(self, vocab: dict[str, int]) -> str:
        """Return a text after which the library encodes any text as in the middle of one.

        Normalizers and pre-tokenizers of many kinds put a space before a text. So a text that
        follows other text is encoded behind a character that joins nothing, and that character's
        tokens are removed. "" if the library puts nothing before a text.
        """

        def encoded(text: str) -> list[int]:
            ids: list[int] = self._encode(self.library, text).ids
            return ids

        if self.join(encoded("a")) == b"a":
            return ""
        letters = ["a", *[piece for piece in vocab if len(piece) == 1 and piece.isalpha()][:100]]
        letter = next((c for c in letters if self.join(encoded(c)).strip() == c.encode()), "a")
        if self.join(encoded(letter)) == letter.encode():
            return ""
        names = {token: piece for piece, token in vocab.items()}
        unknown = self._unknown_ids()
        joined = "\0".join(vocab)
        for character in _SEPARATORS:
            alone, followed = encoded(character), encoded(character + letter)
            last = names[alone[-1]] if alone else ""
            if (
                last
                and alone[-1] not in unknown
                and not re.search(re.escape(last) + "[^\0]", joined)
                and followed[: len(alone)] == alone
                and self.join(followed[len(alone) :]) == letter.encode()
            ):
                return character
        raise UnsupportedModel(
            f"{self._path}: not supported: it puts something before every text, and hybrid finds "
            "no way to encode a text that follows another without that"
        )

    def _unknown_ids(self) -> set[int]:
        """Return the tokens of characters that the vocabulary lacks."""
        try:
            return {id for id in self._encode(self.library, _RARE).ids if not self.join([id])}
        except InvalidOption:
            return set()

    def _notice_unknown(self, folder: Path, unknown: str | None) -> Sequence[str]:
        """Say so if the vocabulary cannot express every text."""
        try:
            # Normalizers of some models remove rare characters, or change the case.
            if _RARE[1].encode() in self.join(self._encode(self.library, _RARE).ids):
                return ()
            what = f"become {unknown!r}" if unknown else "are left out"
        except InvalidOption:
            what = "are refused"
        return (
            f"{model_name(folder)}: the vocabulary has no bytes: characters that it lacks {what}",
        )


def _twin(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer that also encodes special tokens. It shares the model, the large part."""
    twin = tokenizers.Tokenizer(library.model)
    for name in ("normalizer", "pre_tokenizer"):
        if getattr(library, name) is not None:
            setattr(twin, name, getattr(library, name))
    added = library.get_added_tokens_decoder()
    twin.add_tokens([added[token] for token in sorted(added)])
    return twin


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Return the same characters as spans that are in order and do not overlap."""
    merged: list[Span] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def _holds(span: Span, genuine: Sequence[Span]) -> bool:
    """Return whether one of the spans, which are in order, lies within `span`."""
    at = bisect_left(genuine, (span[0], 0))
    return at < len(genuine) and genuine[at][1] <= span[1]
