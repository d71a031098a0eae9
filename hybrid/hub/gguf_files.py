"""GGUF files of a repository: which of them a name means, such as owner/name:Q4_0."""

from __future__ import annotations

import re
from collections.abc import Collection

from hybrid.checkpoint.gguf.weights import PART
from hybrid.errors import InvalidOption
from hybrid.notices import short_list


def gguf_models(listed: Collection[str]) -> dict[str, list[str]]:
    """Return the models that are whole: by their first file, all files in order."""
    models: dict[str, list[str]] = {}
    for name in sorted(name for name in listed if name.endswith(".gguf") and "/" not in name):
        match = PART.fullmatch(name)
        if match is None:
            models[name] = [name]
        else:
            models.setdefault(f"{match[1]}-00001-of-{match[3]}.gguf", []).append(name)
    return {first: files for first, files in models.items() if len(files) == _n_parts(first)}


def _n_parts(name: str) -> int:
    match = PART.fullmatch(name)
    return 1 if match is None else int(match[3])


def choose(repo_id: str, listed: Collection[str], wish: str) -> list[str]:
    """Return the files of the model that a user means by a file's name or by a type, such as Q4_0.

    Raises InvalidOption, with the repository's models, if there is none such or several.
    """
    models = gguf_models(listed)
    if wish in models:
        return models[wish]
    # Names are such as MiniCPM-S-1B.Q4_K_M.gguf. Q4_K must not mean that.
    pattern = re.compile(rf"(?i)(^|[.\-_]){re.escape(wish)}([.\-]|$)")
    found = [first for first in models if pattern.search(first.removesuffix(".gguf"))]
    if len(found) == 1:
        return models[found[0]]
    problem = "has no GGUF model" if not found else f"has {len(found)} GGUF models"
    names = short_list(list(models), 20) if models else "none"
    raise InvalidOption(f"{repo_id} {problem} {wish!r:.80}; its GGUF models: {names}")
