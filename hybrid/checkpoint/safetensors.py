"""One `.safetensors` file: reads its header and maps its tensors.

The safetensors library validates the file (header size, JSON, holes, overlaps, sizes, overflows).
Its NumPy reader does not know bfloat16 and copies, so the mapping is done here. Versions 0.4.3 to
0.8 of the library accept the following, which is checked here:

- a header of up to 100 MB
- a name that occurs twice; the library uses the last one
- an entry that is an array instead of an object
- types that we do not compute with
- shapes without elements
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hybrid.checkpoint.tensor import Tensor, TensorEntry, map_file, map_tensor
from hybrid.errors import InvalidCheckpoint, one_line
from predictors.schema import Malformed, parse_json

# A parsed header takes twenty times its size in memory. A header of 100,000 tensors has 10 MB.
_MAX_HEADER_BYTES = 32 << 20


class SafetensorsFile:
    """An open file. Raises `InvalidCheckpoint` if any part of it is broken, even an unused one."""

    def __init__(self, path: Path, *, use_mmap: bool = True) -> None:
        self._path, self._use_mmap = path, use_mmap
        self.paths: tuple[Path, ...] = (path,)
        self.notices: tuple[str, ...] = ()
        self._buffer = map_file(path)
        n_header = int.from_bytes(self._buffer[:8], "little")
        if n_header > _MAX_HEADER_BYTES:
            raise InvalidCheckpoint(
                f"{path}: is not a safetensors file, or is broken: its header would have "
                f"{n_header:,} bytes, expected at most {_MAX_HEADER_BYTES:,}; download it again"
            )
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise InvalidCheckpoint(
                f"{path}: is not a sound safetensors file ({one_line(error)}); it has "
                f"{len(self._buffer):,} bytes, perhaps cut off: download it again"
            ) from error
        self._data_begin = 8 + n_header
        try:
            self._entries: dict[str, Any] = parse_json(self._buffer[8 : self._data_begin])
        except Malformed as error:
            raise InvalidCheckpoint(f"{path}: its header {error}") from error

    @property
    def names(self) -> Collection[str]:
        return self._entries.keys() - {"__metadata__"}

    @property
    def metadata(self) -> dict[str, str]:
        """What the writer of the file says about it."""
        found = self._entries.get("__metadata__", {})
        return dict(found) if isinstance(found, dict) else {}

    def tensor(self, name: str) -> Tensor:
        return map_tensor(self._path, self._buffer, self.entry(name), use_mmap=self._use_mmap)

    def entry(self, name: str) -> TensorEntry:
        """Return what the header says of a tensor, whatever its type. Raises InvalidCheckpoint."""
        match self._entries.get(name):
            case None:
                raise InvalidCheckpoint(f"{self._path}: has no tensor {name!r}")
            case {"dtype": str(dtype), "shape": list(sizes), "data_offsets": [int(begin), _]}:
                begin += self._data_begin
            case _:
                raise InvalidCheckpoint(
                    f"{self._path}: tensor {name!r}: expected an object with dtype, shape and "
                    "data_offsets in the header"
                )
        return TensorEntry(name, dtype, tuple(sizes), begin)
