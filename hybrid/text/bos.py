"""Which tokens begin a text: the tokenizer's post-processor decides, as in transformers 5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from hybrid.checkpoint.name import model_name
from hybrid.errors import InvalidCheckpoint, InvalidOption, UnsupportedModel, one_line
from hybrid.text.added_tokens import content_of, is_text
from hybrid.text.vocabulary_file import is_library_error


class Bos(NamedTuple):
    """How texts of a model begin."""

    ids: tuple[int, ...]  # before each text
    empty_text: tuple[int, ...]  # what stands for an empty text; () if the model names no BOS
    notices: tuple[str, ...]  # one line each


class BosWishes(NamedTuple):
    """What others than tokenizer.json say about BOS."""

    config_id: int | None  # of config.json, or what the class of the model takes without it
    settings: dict[str, Any]  # the content of tokenizer_config.json
    add_bos: bool | None  # the user's choice; None: as the tokenizer does


def choose_bos(
    folder: Path, library: tokenizers.Tokenizer, vocab_size: int, wishes: BosWishes
) -> Bos:
    """Return what begins a text, with notices where the model's files disagree.

    If there is a tokenizer.json, transformers 5 ignores `add_bos_token` of tokenizer_config.json,
    and config.json never adds a token.

    Raises InvalidOption if the user wants BOS and the model has none, InvalidCheckpoint if it is
    not in the vocabulary or not text, and UnsupportedModel if the post-processor changes the text
    itself.
    """
    path = folder / "tokenizer.json"
    before, after = _added_tokens(library, path)
    if strange := [token for token in before if token >= vocab_size]:
        raise InvalidCheckpoint(
            f"{path}: a text begins with id {strange[0]}, but the model's ids end at "
            f"{vocab_size - 1}: the tokenizer and the weights are of different models"
        )
    notices = []
    if after:
        notices.append(
            f"{model_name(folder)}: the tokenizer puts {_names(library, after)} after a text; "
            "hybrid leaves it out, because the model is to continue the text"
        )
    named = before or _named(folder, library, vocab_size, wishes)
    if wishes.add_bos is None:
        notices += _disagreements(folder, library, before, wishes)
        return Bos(before, named, tuple(notices))
    if not wishes.add_bos:
        return Bos((), (), tuple(notices))
    if not named:
        raise InvalidOption(f"add_bos: {model_name(folder)} names no token that begins a text")
    return Bos(named, named, tuple(notices))


def _added_tokens(
    library: tokenizers.Tokenizer, path: Path
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor puts before a text and after it."""
    text: list[int] = library.encode("a", add_special_tokens=False).ids
    try:
        whole: list[int] = library.encode("a").ids
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise InvalidCheckpoint(
            f"{path}: its post_processor cannot be used: {one_line(error)}; download it again"
        ) from None
    for n_before in range(len(whole) - len(text) + 1):
        n = n_before + len(text)
        if whole[n_before:n] == text:
            return tuple(whole[:n_before]), tuple(whole[n:])
    raise UnsupportedModel(
        f"{path}: not supported: its post_processor changes the tokens of a text itself"
    )


def _named(
    folder: Path, library: tokenizers.Tokenizer, vocab_size: int, wishes: BosWishes
) -> tuple[int, ...]:
    """Return the id of the BOS token that tokenizer_config.json or config.json names, or ()."""
    token = content_of(wishes.settings.get("bos_token"))
    if token and not is_text(token):
        raise InvalidCheckpoint(
            f"{folder / 'tokenizer_config.json'} or special_tokens_map.json: bos_token: expected "
            f"valid Unicode, found {token!r:.40}"
        )
    named = library.token_to_id(token) if token else None
    if named is None or named >= vocab_size:
        named = wishes.config_id
    return () if named is None else (named,)


def _disagreements(
    folder: Path, library: tokenizers.Tokenizer, before: tuple[int, ...], wishes: BosWishes
) -> list[str]:
    """Return a notice if another file says something else than tokenizer.json."""
    others = []
    if wishes.config_id is None and before:
        others.append("the model's config has no BOS")
    elif wishes.config_id is not None and before != (wishes.config_id,):
        others.append(f"the model's config has {_names(library, [wishes.config_id])} as BOS")
    adds_bos = wishes.settings.get("add_bos_token")
    if isinstance(adds_bos, bool) and adds_bos != bool(before):
        others.append(f"tokenizer_config.json has add_bos_token {str(adds_bos).lower()}")
    if not others:
        return []
    begin = f"a text begins with {_names(library, before)}" if before else "no BOS begins a text"
    return [
        f"{model_name(folder)}: {begin}, as tokenizer.json says, although {' and '.join(others)}; "
        "add_bos (--bos, --no-bos) changes that"
    ]


def _names(library: tokenizers.Tokenizer, ids: Sequence[int]) -> str:
    return " ".join(f"{library.id_to_token(token)!r} (id {token})" for token in ids)
