"""Packed models in files, so that a large model is packed only once.

A file is safetensors (https://github.com/huggingface/safetensors). Its header says what is packed
and from which source, by a hash of all its bytes. Its tensors are the bytes of the packed model's
buffer, and a checksum of each array. The header depends on nothing else, so a file is current if it
begins with the header that would be written today.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from hybrid.errors import OutOfMemory
from hybrid.files import open_file, replacing
from hybrid.progress import Progress, ignore_progress
from hybrid.weights.layout import PackedLayout
from hybrid.weights.memory import (
    BackgroundCheck,
    BackgroundCopy,
    Checksums,
    FileChanged,
    FileDamaged,
    MappedOutput,
    Span,
    allocate,
    checksums_of,
    copy_in_background,
    lock,
    map_file,
    read_file,
    sync,
    write_in_parts,
)
from hybrid.weights.packed_rows import ALIGNMENT, Buffer
from hybrid.weights.packing import (
    NeuronOrders,
    PackedModel,
    Source,
    order_hash,
    pack_model,
    view_packed,
)

VERSION = "5"  # of rounding and byte layout; a new version makes every file stale
_CHECKSUMS = "checksums"  # the last tensor: one CRC-32 for each array
KEEP_FROM_BYTES = 64 << 20  # smaller models are packed so fast that a file does not pay off


class Identity(Protocol):
    """A model that is hashed when its hash is first needed, or in the background."""

    @property
    def weights_hash(self) -> str: ...
    def hashing(self) -> AbstractContextManager[None]: ...


class FileSource(Source, Protocol):
    """A checkpoint that knows its files."""

    @property
    def folder(self) -> Path: ...
    @property
    def identity(self) -> Identity: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A packed model in memory, and how it was loaded."""

    model: PackedModel
    layout: PackedLayout
    is_mapped: bool  # permanently
    is_locked: bool  # the system cannot swap out or drop its pages
    was_packed: bool  # packed by this load, not read from a file
    # Mapped, and being checked in the background. A BackgroundCopy also copies into memory.
    background: BackgroundCheck | None
    notices: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return self.layout.n_bytes

    @property
    def has_matrix_scales(self) -> bool:
        """Whether any matrix has a matrix scale."""
        buffer = self.model.embedding.memory
        arrays = self.layout.arrays.values()
        return any((array.matrix_scales(buffer) != 1).any() for array in arrays)


class Residence(NamedTuple):
    """How packed weights are brought into memory and held there."""

    use_mmap: bool = False  # mapped from their file, whatever its size
    use_mlock: bool = False  # the system cannot swap out or drop their pages
    fits_memory: bool = True  # without use_mmap
    n_threads: int = 1


DEFAULT_RESIDENCE = Residence()


def load_packed(
    checkpoint: FileSource,
    layout: PackedLayout,
    *,
    cache: Path | None,
    neuron_orders: NeuronOrders | None = None,
    residence: Residence = DEFAULT_RESIDENCE,
    progress: Progress = ignore_progress,
) -> LoadedModel:
    """Load the packed model from its file in `cache` if that is current; else pack and keep it.

    Without `use_mmap` the file's bytes are copied into huge-page memory: in the background, or
    before this returns if `use_mlock` is set. If the system refuses to lock, a notice says why.
    `cache` None keeps nothing. The bytes' checksums are compared where they are copied, and in the
    background if they stay mapped (`LoadedModel.background`).

    If the folder cannot be written, the model is packed at each load and a notice says so. That is
    an error if the weights do not fit into memory. Raises OutOfMemory, InvalidCheckpoint if the
    model's files change meanwhile, and the errors of `pack_model`.
    """
    n_bytes = layout.n_bytes
    use_mmap, use_mlock, fits_memory, n_threads = residence

    def loaded(
        buffer: Buffer,
        *notices: str,
        is_mapped: bool = False,
        was_packed: bool = True,
        background: BackgroundCheck | None = None,
    ) -> LoadedModel:
        refused = []
        if use_mlock and not fits_memory:  # the system would end the process instead of refusing
            refused = ["mlock: the weights do not fit into memory, so they are not locked"]
        elif use_mlock:
            refused = lock(buffer)
        return LoadedModel(
            view_packed(buffer, layout),
            layout,
            is_mapped,
            use_mlock and not refused,
            was_packed,
            background,
            (*damage, *notices, *refused),
        )

    def pack(buffer: Buffer | MappedOutput) -> None:
        try:
            pack_model(
                checkpoint,
                layout,
                buffer=buffer,
                neuron_orders=neuron_orders,
                n_threads=n_threads,
                progress=progress,
            )
        except MemoryError:
            raise OutOfMemory(
                "there is too little memory to pack the weights; close other programs, or use "
                "fewer threads"
            ) from None

    def packed() -> Buffer:
        buffer = allocate(n_bytes)
        pack(buffer)
        return buffer

    damage: tuple[str, ...] = ()
    if cache is None and not fits_memory:
        raise OutOfMemory(
            "the weights do not fit into memory, and there is no folder for a file of them; set "
            "HYBRID_HOME to a folder with free space"
        )
    if cache is None or (n_bytes < KEEP_FROM_BYTES and not use_mmap):
        return loaded(packed(), *(["mmap: there is no file to map"] * use_mmap))
    path = cache / _file_name(checkpoint, layout)
    file = _PackedFile(path, checkpoint, layout, order_hash(neuron_orders), n_threads)
    try:
        found = file.open(residence)
        if found is not None:
            buffer, check = found
            return loaded(buffer, is_mapped=use_mmap, was_packed=False, background=check)
    except FileDamaged as error:
        damage = (str(error),)
    try:
        if use_mmap:
            buffer, check = file.write_mapped(pack)
            return loaded(buffer, is_mapped=True, background=check)
        buffer = packed()
    except (OSError, FileChanged) as error:
        if not fits_memory:
            raise OutOfMemory(
                f"{_not_kept(path, error)}; without that file the weights must fit into memory, "
                "but they do not"
            ) from error
        return loaded(packed(), _not_kept(path, error))
    try:
        file.write(buffer)
    except OSError as error:
        return loaded(buffer, _not_kept(path, error))
    return loaded(buffer)


@dataclass(frozen=True, slots=True)
class _PackedFile:
    """The file of one packed model: header, buffer, checksums."""

    path: Path
    checkpoint: FileSource
    layout: PackedLayout
    order: str
    n_threads: int

    def open(self, residence: Residence) -> tuple[Buffer, BackgroundCheck | None] | None:
        """Return the weights if the file is there and current. Raises FileDamaged, OutOfMemory."""
        # Only if it exists, the model must be hashed before it is packed. Path.exists raises
        # PermissionError for a folder that may not be entered.
        if not os.path.lexists(self.path):
            return None
        header = self._header()
        checksums = _read_checksums(self.path, header, self.layout)
        if checksums is None:
            return None
        place = self.path, len(header), checksums
        try:
            if residence.use_mmap:
                return map_file(*place)
            if residence.use_mlock:
                return read_file(*place, self.n_threads), None
            memory = copy_in_background(*place, self.n_threads)
        except (FileChanged, OSError):  # it may be deleted or shortened at any moment
            return None
        if isinstance(memory, BackgroundCopy):
            return memory.buffer, memory
        return memory, None

    def write(self, buffer: Buffer) -> None:
        """Write packed weights. Raises OSError, and InvalidCheckpoint if the model has changed.

        The model is hashed while the disk is busy, because packing keeps all cores busy.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path, self._size) as file:
            with self.checkpoint.identity.hashing():
                file.seek(self._header_bytes)
                write_in_parts(file, buffer)
                self._write_checksums(file, buffer)
                file.flush()
                os.fsync(file.fileno())
            file.seek(0)
            file.write(self._header())

    def write_mapped(self, pack: Callable[[MappedOutput], None]) -> tuple[Buffer, BackgroundCheck]:
        """Pack into the file and map it. Raises FileChanged, and what `write` and `pack` raise."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first = self._header_bytes
        with replacing(self.path, self._size) as file:
            output = MappedOutput(file, first, self.layout.n_bytes)
            pack(output)
            with self.checkpoint.identity.hashing():
                sync(file.fileno())
            file.write(self._header())
            file.seek(first + self.layout.n_bytes)
            checksums = self._write_checksums(file, output.buffer)
        return map_file(self.path, first, checksums)

    def _header(self) -> bytes:
        """Return the first bytes of the file. Hashes the model if its hash is not known."""
        return _format_header(self.layout, self.checkpoint.identity.weights_hash, self.order)

    @property
    def _header_bytes(self) -> int:
        """The length of the header, which does not depend on the hash."""
        return len(_format_header(self.layout, "0" * 64, self.order))

    @property
    def _size(self) -> int:
        return self._header_bytes + self.layout.n_bytes + _checksum_bytes(self.layout)

    def _write_checksums(self, file: BinaryIO, buffer: Buffer) -> Checksums:
        """Write the CRC-32 of each array at the file's position. Raises OSError."""
        places = [(array.first, array.end) for array in self.layout.arrays.values()]
        values = checksums_of(buffer, places, self.n_threads)
        file.write(np.array(values, "<u4").tobytes())
        return _checksums(self.path, self.layout, values)


def _file_name(checkpoint: FileSource, layout: PackedLayout) -> str:
    """Return one name per model folder, format, and whether there are predictors and a preview.

    So a changed model replaces its own file.
    """
    folder = checkpoint.folder.resolve()
    name = re.sub(r"[^\w.-]", "_", folder.name)[:80]
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    parts = [name, digest, layout.format.name]
    if layout.predicted_layers:
        parts.append("own-predictors" if layout.has_stored_predictors else "predicted")
    parts += ["preview"] * layout.has_preview
    return f"{'-'.join(parts)}.safetensors"


def _format_header(layout: PackedLayout, source: str, order: str) -> bytes:
    entries: dict[str, object] = {
        "__metadata__": {
            "hybrid_packed": VERSION,
            "format": layout.format.name,
            "source": source,
            "neuron_order": order,
            "predicted_layers": " ".join(map(str, layout.predicted_layers)),
        }
    }
    for name, array in layout.arrays.items():
        # Padding after an array counts as part of it, because safetensors allows no gaps.
        offsets = [array.first, array.end]
        entries[name] = {"dtype": "U8", "shape": [array.end - array.first], "data_offsets": offsets}
    end = layout.n_bytes
    entries[_CHECKSUMS] = {
        "dtype": "U32",
        "shape": [len(layout.arrays)],
        "data_offsets": [end, end + _checksum_bytes(layout)],
    }
    return safetensors_header(entries)


def safetensors_header(entries: dict[str, object]) -> bytes:
    """Return the first bytes of a safetensors file, padded so that its data begin at a cache line.

    `entries` are the metadata, and each tensor's dtype, shape and data_offsets.
    """
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _checksum_bytes(layout: PackedLayout) -> int:
    return 4 * len(layout.arrays)


def _read_checksums(path: Path, header: bytes, layout: PackedLayout) -> Checksums | None:
    """Return the file's checksums if it begins with this header and has the right size."""
    end, n_checksums = len(header) + layout.n_bytes, _checksum_bytes(layout)
    try:
        with open_file(path) as file:
            is_whole = os.fstat(file.fileno()).st_size == end + n_checksums
            if not is_whole or file.read(len(header)) != header:
                return None
            file.seek(end)
            values = np.frombuffer(file.read(n_checksums), "<u4")
    except (OSError, ValueError):
        return None
    if values.size != len(layout.arrays):  # the file was shortened meanwhile
        return None
    return _checksums(path, layout, values.tolist())


def _checksums(path: Path, layout: PackedLayout, values: Sequence[int]) -> Checksums:
    """Return the checksums by array. Padding after an array is part of it."""
    spans = [
        Span(array.name, array.first, array.end, crc)
        for array, crc in zip(layout.arrays.values(), values, strict=True)
    ]
    return Checksums(path, tuple(spans))


def _not_kept(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"the packed model cannot be kept in {path.parent} ({reason}), so it is "
        "packed again at each start; set HYBRID_HOME to a folder with free space"
    )
