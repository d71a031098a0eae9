"""Downloads a repository of the Hugging Face Hub into huggingface_hub's cache and verifies it.

This file knows which files a model needs, when a cached copy is complete, and how a file gets into
the cache. huggingface_hub speaks to the server (endpoint, token, proxies, retries), but it writes
into a file object of ours. Its own download would start at zero after an interruption, and would
draw its own bar instead of reporting to the caller. The cache has huggingface_hub's layout, so that
other programs find the model there:

    models--owner--name/
    ├── blobs/<etag>                 the bytes; <etag>.incomplete during the download
    ├── snapshots/<commit>/<file>    a link to the blob
    └── refs/main                    the commit
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import DownloadFailed, InvalidCheckpoint, ModelNotFound
from hybrid.files import write_atomically
from hybrid.hub.checksum import check, check_link, is_checksum
from hybrid.hub.download_progress import CallerRaised, SilentBar, Tally, ToldFile
from hybrid.hub.errors import advice, hub_errors
from hybrid.progress import Progress, ignore_progress

REQUIRED = ("config.json", "tokenizer.json")
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
WEIGHTS = (  # the first that exists is used; an index names its shards
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX = ".index.json"


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    repo_id: str
    name: str
    url: str
    etag: str
    size: int | None  # None: the server does not say
    blob: Path
    link: Path

    @property
    def partial(self) -> Path:
        return self.blob.with_name(f"{self.etag}.incomplete")

    def present_bytes(self) -> int:
        """Return how many of its bytes are on this machine; 0 if its size is not known."""
        size = self.size or 0
        if self.blob.exists() or self.link.is_file():
            return size
        with contextlib.suppress(FileNotFoundError):
            n_bytes = self.partial.stat().st_size
            return n_bytes if n_bytes <= size else 0  # a partial file that is too long is discarded
        return 0


def fetch(
    repo_id: str, *, offline: bool, stamps: Path, progress: Progress = ignore_progress
) -> Path:
    """Return the folder of a repository's model files. Downloads what the cache lacks.

    Each file is checked against its checksum once; the folder `stamps` records which files were. A
    complete copy is used as it is, without looking for a newer one on the network. `progress`
    receives the bytes of all files together, including those that were here before. Its exceptions
    pass through.

    Raises ModelNotFound, DownloadFailed or InvalidCheckpoint.
    """
    with hub_errors(repo_id, "the settings of huggingface_hub"):
        from huggingface_hub import constants, try_to_load_from_cache
    cache = Path(constants.HF_HUB_CACHE)
    try:
        with hub_errors(repo_id, "the cached copy"):
            config = try_to_load_from_cache(repo_id, REQUIRED[0])
        missing = [f"{REQUIRED[0]} and all other files"]
        if isinstance(config, str):
            folder = Path(config).parent
            missing = _missing(folder, stamps)
            if not missing:
                return folder
        if offline or constants.HF_HUB_OFFLINE:
            raise ModelNotFound(
                f"{repo_id} is not complete on this machine (missing in {cache}: "
                f"{', '.join(missing)}), and offline=True or HF_HUB_OFFLINE forbids a download. "
                + advice(repo_id)
            )
        return _download(repo_id, cache, stamps, progress)
    except CallerRaised as raised:
        raise raised.error from None
    except OSError as error:
        raise DownloadFailed(
            f"cannot store {repo_id} in {cache}: {error}. Make room or grant access there, or set "
            "HF_HOME to another folder."
        ) from error


def _missing(folder: Path, stamps: Path) -> list[str]:
    """Return the files that a cached copy lacks, after checking those that it has."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    files, missing = _select(present)
    if not missing:
        for name in files:
            check_link(folder / name, stamps)
        shards = _shards(folder / files[-1])
        missing = [shard for shard in shards if shard not in present]
        for shard in set(shards).difference(missing):
            check_link(folder / shard, stamps)
    return missing


def _select(available: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the files to use, with the weights or their index last, and the missing ones."""
    weights = [name for name in WEIGHTS if name in available][:1]
    missing = [name for name in REQUIRED if name not in available]
    if not weights:
        missing.append(f"weights ({' or '.join(WEIGHTS)})")
    return [name for name in REQUIRED + OPTIONAL if name in available] + weights, missing


def _shards(weights: Path) -> list[str]:
    """Return the files that an index of weights names; none if `weights` is not an index."""
    if not weights.name.endswith(_INDEX):
        return []
    try:
        shards = sorted(set(json.loads(weights.read_bytes())["weight_map"].values()))
        if shards and all(re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name) for name in shards):
            return shards
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # not JSON, or not of this shape: reported below
    raise InvalidCheckpoint(
        f"{weights} is broken: expected a JSON object whose weight_map gives each tensor the name "
        "of a .safetensors or .bin file beside it"
    )


def _download(repo_id: str, cache: Path, stamps: Path, progress: Progress) -> Path:
    from huggingface_hub import HfApi, constants

    with hub_errors(repo_id, "its list of files"):
        info = HfApi().model_info(repo_id, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit = str(info.sha)
        listed = {sibling.rfilename for sibling in info.siblings or ()}
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise DownloadFailed(
            f"{constants.ENDPOINT} does not answer like a Hugging Face Hub: {repo_id} has the "
            f"commit {commit!r}; expected 40 hex digits. Check HF_ENDPOINT."
        )
    storage = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit

    files: list[_RemoteFile] = []
    shards: list[str] = []
    names, missing = _select(listed)
    if not missing:
        files = [_locate(repo_id, name, snapshot) for name in names]
        if names[-1].endswith(_INDEX):  # first, because it names the files that follow
            _fetch_files(files[-1:], stamps, ignore_progress)
            shards = _shards(snapshot / names[-1])
            missing = [shard for shard in shards if shard not in listed]
    if missing:
        raise InvalidCheckpoint(
            f"{repo_id} lacks {', '.join(missing)}; it holds {len(listed)} files: "
            f"{', '.join(sorted(listed)[:20])}"
        )
    files += [_locate(repo_id, shard, snapshot) for shard in shards]
    _fetch_files(files, stamps, progress)

    # Last, because a ref to an unfinished snapshot would hide an older complete one.
    ref = storage / "refs" / "main"
    ref.parent.mkdir(exist_ok=True)
    write_atomically(ref, commit.encode())
    return snapshot


def _fetch_files(files: list[_RemoteFile], stamps: Path, progress: Progress) -> None:
    blobs, snapshot = files[0].blob.parent, files[0].link.parent
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True, exist_ok=True)
    needed = sum((file.size or 0) - file.present_bytes() for file in files)
    free = shutil.disk_usage(blobs).free
    if needed > free:
        raise DownloadFailed(
            f"{files[0].repo_id} needs {needed / 1e9:.2f} GB more on the disk of {blobs}, which "
            f"has {free / 1e9:.2f} GB free. Make room, or set HF_HOME to a folder on another disk."
        )
    sizes = {file.name: (file.present_bytes(), file.size or 0) for file in files}
    tally = Tally(f"downloading {files[0].repo_id.rpartition('/')[2]}", sizes, progress)
    for file in files:
        _fetch_file(file, stamps, tally)


def _locate(repo_id: str, name: str, snapshot: Path) -> _RemoteFile:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with hub_errors(repo_id, name):
        url = hf_hub_url(repo_id, name, revision=snapshot.name)
        metadata = get_hf_file_metadata(url)
        etag = str(metadata.etag)
    if not is_checksum(etag):
        raise DownloadFailed(
            f"{url} cannot be verified: expected a SHA-1 or SHA-256 as its etag, found {etag!r}. "
            "Check HF_ENDPOINT."
        )
    blob = snapshot.parent.parent / "blobs" / etag
    return _RemoteFile(repo_id, name, url, etag, metadata.size, blob, snapshot / name)


def _fetch_file(file: _RemoteFile, stamps: Path, tally: Tally) -> None:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    storage = file.blob.parent.parent
    lock = storage.parent / ".locks" / storage.name / f"{file.etag}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # another process or thread may want the same file
        if file.blob.exists():
            check(file.blob, file.etag, file.name, stamps)
        elif not file.link.is_file():  # a file without a blob: see `_link`
            _stream(file, tally)
            check(file.partial, file.etag, file.name, stamps)
            file.partial.replace(file.blob)
        _link(file)
    tally.file_is_whole(file.name)


def _stream(file: _RemoteFile, tally: Tally) -> None:
    """Append the missing bytes to the partial file."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    options: dict[str, Any] = {}
    # Versions 0.30 to 2.4 have this parameter; later ones may drop it.
    if "_tqdm_bar" in inspect.signature(http_get).parameters:
        options["_tqdm_bar"] = SilentBar()
    # A compressed transfer would have neither a known length nor ranges.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    with ToldFile(
        file.partial, file.size, lambda n_bytes: tally.file_has(file.name, n_bytes)
    ) as stream:
        if file.size is None or stream.tell() > file.size:
            stream.seek(0)  # ToldFile reports its position as the length
            stream.truncate()
        with hub_errors(file.repo_id, file.name):
            http_get(
                file.url,
                stream,
                resume_size=os.fstat(stream.fileno()).st_size,
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.name,
                **options,
            )


def _link(file: _RemoteFile) -> None:
    """Link the blob into the snapshot. Moves the blob there if the disk has no links."""
    if file.link.is_file():
        return
    file.link.unlink(missing_ok=True)  # a dangling link to a blob that was removed
    try:
        file.link.symlink_to(os.path.relpath(file.blob, file.link.parent))
    except OSError:
        file.blob.replace(file.link)
