"""The name of a model in a folder, as messages show it."""

from __future__ import annotations

from pathlib import Path


def model_name(folder: Path) -> str:
    """Return the Hugging Face repository that a folder is a cached copy of, or the folder's name.

    In huggingface_hub's cache a model lies in `models--owner--name/snapshots/<commit>`, so the last
    part of its path would say nothing.
    """
    # A link keeps the name that the user gave it, but "." and ".." are no names.
    path = folder.resolve() if folder.name in ("", "..") else folder.absolute()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name
