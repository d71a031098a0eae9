"""Is a file in huggingface_hub's cache what the hub meant to send?

In that cache an etag names the bytes, and it is their checksum: the SHA-256 of a large file, git's
SHA-1 of a small one. Hashing gigabytes takes seconds, so an empty file named after the etag, the
stamp, remembers that the bytes matched.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

from hybrid.errors import DownloadFailed


def is_checksum(etag: str) -> bool:
    """Whether an etag is one of the two checksums (and safe as a file name)."""
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag) is not None


def check_link(link: Path, stamps: Path) -> None:
    """Check a cached file that another program may have fetched."""
    if not link.is_symlink():
        return  # nothing here tells its checksum; a file of ours was checked when it came
    blob = link.parent / link.readlink()
    if is_checksum(blob.name):
        check(blob, blob.name, link.name, stamps)


def check(path: Path, etag: str, name: str, stamps: Path) -> None:
    """Compare the bytes with their checksum, unless a stamp younger than the file says so."""
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
            "again to fetch it anew."
        )
    with contextlib.suppress(OSError):  # a read-only HYBRID_HOME only costs hashing it again
        stamps.mkdir(parents=True, exist_ok=True)
        stamp.touch()


def known_etag(path: Path) -> str | None:
    """The checksum that huggingface_hub noted for a file, in its cache or in the folder that
    `hf download --local-dir` filled; None where nothing tells it.
    """
    if path.is_symlink():
        etag = path.readlink().name
        return etag if is_checksum(etag) else None
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        lines = note.read_text(encoding="utf-8").split("\n")  # commit, etag, time
    except (OSError, UnicodeDecodeError):
        return None
    return lines[1] if len(lines) > 1 and is_checksum(lines[1]) else None


def digest(path: Path, etag: str) -> str:
    """The file's own checksum, of the kind that `etag` is."""
    hasher = hashlib.sha256()
    if len(etag) == 40:
        header = b"blob %d\0" % path.stat().st_size
        hasher = hashlib.sha1(header, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()
