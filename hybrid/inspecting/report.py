"""What is known about a model. `as_json` gives the keys that docs/formats.md describes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class StoredType(NamedTuple):
    """All tensors of one type."""

    type: str  # as the file names it
    tensors: int
    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits a weight, with its share of scales."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, slots=True)
class Activation:
    name: str | None  # silu, relu or fatrelu; None: not known
    threshold: float | None  # of fatrelu
    source: str  # where it is known from


@dataclass(frozen=True, slots=True)
class PredictorRanks:
    """The predictors of a file, one a layer."""

    source: str  # whose format, and the file if it is not the model's own
    ranks: tuple[int, ...]  # 0: the layer computes every gate


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    kind: str
    size: int
    added: int
    begins_with: tuple[str, ...]  # what is put before a text
    ends: tuple[str, ...]  # tokens that end an answer
    templates: tuple[str, ...]  # names of the model's own chat templates
    template: str | None  # what a chat is written with


@dataclass(frozen=True, slots=True)
class Running:
    """How the model runs on this machine."""

    quant: str
    context: int  # tokens
    needed_bytes: int  # packed weights, KV cache of the context, working memory
    free_bytes: int
    command: str


@dataclass(frozen=True, slots=True)
class TensorContent:
    """What reading all bytes of a tensor shows."""

    name: str
    sha256: str | None  # of its bytes as they are stored; None: of a type that is not read
    not_finite: int | None  # number of values that are NaN or infinite; None: values are not read


@dataclass(frozen=True, slots=True)
class Report:
    """What is known about a model. None and () mean: not known, or there is none."""

    model: str  # as the user named it
    kind: str
    path: str | None = None
    files: tuple[tuple[str, int], ...] = ()  # names and bytes
    architecture: str | None = None
    shapes: dict[str, int | float | bool] = field(default_factory=dict)
    parameters: int | None = None
    types: tuple[StoredType, ...] = ()
    activation: Activation | None = None
    sparsity: dict[str, float] = field(default_factory=dict)
    predictors: tuple[PredictorRanks, ...] = ()
    tokenizer: TokenizerFacts | None = None
    packed_bytes: dict[str, int] = field(default_factory=dict)  # by format
    kv_bytes_per_1000_tokens: int | None = None
    running: Running | None = None
    refused: str | None = None  # why it does not run
    notices: tuple[str, ...] = ()  # what loading it says
    content: tuple[TensorContent, ...] | None = None  # only if all bytes were read

    @property
    def n_bytes(self) -> int:
        return sum(n_bytes for _, n_bytes in self.files)

    def as_json(self) -> dict[str, Any]:
        described = asdict(self)
        described["runs"] = self.running is not None
        described["files"] = [{"name": name, "bytes": n} for name, n in self.files]
        described["types"] = [
            {**row._asdict(), "bits_per_weight": round(row.bits, 4)} for row in self.types
        ]
        return described
