"""The tensors of an exported model: where their values come from, and their bytes, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint, Tensor
from hybrid.checkpoint.gguf.blocks import BlockType
from hybrid.checkpoint.gguf.tensor import BlockTensor
from hybrid.exporting.encoding import F32, Bytes, Floats, SmallBlocks, encode, rounds, type_for
from hybrid.model.config import ModelConfig
from hybrid.model.families import expected_tensors

_PART_VALUES = 1 << 21  # that are in memory at once, as float32
_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint, as it will be written."""

    tensor: Tensor
    factor: float = 1.0  # of all values
    order: NDArray[np.intp] | None = None  # which row each written row is; None: in order
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.is_transposed else self.tensor.shape

    @property
    def stored_type(self) -> str:
        """The name of the type that the checkpoint has it in."""
        tensor = self.tensor
        if isinstance(tensor, BlockTensor) and tensor.type is not None:
            return tensor.type.name
        return tensor.dtype

    def is_raw(self, kind: BlockType) -> bool:
        """Return whether rows of the checkpoint's file can be written as they are."""
        tensor = self.tensor
        return (
            isinstance(tensor, BlockTensor)
            and tensor.type == kind
            and len(tensor.shape) == 2
            and tensor.is_transposed == self.is_transposed
            and self.factor == 1.0
        )

    def parts(self, kind: BlockType) -> Iterator[Bytes]:
        """Yield the bytes of the rows in order. Raises NumericOverflow."""
        n_rows, n_cols = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        step = max(1, _PART_VALUES // n_cols)
        if self.is_raw(kind):
            for at in range(0, n_rows, step):
                yield self._raw(slice(at, at + step))
            return
        source, small = self._with_readable_columns(), SmallBlocks(kind, self.tensor.name)
        for at in range(0, n_rows, step):
            values = source._values(slice(at, at + step))
            small.add(values)
            yield encode(kind, values, self.tensor.name)
        small.refuse_if_many()

    def _with_readable_columns(self) -> Source:
        """Blocks run along rows, so that each column would decode all of them again."""
        if not self.is_transposed:
            return self
        return replace(self, tensor=self.tensor.in_memory())

    def _raw(self, rows: slice) -> Bytes:
        assert isinstance(self.tensor, BlockTensor)
        assert self.tensor.stored is not None
        wanted: slice | NDArray[np.intp] = rows if self.order is None else self.order[rows]
        if self.tensor.rows is not None:
            wanted = self.tensor.rows[wanted]
        return self.tensor.stored.bytes_of(wanted)

    def _values(self, rows: slice) -> Floats:
        """Return rows as float32 (n, n_cols)."""
        wanted: slice | NDArray[np.intp] = rows if self.order is None else self.order[rows]
        if len(self.shape) == 1:
            values = self.tensor.fp32().reshape(1, -1)
        elif self.is_transposed:
            values = np.ascontiguousarray(self.tensor.fp32((_ALL, wanted)).T)
        else:
            values = self.tensor.fp32((wanted,))
        return values if self.factor == 1.0 else values * np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor of the exported file."""

    name: str
    type: BlockType
    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def n_bytes(self) -> int:
        n_values = prod(self.shape)
        return n_values // self.type.n_values * self.type.n_bytes

    @property
    def is_rounded(self) -> bool:
        return rounds(self.type, self.source.stored_type)

    def parts(self) -> Iterator[Bytes]:
        return self.source.parts(self.type)


def model_tensors(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[tuple[str, Source]]:
    """Yield each tensor with its name in Hugging Face's files.

    Scales that `config` no longer has are multiplied into the weights.
    """
    own = checkpoint.config
    residual = own.residual_scale / config.residual_scale
    factors = {
        "embedding": own.embedding_scale / config.embedding_scale,
        "o": residual,
        "down": residual,
        "head": own.logit_scale / config.logit_scale,
    }
    for role, layer, name, _ in expected_tensors(config):
        yield name, Source(checkpoint.tensor(role, layer), factors.get(role, 1.0))


def written(name: str, kind: BlockType, source: Source) -> Written:
    """Return a tensor in a type that its rows can have. Norms stay float32."""
    if len(source.shape) == 1:
        return Written(name, F32, source)
    return Written(name, type_for(kind, source.shape[1]), source)
