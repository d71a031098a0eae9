"""Opens files that a user named or that were found: regular files only, and of a bounded size.

A pipe would wait forever for its writer, and a device such as /dev/zero never ends. A path may be
exchanged between a check and the opening, so the open file is checked and not its path.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from predictors.schema import field_of, parse_json

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, or a link to one. Never waits. Raises OSError."""
    # Without O_NONBLOCK, opening a pipe waits for a writer. Regular files ignore it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if kind != stat.S_IFREG:
            what = _KINDS.get(kind, "something else")
            raise OSError(errno.EINVAL, f"is not a regular file but {what}", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


_PIECE_BYTES = 1 << 16


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a whole file. Raises OSError, also if it has more than `max_bytes`."""
    with open_file(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes <= max_bytes:
            # The size may be wrong, such as 0 in /proc. A read sets memory for all that it may get
            # aside, so it asks for no more than one piece beyond the size.
            content = file.read(n_bytes)
            while len(content) <= max_bytes and (more := file.read(_PIECE_BYTES)):
                content += more
            n_bytes = len(content)
    if n_bytes > max_bytes:
        what = f"has {n_bytes:,} bytes, expected at most {max_bytes:,}"
        raise OSError(errno.EFBIG, what, str(path))
    return content


def read_safetensors(path: Path, max_bytes: int) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Read a safetensors file's metadata and arrays.

    Raises OSError, and ValueError if the file is broken or has a type that our files do not use.
    """
    content = read_bytes(path, max_bytes)
    try:
        entries = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of type {entry['dtype']}")
        array = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = field_of(header, "__metadata__")
    return metadata if isinstance(metadata, dict) else {}, arrays
