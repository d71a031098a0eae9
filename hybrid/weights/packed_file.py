"""Packed models in files, so that a large model is packed only once.

A file is safetensors (https://github.com/huggingface/safetensors). Its header says what is packed
and from which source. Its tensors are the bytes of the packed model's buffer. The header depends on
nothing else, so a file is current if it begins with the header that would be written today.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hybrid.errors import OutOfMemory
from hybrid.files import replacing
from hybrid.progress import Progress, ignore_progress
from hybrid.weights.layout import PackedLayout
from hybrid.weights.memory import (
    BackgroundCopy,
    FileChanged,
    allocate,
    copy_in_background,
    lock,
    map_file,
    read_file,
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
KEEP_FROM_BYTES = 64 << 20  # smaller models are packed so fast that a file does not pay off


class FileSource(Source, Protocol):
    """A checkpoint that lists its files."""

    @property
    def folder(self) -> Path: ...
    @property
    def sources(self) -> Sequence[tuple[str, int, int]]: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A packed model in memory, and how it was loaded."""

    model: PackedModel
    n_bytes: int
    is_mapped: bool  # permanently
    is_locked: bool  # the system cannot swap out or drop its pages
    was_packed: bool  # packed by this load, not read from a file
    copying: BackgroundCopy | None  # mapped, and being copied into memory in the background
    notices: tuple[str, ...]


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
    `cache` None keeps nothing.

    If the folder cannot be written, the model is packed at each load and a notice says so. That is
    an error if the weights do not fit into memory. Raises OutOfMemory, and the errors of
    `pack_model`.
    """
    n_bytes = layout.n_bytes
    use_mmap, use_mlock, fits_memory, n_threads = residence

    def loaded(
        memory: Buffer | BackgroundCopy,
        *notices: str,
        is_mapped: bool = False,
        was_packed: bool = True,
    ) -> LoadedModel:
        copying = memory if isinstance(memory, BackgroundCopy) else None
        buffer = memory.buffer if isinstance(memory, BackgroundCopy) else memory
        refused = lock(buffer) if use_mlock else []
        return LoadedModel(
            view_packed(buffer, layout),
            n_bytes,
            is_mapped,
            use_mlock and not refused,
            was_packed,
            copying,
            (*notices, *refused),
        )

    def pack(buffer: Buffer) -> Buffer:
        pack_model(
            checkpoint,
            layout,
            buffer=buffer,
            neuron_orders=neuron_orders,
            n_threads=n_threads,
            progress=progress,
        )
        return buffer

    if cache is None or (n_bytes < KEEP_FROM_BYTES and not use_mmap):
        return loaded(pack(allocate(n_bytes)), *(["mmap: there is no file to map"] * use_mmap))
    path = cache / _file_name(checkpoint, layout)
    header = _header(checkpoint, layout, order_hash(neuron_orders))
    if _is_current(path, header, n_bytes):
        # The file may be deleted or shortened at any moment.
        with contextlib.suppress(FileChanged, OSError):
            memory: Buffer | BackgroundCopy
            if use_mmap:
                memory = map_file(path, len(header), n_bytes)
            elif use_mlock:
                memory = read_file(path, len(header), n_bytes, n_threads)
            else:
                memory = copy_in_background(path, len(header), n_bytes, n_threads)
            return loaded(memory, is_mapped=use_mmap, was_packed=False)
    try:
        if use_mmap:
            cache.mkdir(parents=True, exist_ok=True)
            with replacing(path, len(header) + n_bytes) as file:
                file.write(header)
                file.flush()
                mapping = mmap.mmap(file.fileno(), len(header) + n_bytes)
                pack(np.frombuffer(mapping, np.uint8)[len(header) :])
                mapping.flush()
            return loaded(map_file(path, len(header), n_bytes), is_mapped=True)
        buffer = pack(allocate(n_bytes))
    except (OSError, FileChanged) as error:
        if not fits_memory:
            raise OutOfMemory(
                f"{_not_kept(path, error)}; without that file the weights must fit into memory, "
                "but they do not"
            ) from error
        return loaded(pack(allocate(n_bytes)), _not_kept(path, error))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path, len(header) + n_bytes) as file:
            file.write(header)
            file.write(buffer.data)
    except OSError as error:
        return loaded(buffer, _not_kept(path, error))
    return loaded(buffer)


def _file_name(checkpoint: FileSource, layout: PackedLayout) -> str:
    """Return one name per model folder, format, and whether there are predictors and a preview.

    So a changed model replaces its own file.
    """
    folder = checkpoint.folder.resolve()
    name = re.sub(r"[^\w.-]", "_", folder.name)[:80]
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    parts = [name, digest, layout.format.name]
    parts += ["predicted"] * bool(layout.predicted_layers) + ["preview"] * layout.has_preview
    return f"{'-'.join(parts)}.safetensors"


def _header(checkpoint: FileSource, layout: PackedLayout, order: str) -> bytes:
    """Return the first bytes of the file, padded so that the buffer begins at a cache line."""
    entries: dict[str, object] = {
        "__metadata__": {
            "hybrid_packed": VERSION,
            "format": layout.format.name,
            "source": _fingerprint(checkpoint),
            "neuron_order": order,
            "predicted_layers": " ".join(map(str, layout.predicted_layers)),
        }
    }
    for name, array in layout.arrays.items():
        # Padding after an array counts as part of it, because safetensors allows no gaps.
        offsets = [array.first, array.end]
        entries[name] = {"dtype": "U8", "shape": [array.end - array.first], "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _fingerprint(checkpoint: FileSource) -> str:
    """Hash the parsed config, and the name, size and modification time of each source file."""
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for name, n_bytes, modified_ns in checkpoint.sources:
        digest.update(f"\0{name}\0{n_bytes}\0{modified_ns}".encode())
    return digest.hexdigest()


def _is_current(path: Path, header: bytes, n_bytes: int) -> bool:
    try:
        with path.open("rb") as file:
            is_whole = os.fstat(file.fileno()).st_size == len(header) + n_bytes
            return is_whole and file.read(len(header)) == header
    except OSError:
        return False


def _not_kept(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"the packed model cannot be kept in {path.parent} ({reason}), so it is "
        "packed again at each start; set HYBRID_HOME to a folder with free space"
    )
