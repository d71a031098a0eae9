"""Verifies files in huggingface_hub's cache against their checksums.

In that cache each file is named by its etag, which is a checksum: the SHA-256 of a large file, or
git's SHA-1 of a small one. Hashing gigabytes takes seconds. So an empty file named after the etag,
the stamp, records that the bytes matched.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

from hybrid.errors import DownloadFailed
from hybrid.files import open_file, read_bytes


def is_checksum(etag: str) -> bool:
    """Return whether an etag is one of the two checksums, and so is safe as a file name."""
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag) is not None


def check_link(link: Path, stamps: Path) -> None:
    """Check a cached file that another program may have fetched."""
    if not link.is_symlink():
        return  # its checksum is not known here; our own downloads were checked on arrival
    blob = link.parent / link.readlink()
    if is_checksum(blob.name):
        check(blob, blob.name, link.name, stamps)


def check(path: Path, etag: str, name: str, stamps: Path) -> None:
    """Compare the bytes with their checksum, unless a stamp younger than the file exists.

    Removes the file and raises DownloadFailed if they differ.
    """
    stamp = stamps / etag
    with contextlib.suppress(OSError):
        if stamp.stat().st_mtime_ns >= path.stat().st_mtime_ns:
            return
    actual = digest(path, etag)
    if actual != etag:
        with contextlib.suppress(OSError):  # a read-only cache
            path.resolve().unlink()  # a blob may be a link into a store of shared blobs
        todo = f"Remove {path} and run" if path.exists() else f"{path} was removed: run"
        raise DownloadFailed(
            f"{name} is corrupt: expected the checksum {etag}, found {actual}. {todo} the same "
            "command again to download it again."
        )
    with contextlib.suppress(OSError):  # with a read-only HYBRID_HOME it is hashed again next time
        stamps.mkdir(parents=True, exist_ok=True)
        stamp.touch()


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
