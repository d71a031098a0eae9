"""Verifies files in huggingface_hub's cache against their checksums.

In that cache each file is named by its etag, which is a checksum: the SHA-256 of a large file, or
git's SHA-1 of a small one. Hashing gigabytes takes seconds. So a small file named after the etag,
the stamp, records which state of the file matched. A file's time of modification alone would not
do: `cp -p` and package stores set it to what it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

from hybrid.errors import DownloadFailed
from hybrid.files import open_file, read_bytes
from hybrid.hub.cache import discard

_MAX_STAMP_BYTES = 1 << 10  # it holds four numbers


def is_checksum(etag: str) -> bool:
    """Return whether an etag is one of the two checksums, and so is safe as a file name."""
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag) is not None


def check_link(link: Path, stamps: Path, cache: Path) -> None:
    """Check a cached file that another program may have fetched."""
    if not link.is_symlink():
        return  # its checksum is not known here; our own downloads were checked on arrival
    blob = link.parent / link.readlink()
    if is_checksum(blob.name):
        check(blob, link.name, stamps, cache)


def check(blob: Path, name: str, stamps: Path, cache: Path) -> None:
    """Compare a blob's bytes with its checksum, unless a stamp says that they matched.

    Removes the blob from the cache and raises DownloadFailed if they differ.
    """
    state = _state(blob)
    with contextlib.suppress(OSError):
        if read_bytes(stamps / blob.name, _MAX_STAMP_BYTES) == state:
            return
    verify(blob, blob.name, name, cache)
    _write_stamp(blob.name, state, stamps)


def stamp(blob: Path, stamps: Path) -> None:
    """Record that a blob's bytes matched its checksum just now."""
    _write_stamp(blob.name, _state(blob), stamps)


def verify(path: Path, etag: str, name: str, cache: Path) -> None:
    """Compare a file's bytes with a checksum.

    Removes the file from the cache and raises DownloadFailed if they differ.
    """
    actual = digest(path, etag)
    if actual != etag:
        with contextlib.suppress(OSError):  # a read-only cache
            discard(path, cache)
        todo = f"Remove {path} and run" if path.exists() else f"{path} was removed: run"
        raise DownloadFailed(
            f"{name} is corrupt: expected the checksum {etag}, found {actual}. {todo} the same "
            "command again to download it again."
        )


def _state(path: Path) -> bytes:
    """Return numbers of which at least one changes whenever the file does."""
    status = path.stat()
    numbers = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return " ".join(map(str, numbers)).encode()


def _write_stamp(etag: str, state: bytes, stamps: Path) -> None:
    with contextlib.suppress(OSError):  # with a read-only HYBRID_HOME it is hashed again next time
        stamps.mkdir(parents=True, exist_ok=True)
        (stamps / etag).unlink(missing_ok=True)  # it may be a link
        with (stamps / etag).open("xb") as file:
            file.write(state)


def known_etag(path: Path) -> str | None:
    """Return the checksum that huggingface_hub recorded for a file, or None if there is none.

    The record is in its cache, or in the folder that `hf download --local-dir` filled.
    """
    if path.is_symlink():
        etag = path.readlink().name
        return etag if is_checksum(etag) else None
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        lines = read_bytes(note, 1 << 16).decode("utf-8").split("\n")  # commit, etag, time
    except (OSError, UnicodeDecodeError):
        return None
    return lines[1] if len(lines) > 1 and is_checksum(lines[1]) else None


def digest(path: Path, etag: str) -> str:
    """Compute the file's checksum, of the same kind as `etag`."""
    hasher = hashlib.sha256()
    if len(etag) == 40:
        header = b"blob %d\0" % path.stat().st_size
        hasher = hashlib.sha1(header, usedforsecurity=False)
    with open_file(path) as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()
