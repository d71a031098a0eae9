"""Added tokens that only other files than tokenizer.json list; transformers adds them too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from hybrid.checkpoint.name import model_name
from hybrid.errors import InvalidCheckpoint, one_line

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(
    folder: Path,
    library: tokenizers.Tokenizer,
    settings: dict[str, Any],
    legacy: dict[str, Any],
    vocab_size: int,
) -> tuple[str, ...]:
    """Add the tokens that `library` lacks. Return notices of those that the model cannot have.

    `settings` is the content of tokenizer_config.json. `legacy`, the content of added_tokens.json,
    counts only if `settings` has no `added_tokens_decoder`. Raises InvalidCheckpoint if either
    lists something else than tokens.
    """
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        listed = _from_settings(decoder, folder / "tokenizer_config.json")
    else:
        listed = _from_legacy(legacy, settings, folder / "added_tokens.json")
    known = library.get_added_tokens_decoder()
    contents = {token.content for token in known.values()}
    strange = []
    for token_id, token in sorted(listed, key=lambda entry: entry[0]):
        if token.content in contents:
            continue
        place = library.token_to_id(token.content)
        if place is None:  # the library gives a new token the next id
            place = max(library.get_vocab_size(with_added_tokens=False), max(known, default=-1) + 1)
        if place != token_id or place >= vocab_size:
            strange.append(f"{token.content!r} (id {token_id})")
            continue
        library.add_tokens([token])
        known[place] = token
        contents.add(token.content)
    if not strange:
        return ()
    names = ", ".join(strange)
    return (
        f"{model_name(folder)}: tokens that the model does not have are left out: {names:.200}",
    )


def _from_settings(decoder: object, path: Path) -> Iterator[tuple[int, tokenizers.AddedToken]]:
    if not isinstance(decoder, dict):
        raise _invalid(path, "added_tokens_decoder", decoder)
    for key, value in decoder.items():
        fields = value if isinstance(value, dict) else {}
        flags = {name: fields[name] for name in _FLAGS if name in fields}
        if (
            not re.fullmatch("[0-9]{1,9}", key)
            or not is_text(fields.get("content"))
            or not all(isinstance(flag, bool) for flag in flags.values())
        ):
            raise _invalid(path, f"added_tokens_decoder: {key:.20}", value)
        yield int(key), tokenizers.AddedToken(fields["content"], **flags)


def _from_legacy(
    legacy: dict[str, Any], settings: dict[str, Any], path: Path
) -> Iterator[tuple[int, tokenizers.AddedToken]]:
    special = {content_of(value) for key, value in settings.items() if key.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = settings.get(key)
        special |= {content_of(value) for value in values} if isinstance(values, list) else set()
    for content, token_id in legacy.items():
        if type(token_id) is not int or token_id < 0 or not is_text(content):
            raise _invalid(path, f"{content:.40}", token_id)
        is_special = content in special
        yield (
            token_id,
            tokenizers.AddedToken(content, normalized=not is_special, special=is_special),
        )


def content_of(value: object) -> str | None:
    """Return a special token's text, from the text itself or from an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def is_text(value: object) -> bool:
    """Return whether a value is text that can be encoded: not empty, without lone surrogates."""
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


def _invalid(path: Path, name: str, found: object) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"{path}: {one_line(name)}: expected an added token, found {found!r:.80}"
    )
