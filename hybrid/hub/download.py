"""Downloads a repository of the Hugging Face Hub into huggingface_hub's cache and verifies it.

This file knows when a cached copy is complete, and how a file gets into the cache. `model_files`
knows which files a model needs, and `transfer` reads from the server. The cache has
huggingface_hub's layout, so that other programs find the model there:

    models--owner--name/
    ├── blobs/<etag>                 the bytes; <etag>.incomplete during the download
    ├── snapshots/<commit>/<file>    a link to the blob
    ├── .no_exist/<commit>/<file>    empty: the repository has no such file
    └── refs/main                    the commit
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hybrid.checkpoint import foreign
from hybrid.errors import (
    DownloadFailed,
    InvalidCheckpoint,
    InvalidOption,
    ModelNotFound,
    UnsupportedModel,
)
from hybrid.files import write_atomically
from hybrid.hub import transfer, watch
from hybrid.hub.cache import PartialFile, length_of_partial, make_folder
from hybrid.hub.checksum import check, check_link, is_checksum, stamp, verify
from hybrid.hub.download_progress import CallerRaised, Tally
from hybrid.hub.errors import advice, hub_errors
from hybrid.hub.gguf_files import choose, gguf_models
from hybrid.hub.model_files import (
    CONFIG,
    INDEX,
    OPTIONAL,
    TOKENIZERS,
    WEIGHTS,
    select,
    shards_of,
    size_limit,
)
from hybrid.notices import Notices, short_list
from hybrid.progress import Progress, ignore_progress
from hybrid.text.template_files import NAMED

_HOLDER_PATIENCE_S = 60.0  # until the holder of a lock must have received something
_LOCK_S = 1.0  # between two looks at how far the holder of a lock is
_LISTING_S = 10.0  # for a list of files that is good to have, but not needed


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    repo_id: str
    name: str
    url: str
    etag: str
    size: int
    blob: Path
    link: Path

    @property
    def partial(self) -> Path:
        return self.blob.with_name(f"{self.etag}.incomplete")

    def present_bytes(self) -> int:
        """Return how many of its bytes are on this machine."""
        if self.blob.exists() or self.link.is_file():
            return self.size
        n_bytes = length_of_partial(self.partial)
        return n_bytes if n_bytes <= self.size else 0  # one that is too long is discarded


class _Place(NamedTuple):
    """Where a repository's files go."""

    repo_id: str
    cache: Path
    stamps: Path  # the folder that records which files were checked

    @property
    def storage(self) -> Path:
        return self.cache / f"models--{self.repo_id.replace('/', '--')}"

    @property
    def locks(self) -> Path:
        return self.cache / ".locks" / self.storage.name


def fetch(
    repo_id: str,
    *,
    offline: bool,
    stamps: Path,
    progress: Progress = ignore_progress,
    notices: Notices | None = None,
    accept: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Return the folder of a repository's model files. Downloads what the cache lacks.

    Each file is checked against its checksum once; the folder `stamps` records which files were. A
    complete copy is used as it is, without looking for a newer one on the network. If another
    program made the copy, it may lack files that decide text, and only the Hub knows whether the
    repository has them: they are fetched once, or `notices` says that they may be missing.
    `progress` receives the bytes of all files together, including those that were here before. Its
    exceptions pass through. `accept` is called when all but the weights are in the folder, and
    raises if the model cannot be used: then gigabytes are not fetched for nothing.

    Raises ModelNotFound, DownloadFailed, InvalidCheckpoint or UnsupportedModel.
    """
    with hub_errors(repo_id, "the settings of huggingface_hub"):
        from huggingface_hub import constants, try_to_load_from_cache
    place = _Place(repo_id, Path(constants.HF_HUB_CACHE), stamps)
    is_offline = offline or bool(constants.HF_HUB_OFFLINE)
    with _storing(place):
        with hub_errors(repo_id, "the cached copy"):
            config = try_to_load_from_cache(repo_id, CONFIG)
        missing = [f"{CONFIG} and all other files"]
        if isinstance(config, str):
            snapshot = Path(config).parent
            missing = _missing(snapshot, place)
            if not missing:
                notices = Notices() if notices is None else notices
                _complete(snapshot, place, is_offline=is_offline, notices=notices)
                return snapshot
        if is_offline:
            raise ModelNotFound(
                f"{repo_id} is not complete on this machine (missing in {place.cache}: "
                f"{_some(missing)}), and offline=True or HF_HUB_OFFLINE forbids a download. "
                + advice(repo_id)
            )
        return _download(place, progress, accept)


@contextlib.contextmanager
def _storing(place: _Place) -> Iterator[None]:
    """Raise DownloadFailed if the cache cannot be written. The caller's exceptions pass through."""
    try:
        yield
    except CallerRaised as raised:
        raise raised.error from None
    except OSError as error:
        raise DownloadFailed(
            f"cannot store {place.repo_id} in {place.cache}: {error}. Make room or grant access "
            "there, or set HF_HOME to another folder."
        ) from error


def fetch_gguf(
    repo_id: str, wish: str, *, offline: bool, stamps: Path, progress: Progress = ignore_progress
) -> Path:
    """Return a GGUF model of a repository, by its first file. Downloads what the cache lacks.

    `wish` is the name of a file, or a type such as Q4_0. Files are checked as `fetch` does. Raises
    the errors of `fetch`, and InvalidOption if there is no such model.
    """
    with hub_errors(repo_id, "the settings of huggingface_hub"):
        from huggingface_hub import constants
    place = _Place(repo_id, Path(constants.HF_HUB_CACHE), stamps)
    with _storing(place):
        for snapshot in _snapshots(place):
            with contextlib.suppress(InvalidOption):
                names = choose(repo_id, _present(snapshot), wish)
                for name in names:
                    check_link(snapshot / name, place.stamps, place.cache)
                return snapshot / names[0]
        if offline or constants.HF_HUB_OFFLINE:
            raise ModelNotFound(
                f"{repo_id}: the GGUF model {wish!r:.80} is not on this machine, and offline=True "
                "or HF_HUB_OFFLINE forbids a download. " + advice(repo_id)
            )
        commit, listed = _list_files(repo_id, None, transfer.ANSWER_S)
        snapshot = place.storage / "snapshots" / commit
        names = choose(repo_id, listed, wish)
        is_first = not _snapshots(place)
        _fetch_files([_locate(place, name, snapshot) for name in names], place, progress)
        if is_first:  # a ref to a part of a repository would hide an older complete copy
            _set_current(place, commit)
        return snapshot / names[0]


def _snapshots(place: _Place) -> list[Path]:
    """Return the cached copies of a repository, the newest first."""
    folders = [path for path in (place.storage / "snapshots").glob("*") if path.is_dir()]
    return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)


def _set_current(place: _Place, commit: str) -> None:
    ref = place.storage / "refs" / "main"
    make_folder(ref.parent, place.cache)
    write_atomically(ref, commit.encode())


def _missing(snapshot: Path, place: _Place) -> list[str]:
    """Return the files that a cached copy lacks, after checking those that it has."""
    present = _present(snapshot)
    files, missing = select(present)
    if not missing:
        for name in files:
            check_link(snapshot / name, place.stamps, place.cache)
        shards = shards_of(snapshot / files[-1])
        missing = [shard for shard in shards if shard not in present]
        for shard in set(shards).difference(missing):
            check_link(snapshot / shard, place.stamps, place.cache)
    return missing


def _present(snapshot: Path) -> set[str]:
    templates = {f"{NAMED}/{path.name}" for path in (snapshot / NAMED).glob("*.jinja")}
    return templates | {path.name for path in snapshot.iterdir() if path.is_file()}


def _complete(snapshot: Path, place: _Place, *, is_offline: bool, notices: Notices) -> None:
    """Fetch what decides text and what a copy of another program lacks."""
    present = _present(snapshot)
    if ".gitattributes" in present:
        return  # no program picks this file: it is a copy of the whole repository
    unknown = set(OPTIONAL).union([TOKENIZERS[0]]).difference(present)
    absent = place.storage / ".no_exist" / snapshot.name
    unknown = {name for name in unknown if not (absent / name).is_file()}
    if not unknown:
        return
    reason = "offline"
    if not is_offline:
        try:
            _, listed = _list_files(place.repo_id, snapshot.name, _LISTING_S)
            files = []
            for name in sorted(unknown & listed):
                try:
                    files.append(_locate(place, name, snapshot))
                except InvalidCheckpoint as error:  # too long; the copy works without it
                    notices.add(
                        f"{error}: it is not used, and the text may differ from the model's own"
                    )
            if files:
                _fetch_files(files, place, ignore_progress)
            _record_absent(unknown - listed, absent, place.cache)
            return
        except (DownloadFailed, ModelNotFound, OSError) as error:
            reason = str(error)[:120] + "…"
    notices.add(
        f"{place.repo_id}: another program made the copy in {place.cache}; whether the repository "
        f"also has {', '.join(sorted(unknown))} is not known ({reason}). If it has, the text may "
        "differ from the model's own"
    )


def _record_absent(names: Collection[str], absent: Path, cache: Path) -> None:
    """Record which files the repository does not have, as huggingface_hub does."""
    # In a read-only cache, or through a link out of it: the Hub is contacted again next time.
    with contextlib.suppress(OSError, DownloadFailed):
        make_folder(absent, cache)
        for name in names:
            with contextlib.suppress(FileExistsError):
                (absent / name).open("xb").close()


def _list_files(repo_id: str, revision: str | None, total_s: float) -> tuple[str, set[str]]:
    """Return a repository's commit and the names of its files, from the Hub."""
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/models/{repo_id}"
    with hub_errors(repo_id, "its list of files"):
        info = transfer.read_json(url + (f"/revision/{revision}" if revision else ""), total_s)
    try:
        commit, listed = info["sha"], {str(file["rfilename"]) for file in info["siblings"]}
        if re.fullmatch(r"[0-9a-f]{40}", commit):
            return commit, listed
    except (LookupError, TypeError):
        pass  # not of this shape: reported below
    raise DownloadFailed(
        f"{constants.ENDPOINT} does not answer like a Hugging Face Hub: expected a list of the "
        f"files of {repo_id} and a commit of 40 hex digits. Check HF_ENDPOINT."
    )


def _download(place: _Place, progress: Progress, accept: Callable[[Path], None]) -> Path:
    commit, listed = _list_files(place.repo_id, None, transfer.ANSWER_S)
    snapshot = place.storage / "snapshots" / commit
    files: list[_RemoteFile] = []
    shards: list[str] = []
    names, missing = select(listed)
    if not missing:
        files = [_locate(place, name, snapshot) for name in names]
        if names[-1].endswith(INDEX):  # first, because it names the files that follow
            _fetch_files(files[-1:], place, ignore_progress)
            shards = shards_of(snapshot / names[-1])
            missing = [shard for shard in shards if shard not in listed]
    if missing:
        is_foreign = CONFIG not in listed or listed.isdisjoint(WEIGHTS)
        if is_foreign and (kind := foreign.folder_kind(snapshot, listed)):
            if models := gguf_models(listed):
                kind = f"it holds GGUF models: name one as {place.repo_id}:TYPE or :FILE, of "
                kind += short_list(list(models), 10)
            raise UnsupportedModel(f"{place.repo_id}: lacks {_some(missing)}: {kind}")
        raise InvalidCheckpoint(
            f"{place.repo_id} lacks {_some(missing)}; it holds {len(listed)} files: "
            f"{_some(sorted(listed))}"
        )
    files += [_locate(place, shard, snapshot) for shard in shards]
    _fetch_files(files, place, progress, accept)
    absent = place.storage / ".no_exist" / commit
    _record_absent({*OPTIONAL, TOKENIZERS[0]} - listed, absent, place.cache)

    # Last, because a ref to an unfinished snapshot would hide an older complete one.
    _set_current(place, commit)
    return snapshot


def _some(names: list[str]) -> str:
    return ", ".join(f"{name:.100}" for name in names[:20]) + (", …" if len(names) > 20 else "")


def _fetch_files(
    files: list[_RemoteFile],
    place: _Place,
    progress: Progress,
    accept: Callable[[Path], None] = lambda folder: None,
) -> None:
    blobs, snapshot = files[0].blob.parent, files[0].link.parent
    for folder in (*{file.link.parent for file in files}, blobs, place.locks):
        make_folder(folder, place.cache)
    needed = sum(file.size - file.present_bytes() for file in files)
    free = shutil.disk_usage(blobs).free
    if needed > free:
        raise DownloadFailed(
            f"{place.repo_id} needs {needed / 1e9:.2f} GB more on the disk of {blobs}, which "
            f"has {free / 1e9:.2f} GB free. Make room, or set HF_HOME to a folder on another disk."
        )
    sizes = {file.name: (file.present_bytes(), file.size) for file in files}
    tally = Tally(f"downloading {place.repo_id.rpartition('/')[2]}", sizes, progress)
    is_accepted = False
    for file in files:
        if size_limit(file.name) is None and not is_accepted:  # the first file of weights
            accept(snapshot)
            is_accepted = True
        _fetch_file(file, place, tally)


def _locate(place: _Place, name: str, snapshot: Path) -> _RemoteFile:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with hub_errors(place.repo_id, name):
        url = hf_hub_url(place.repo_id, name, revision=snapshot.name)
        metadata = watch.call(lambda: get_hf_file_metadata(url))
    etag, size = str(metadata.etag), metadata.size
    if not is_checksum(etag):
        raise DownloadFailed(
            f"{url} cannot be verified: expected a SHA-1 or SHA-256 as its etag, found {etag!r}. "
            "Check HF_ENDPOINT."
        )
    if size is None or size < 0:
        raise DownloadFailed(
            f"{url} has no known size: expected Content-Length or X-Linked-Size. Check HF_ENDPOINT."
        )
    if (limit := size_limit(name)) is not None and size > limit:
        raise InvalidCheckpoint(
            f"{name} of {place.repo_id} has {size:,} bytes, expected at most {limit:,}"
        )
    blob = place.storage / "blobs" / etag
    return _RemoteFile(place.repo_id, name, url, etag, size, blob, snapshot / name)


def _fetch_file(file: _RemoteFile, place: _Place, tally: Tally) -> None:
    with _lock(file, place, tally):  # another process or thread may want the same file
        if file.blob.exists():
            check(file.blob, file.name, place.stamps, place.cache)
        elif not file.link.is_file():  # a file without a blob: see `_link`
            _stream(file, tally)
            verify(file.partial, file.etag, file.name, place.cache)
            file.partial.replace(file.blob)
            stamp(file.blob, place.stamps)
        _link(file)
    tally.file_is_whole(file.name)


@contextlib.contextmanager
def _lock(file: _RemoteFile, place: _Place, tally: Tally) -> Iterator[None]:
    """Hold a file's lock. Waits as long as its holder downloads."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path = place.locks / f"{file.etag}.lock"
    if path.is_symlink():
        path.unlink()  # the lock would empty what it leads to
    with contextlib.ExitStack() as held:
        state, since = _partial_state(file), time.monotonic()
        while True:
            try:
                held.enter_context(WeakFileLock(path, timeout=_LOCK_S))
                break
            except TimeoutError as error:  # filelock's Timeout is one
                if state != (state := _partial_state(file)):
                    since = time.monotonic()
                    tally.file_has(file.name, file.present_bytes())
                elif time.monotonic() - since > _HOLDER_PATIENCE_S:
                    raise DownloadFailed(
                        f"another program holds {path}, and {file.name} does not grow. End that "
                        "program, or remove the lock if there is none, and run the same command "
                        "again."
                    ) from error
        yield


def _partial_state(file: _RemoteFile) -> list[tuple[str, int, int]]:
    """Return what changes while a program downloads a file. huggingface_hub's names vary."""
    found = []
    for path in sorted(file.blob.parent.glob(f"{file.etag}*.incomplete")):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            found.append((path.name, status.st_size, status.st_mtime_ns))
    return found


def _stream(file: _RemoteFile, tally: Tally) -> None:
    """Append the missing bytes to the partial file."""
    with (
        PartialFile(
            file.partial, file.size, lambda n_bytes: tally.file_has(file.name, n_bytes)
        ) as stream,
        hub_errors(file.repo_id, file.name),
    ):
        transfer.append(file.url, stream, file.size)


def _link(file: _RemoteFile) -> None:
    """Link the blob into the snapshot. Moves the blob there if the disk has no links."""
    if file.link.is_file():
        return
    file.link.unlink(missing_ok=True)  # a dangling link to a blob that was removed
    try:
        file.link.symlink_to(os.path.relpath(file.blob, file.link.parent))
    except OSError:
        file.blob.replace(file.link)
