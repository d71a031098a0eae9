"""Finds the folder on this machine that belongs to a model's name.

This file owns the names that hybrid knows, the rules for other names, and the place of hybrid's own
files. `download` gets a repository onto the machine, and `checkpoint` reads it.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hybrid.checkpoint import foreign
from hybrid.checkpoint.gguf.weights import first_part
from hybrid.checkpoint.hf import read_config
from hybrid.checkpoint.synthetic import folder as synthetic
from hybrid.checkpoint.synthetic.weights import ACTIVE_FRACTION
from hybrid.errors import DownloadFailed, InvalidOption, ModelNotFound
from hybrid.hub.download import fetch, fetch_gguf
from hybrid.hub.model_files import CONFIG, WEIGHTS
from hybrid.notices import Notices, short_list
from hybrid.progress import Progress, ignore_progress
from hybrid.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that hybrid knows by name."""

    name: str
    repo_id: str | None  # on the Hugging Face Hub; None: bundled with the package
    description: str
    expected_active_fraction: float | None  # 1 - the sparsity that its authors published
    expected_perplexity: float | None = None  # on the self-check's text, in bf16


_CATALOG = (
    CatalogEntry("stories", None, "bundled: a tiny model that tells stories", 0.078, 10.16),
    CatalogEntry(
        "MiniCPM-S-1B",
        "openbmb/MiniCPM-S-1B-sft",
        "1.4 B parameters with FATReLU, chats in English and Chinese; 2.7 GB",
        0.1211,
    ),
    CatalogEntry(
        "MiniCPM-S-1B-llama-format",
        "openbmb/MiniCPM-S-1B-sft-llama-format",
        "MiniCPM-S-1B as a Llama with plain ReLU",
        None,
    ),
    CatalogEntry(
        "ProSparse-7B", "SparseLLM/prosparse-llama-2-7b", "Llama 2 7B with FATReLU", 0.1068
    ),
    CatalogEntry(
        "ProSparse-13B", "SparseLLM/prosparse-llama-2-13b", "Llama 2 13B with FATReLU", 0.1120
    ),
    CatalogEntry("ReluLLaMA-7B", "SparseLLM/ReluLLaMA-7B", "Llama 2 7B with ReLU", 0.3302),
    CatalogEntry("ReluLLaMA-13B", "SparseLLM/ReluLLaMA-13B", "Llama 2 13B with ReLU", 0.2844),
    CatalogEntry("MiniCPM-1B", "openbmb/MiniCPM-1B-sft-bf16", "dense (SiLU): no sparsity", None),
    CatalogEntry("MiniCPM-2B", "openbmb/MiniCPM-2B-sft-bf16", "dense (SiLU): no sparsity", None),
)
_BY_NAME = {entry.name.casefold(): entry for entry in _CATALOG}
_REPO_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
_GGUF_OF_REPO = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]{1,200})", re.ASCII)
_HUB_SCHEME = "hf://"  # as in huggingface_hub: certainly a repository, whatever folders there are
_MAX_LISTED = 10_000  # folders that are searched for a similar name


def catalog() -> tuple[CatalogEntry, ...]:
    """Every model that hybrid knows by name."""
    return _CATALOG


def hybrid_home() -> Path:
    """Return the folder of hybrid's own files.

    It is `HYBRID_HOME`, or `hybrid` in the user's cache folder if that is not set. Raises
    InvalidOption if a home directory is needed and there is none.
    """
    home = os.environ.get("HYBRID_HOME")
    if home:
        return _expand_user(home)
    return _expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hybrid"


def resolve(
    model: str | Path,
    *,
    offline: bool = False,
    progress: Progress = ignore_progress,
    notices: Notices | None = None,
) -> Path:
    """Return the folder of a model's files. Downloads them first if this machine lacks them.

    The meanings of a string are tried in this order:

    - a name of the catalog, or of a synthetic model such as "synthetic:MiniCPM-S-1B", in any case
    - an existing folder, or a GGUF file, whatever its name
    - a repository `owner/name` on the Hugging Face Hub

    So a name of the catalog wins over a folder of that name in the working directory: write
    `./stories` for the folder. A `Path` is always a folder.

    A string that looks like a path is never downloaded, so that a typing error cannot bring
    somebody's repository: one that begins with `.`, `~`, `/` or a drive, that has a backslash or
    more than one slash, or whose first part is a folder here. `hf://owner/name` is the repository
    even then, and so is `owner/name` if it was downloaded before.

    If the model is complete on this machine, the network is not used. `progress` is called only
    during a download. `notices` receives what may differ from the model's own text.

    Raises ModelNotFound or DownloadFailed, and InvalidOption for what cannot be a name at all. A
    download's config and tokenizer are checked before its weights are fetched, which raises
    InvalidCheckpoint or UnsupportedModel.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InvalidOption(f"model: expected a name or a folder, found {type(model).__name__}")
    text = os.fspath(model)
    if not text.strip() or "\0" in text:
        raise InvalidOption(
            f"model={text!r} is empty or holds a NUL character; expected a name such as "
            f"{_CATALOG[1].name!r}, a folder, or a Hugging Face repository owner/name"
        )
    if isinstance(model, str) and _is_synthetic(text):
        return synthetic.make_synthetic(text, hybrid_home())
    if isinstance(model, str) and (entry := _BY_NAME.get(text.casefold())):
        if entry.repo_id is None:
            return _bundled(entry)
        return _fetch(entry.repo_id, offline, progress, notices)

    if isinstance(model, str) and text.startswith(_HUB_SCHEME):
        repo_id = text.removeprefix(_HUB_SCHEME)
        named = _GGUF_OF_REPO.fullmatch(repo_id)
        if named and _is_repo_id(named[1]):
            return _fetch_gguf(named, offline, progress)
        if not _is_repo_id(repo_id):
            raise ModelNotFound(f"{text!r}: expected {_HUB_SCHEME}owner/name")
        return _fetch(repo_id, offline, progress, notices)

    if isinstance(model, str) and "://" in text:
        raise ModelNotFound(f"{text!r} is a URL; expected a Hugging Face repository as owner/name")

    path = _expand_user(text)
    try:
        is_folder = path.is_dir()
        if is_folder:
            return _gguf_of_folder(path) or path
        if foreign.is_gguf(path):
            return first_part(path)
        if path.exists():
            kind = foreign.file_kind(path)
            raise ModelNotFound(
                f"{text!r} is a file; expected the folder that holds the model, or a GGUF file"
                + (f": {kind}" if kind else "")
            )
        if path.is_symlink():
            raise ModelNotFound(f"{text!r} is a link to a folder that is not there")
        is_path = isinstance(model, Path) or _looks_like_path(text)
    except OSError as error:  # no permission to look, or longer than a file name may be
        raise ModelNotFound(f"cannot look at {text!r}: {error.strerror}") from error
    except ValueError as error:  # a lone surrogate
        raise ModelNotFound(f"{text!a} cannot be the name of a folder: {error}") from error

    named = _GGUF_OF_REPO.fullmatch(text) if isinstance(model, str) else None
    if named and _is_repo_id(named[1]):
        return _fetch_gguf(named, offline, progress)
    if is_path:
        if isinstance(model, str) and _is_repo_id(text):
            with contextlib.suppress(ModelNotFound):
                return _fetch(text, True, progress, notices)
        raise ModelNotFound(_no_such_folder(text, path))
    if not _is_repo_id(text):
        raise ModelNotFound(_not_found(text, path))
    try:
        return _fetch(text, offline, progress, notices)
    except (ModelNotFound, DownloadFailed) as error:
        hint = _similar_folder(path)
        if isinstance(error, DownloadFailed) and not hint:
            raise  # most likely a repository is meant
        raise type(error)(f"there is no folder {text!r} here{hint}; and {error}") from error


def _fetch(repo_id: str, offline: bool, progress: Progress, notices: Notices | None) -> Path:
    return fetch(
        repo_id,
        offline=offline,
        stamps=hybrid_home() / "verified",
        progress=progress,
        notices=notices,
        accept=_check_all_but_weights,
    )


def _check_all_but_weights(folder: Path) -> None:
    """Raise what loading the model would raise for its config and its tokenizer."""
    config = read_config(folder)
    Tokenizer.from_folder(folder, vocab_size=config.vocab_size, bos_id=config.bos_id)


def expected_active_fraction(model: str | Path) -> float | None:
    """Return the expected share of active neurons per token, or None if it is not known.

    It comes from the model's authors, or from the recipe of a synthetic model. Neither downloads
    nor makes a model.
    """
    text = os.fspath(model)
    if isinstance(model, str):
        if _is_synthetic(text):
            is_known = text.casefold() in map(str.casefold, synthetic.synthetic_names())
            return ACTIVE_FRACTION if is_known else None
        if entry := _BY_NAME.get(text.casefold()):
            return entry.expected_active_fraction
    return ACTIVE_FRACTION if synthetic.is_synthetic(_expand_user(text)) else None


def _is_synthetic(name: str) -> bool:
    return name.casefold().startswith(synthetic.PREFIX)


def _bundled(entry: CatalogEntry) -> Path:
    folder = Path(__file__).parents[1] / "models" / entry.name
    if not folder.is_dir():
        raise ModelNotFound(
            f"the bundled model {entry.name!r} is missing from this installation: expected "
            f"{folder}; install hybrid again"
        )
    return folder


def _expand_user(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no home, as in a container under an unknown user id
        raise InvalidOption(
            f"{path!r} needs a home directory and there is none; write the path without ~, and "
            "set HYBRID_HOME to a folder that hybrid may write to"
        ) from error


def _fetch_gguf(named: re.Match[str], offline: bool, progress: Progress) -> Path:
    """Fetch owner/name:WISH."""
    return fetch_gguf(
        named[1], named[2], offline=offline, stamps=hybrid_home() / "verified", progress=progress
    )


def _is_repo_id(text: str) -> bool:
    return _REPO_ID.fullmatch(text) is not None and "--" not in text and ".." not in text


def _looks_like_path(text: str) -> bool:
    """Return whether a string can only be meant as a folder. Raises OSError."""
    if text.startswith((".", "~", "/")) or re.match("[A-Za-z]:", text) or "\\" in text:
        return True
    first, slash, rest = text.partition("/")
    return bool(slash) and (not rest or "/" in rest or Path(first).is_dir())


def _gguf_of_folder(folder: Path) -> Path | None:
    """Return the one GGUF model of a folder that is no model in Hugging Face's layout.

    Of files that belong together it is the first. Raises OSError, and ModelNotFound if the folder
    holds several models.
    """
    if (folder / CONFIG).exists() and any((folder / name).exists() for name in WEIGHTS):
        return None
    firsts = sorted(path for path in folder.glob("*.gguf") if path == first_part(path))
    files = [path for path in firsts if foreign.is_gguf(path)]
    if len(files) > 1:
        names = short_list([path.name for path in files], 20)
        raise ModelNotFound(
            f"{str(folder)!r} holds {len(files)} GGUF models: {names}; name the file that you want"
        )
    return files[0] if files else None


def _no_such_folder(text: str, path: Path) -> str:
    message = f"no such folder: {text!r}{_similar_folder(path)}"
    if _is_repo_id(text):
        message += f". For the Hugging Face repository of that name, write {_HUB_SCHEME}{text}"
    return message


def _similar_folder(path: Path) -> str:
    """Return a hint at folders with a name like the first missing part of a path, or ""."""
    try:
        while not path.parent.is_dir() and path.parent != path:
            path = path.parent
        with os.scandir(path.parent) as entries:
            names = [
                entry.name for entry in itertools.islice(entries, _MAX_LISTED) if entry.is_dir()
            ]
    except (OSError, ValueError):
        return ""
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(path.name.casefold(), folded, n=3)
    if not close:
        return ""
    return f" (did you mean {' or '.join(repr(str(path.with_name(folded[c]))) for c in close)}?)"


def _not_found(text: str, path: Path) -> str:
    close = difflib.get_close_matches(text.casefold(), _BY_NAME, n=1)
    hint = f" Did you mean {_BY_NAME[close[0]].name!r}?" if close else ""
    return (
        f"no model {text!r}: it is neither a name of the catalog, nor an existing folder"
        f"{_similar_folder(path)}, nor a Hugging Face repository owner/name.{hint} The catalog: "
        + ", ".join([entry.name for entry in _CATALOG] + synthetic.synthetic_names())
    )
