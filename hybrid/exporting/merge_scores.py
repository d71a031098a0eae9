"""SentencePiece's scores for a BPE vocabulary that lists merges.

A merge list and scores say the same under two conditions. In both the neighbours with the best rank
or score are merged first. What happens within a piece's text does not depend on its neighbours, so
if the piece comes about at all, its last merge is always the same one. The score is that merge's
rank. The second condition: SentencePiece merges any neighbours whose joined text is a piece. So no
piece may end as two symbols that the list does not merge. `never_made` finds those that do.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import tokenizers

Merge = tuple[str, str]


def merge_scores(merges: Sequence[Merge], pieces: Collection[str]) -> dict[str, float]:
    """Return each piece's score; a higher one is merged first."""
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    of_piece: dict[str, list[int]] = defaultdict(list)
    for (left, right), rank in ranks.items():
        of_piece[left + right].append(rank)
    scores = {piece: -float(len(merges)) for piece in pieces}
    for piece, found in of_piece.items():
        if piece in scores:
            scores[piece] = -float(_last_rank(piece, found, ranks))
    return scores


def _last_rank(piece: str, found: list[int], ranks: Mapping[Merge, int]) -> int:
    """Return the rank of the merge that makes a piece, of several that could."""
    if max(found) - min(found) == len(found) - 1:  # nothing is ranked between them
        return min(found)
    symbols = list(piece)
    while len(symbols) > 2:
        pairs = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(symbols)]
        best = min(pairs)
        if best == len(ranks):
            return min(found)  # it is never made
        at = pairs.index(best)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return ranks.get((symbols[0], symbols[-1]), min(found))


def never_made(merges: Sequence[Merge], pieces: Collection[str]) -> list[str]:
    """Return the pieces that SentencePiece would make and the merges do not.

    Letters that are no pieces count as symbols, as they do there.
    """
    letters = {letter for piece in pieces for letter in piece}
    names = dict.fromkeys([*letters, *pieces, *(left + right for left, right in merges)])
    vocab = {name: id for id, name in enumerate(names)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    long = [piece for piece in pieces if len(piece) > 1]
    encodings = library.encode_batch(long)
    return [piece for piece, found in zip(long, encodings, strict=True) if len(found.ids) == 2]
