"""Reads all bytes of a model: a hash of each tensor, and values that are NaN or infinite."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from hybrid.checkpoint.tensor import Tensor
from hybrid.errors import UnsupportedModel
from hybrid.inspecting.report import TensorContent
from hybrid.inspecting.stored import StoredTensor
from hybrid.limits import allowed_threads
from hybrid.progress import Progress, ignore_progress
from hybrid.threads import map_on_threads

_PART_VALUES = 1 << 20  # of a tensor at a time
_BATCH_BYTES = 64 << 20  # of tensors between two reports of progress


def read_content(
    tensors: Sequence[StoredTensor], progress: Progress = ignore_progress
) -> tuple[TensorContent, ...]:
    """Read every tensor. Raises InvalidCheckpoint for a wrong checksum."""
    total, done = sum(tensor.n_bytes for tensor in tensors), 0
    found: list[TensorContent] = []
    progress("reading all bytes", 0, total)
    for batch in _batches(tensors):
        found += map_on_threads(_read, batch, allowed_threads())
        done += sum(tensor.n_bytes for tensor in batch)
        progress("reading all bytes", done, total)
    return tuple(found)


def _batches(tensors: Sequence[StoredTensor]) -> Iterator[list[StoredTensor]]:
    batch: list[StoredTensor] = []
    for tensor in tensors:
        batch.append(tensor)
        if sum(each.n_bytes for each in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(stored: StoredTensor) -> TensorContent:
    if stored.raw is not None:
        return TensorContent(stored.name, hashlib.sha256(stored.raw).hexdigest(), None)
    try:
        tensor = stored.read()
    except UnsupportedModel:
        return TensorContent(stored.name, None, None)
    if not tensor.shape:
        tensor = replace(tensor, data=tensor.data.reshape(1))
    digest, not_finite = hashlib.sha256(), 0
    for rows in _parts(tensor):
        digest.update(np.ascontiguousarray(tensor.bytes_of(rows)).data)
        with np.errstate(all="ignore"):
            not_finite += int((~np.isfinite(tensor.fp32((rows,)))).sum())
    return TensorContent(stored.name, digest.hexdigest(), not_finite)


def _parts(tensor: Tensor) -> Iterator[slice]:
    """Yield slices of the first dimension, some megabytes each."""
    shape = tensor.shape
    if len(shape) == 1:  # in a GGUF file, a part of it might cut a block
        yield slice(None)
        return
    step = max(1, _PART_VALUES // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        yield slice(first, first + step)
