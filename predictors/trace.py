"""Activation trace: the FFN inputs of some tokens, and the neurons that fired for them.

The profiler writes it. It is a folder with trace.json and one safetensors file per layer, and holds
all that training a predictor needs. Neurons are in the order of the packed model, which
`order_hash` identifies. The format is described in docs/formats.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from predictors.errors import PredictorError
from predictors.reading import read_bytes, read_safetensors
from predictors.schema import (
    Malformed,
    anything,
    field_of,
    integer,
    list_of,
    mapping,
    number,
    parse_json,
    record,
    text,
)
from predictors.writing import replacing

VERSION = 3
_FILE = "trace.json"
_COPY_BYTES = 1 << 24
_MAX_JSON_BYTES, _MAX_LAYER_BYTES = 16 << 20, 16 << 30


def _rank(key: str) -> int:
    if not key.isascii() or not key.isdecimal() or len(key) > 6:
        raise Malformed("expected a rank")
    return int(key)


_size = integer(1, 1 << 24)
_COSTS = record(
    {
        **dict.fromkeys(("exact_ns", "named_row_ns"), number(0.0)),
        "lowrank_ns": mapping(_rank, number(0.0), least=1),
    },
    others=anything,  # costs of kinds that no longer exist
)
_ABOUT = record(
    {
        "hybrid_trace": integer(),
        "n_layers": integer(1, 1 << 16),
        **dict.fromkeys(("n_neurons", "hidden_size"), _size),
        **dict.fromkeys(("n_tokens", "stride"), integer(1)),
        **dict.fromkeys(("model", "model_hash", "order_hash", "quant"), text()),
        **dict.fromkeys(("input", "activation"), text()),
        "threshold": number(-1e6, 1e6),
        "texts": list_of(anything),
        "costs": _COSTS,
    },
    others=anything,
)


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """One layer's part of a trace."""

    inputs: NDArray[np.float16]  # (n_tokens, hidden): the FFN's normed input
    masks: NDArray[np.uint8]  # (n_tokens, ceil(n_neurons / 8)): bit i % 8 of byte i / 8
    gate: NDArray[np.float16]  # (n_neurons, hidden): the gate's weights

    def active(self) -> NDArray[np.bool_]:
        """Return (n_tokens, n_neurons): which neurons fired."""
        bits = np.unpackbits(self.masks, axis=1, bitorder="little")
        return bits[:, : len(self.gate)].view(np.bool_)


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded trace. A layer is read from its file by `layer`."""

    folder: Path
    about: dict[str, Any]  # model_hash, order_hash, quant, n_tokens, activation, costs, texts, …

    def __getattr__(self, name: str) -> Any:
        try:
            return self.about[name]
        except KeyError:
            raise AttributeError(name) from None

    def layer(self, layer: int) -> LayerTrace:
        """Read one layer. Raises PredictorError if its file is broken."""
        path = _layer_path(self.folder, layer)
        hidden, n_neurons, n_tokens = self.hidden_size, self.n_neurons, self.n_tokens
        try:
            _, tensors = read_safetensors(path, _MAX_LAYER_BYTES)
            records, gate = tensors["records"], tensors["gate"]
        except OSError as error:
            raise PredictorError(f"{path}: {error.strerror or error}") from error
        except (ValueError, KeyError) as error:
            raise PredictorError(f"{path}: is broken ({error}); record the trace again") from error
        if (
            records.shape != (n_tokens, record_bytes(hidden, n_neurons))
            or gate.shape != (n_neurons, hidden)
            or records.dtype != np.uint8
            or gate.dtype != np.float16
        ):
            raise PredictorError(f"{path}: does not match {_FILE}; record the trace again")
        inputs = records[:, : 2 * hidden].copy().view(np.float16)
        if not np.isfinite(inputs).all():
            raise PredictorError(f"{path}: holds inputs that are not finite")
        return LayerTrace(inputs, records[:, 2 * hidden :], gate)


def load_trace(folder: Path) -> Trace:
    """Open a trace. Raises PredictorError if it is missing, broken or of another version."""
    path = folder / _FILE
    try:
        about = parse_json(read_bytes(path, _MAX_JSON_BYTES))
        version = field_of(about, "hybrid_trace")
        if version != VERSION:
            raise PredictorError(
                f"{path}: is of version {version!r:.20}, expected {VERSION}; record the trace again"
            )
        about = _ABOUT(about)
    except OSError as error:
        raise PredictorError(
            f"{path}: {error.strerror or error}; profiler.record --trace writes a trace"
        ) from error
    except ValueError as error:
        raise PredictorError(f"{path}: is broken ({error}); record the trace again") from error
    del about["hybrid_trace"]
    return Trace(folder, about)


def record_bytes(hidden_size: int, n_neurons: int) -> int:
    """Return the bytes of one token in one layer: its fp16 input, then its mask."""
    return 2 * hidden_size + -(-n_neurons // 8)


class TraceSizes(NamedTuple):
    """The sizes of the traced model."""

    n_layers: int
    n_neurons: int
    hidden_size: int


class Sample(NamedTuple):
    """How far a trace has come."""

    n_records: int = 0  # tokens kept
    stride: int = 1  # every how many tokens one is kept
    n_seen: int = 0  # tokens offered


START = Sample()


def holds(folder: Path, sizes: TraceSizes, sample: Sample) -> bool:
    """Return whether a folder has every record that a TraceWriter's sample says it has."""
    n_bytes = sample.n_records * record_bytes(sizes.hidden_size, sizes.n_neurons)
    try:
        return all(
            _part_path(folder, layer, sample.stride).stat().st_size >= n_bytes
            for layer in range(sizes.n_layers)
        )
    except OSError:
        return False


class TraceWriter:
    """Collects an even sample of a stream of tokens whose length is not known.

    It keeps every `stride`-th token. When it has `capacity` tokens, it drops every second one and
    doubles the stride.

    It is resumable: `sample` is its whole state besides the files. A caller that saves it calls
    `flush` before and `drop_stale` after. Files of an earlier stride are kept until then.
    """

    def __init__(
        self, folder: Path, sizes: TraceSizes, capacity: int, sample: Sample = START
    ) -> None:
        """Open or create the files. This and every other method raises OSError."""
        self.folder, self.capacity = folder, capacity
        self.n_layers, self.n_neurons, self.hidden_size = sizes
        self.n_records, self.stride, self.n_seen = sample
        self.record_bytes = record_bytes(self.hidden_size, self.n_neurons)
        folder.mkdir(parents=True, exist_ok=True)
        self._files: list[BinaryIO] = []
        self._open_parts()

    @property
    def sample(self) -> Sample:
        return Sample(self.n_records, self.stride, self.n_seen)

    def _open_parts(self) -> None:
        self.close()
        for layer in range(self.n_layers):
            path = self._part_path(layer)
            path.touch()
            file = path.open("r+b")
            self._files.append(file)
            file.truncate(self.n_records * self.record_bytes)
            file.seek(0, 2)

    def _part_path(self, layer: int) -> Path:
        return _part_path(self.folder, layer, self.stride)

    def add(self, inputs: NDArray[np.float16], masks: NDArray[np.uint8]) -> None:
        """Add the next tokens: (n_layers, n, hidden) inputs and (n_layers, n, bytes) masks."""
        n = inputs.shape[1]
        taken = np.flatnonzero((self.n_seen + np.arange(n)) % self.stride == 0)
        self.n_seen += n
        while taken.size:
            part, taken = np.split(taken, [self.capacity - self.n_records])
            for layer, file in enumerate(self._files):
                halves = np.ascontiguousarray(inputs[layer, part]).view(np.uint8)
                file.write(np.concatenate([halves, masks[layer, part]], axis=1).tobytes())
            self.n_records += part.size
            if self.n_records == self.capacity:
                self._thin()
                first = self.n_seen - n
                taken = taken[(first + taken) % self.stride == 0]

    def _thin(self) -> None:
        self.close()
        before = [self._part_path(layer) for layer in range(self.n_layers)]
        self.n_records, self.stride = -(-self.n_records // 2), 2 * self.stride
        for layer, path in enumerate(before):
            records = np.fromfile(path, np.uint8).reshape(-1, self.record_bytes)
            self._part_path(layer).write_bytes(records[::2].tobytes())
        self._open_parts()

    def flush(self) -> None:
        for file in self._files:
            file.flush()

    def drop_stale(self) -> None:
        current = {self._part_path(layer) for layer in range(self.n_layers)}
        for path in set(self.folder.glob("layer_*.part")) - current:
            path.unlink()

    def finish(self, gates: Sequence[NDArray[np.float16]], about: dict[str, Any]) -> None:
        """Write the trace's files. `gates` are the layers' weights, read one layer at a time."""
        self.close()
        for layer in range(self.n_layers):
            gate = np.ascontiguousarray(gates[layer], np.float16)
            n_bytes = self.n_records * self.record_bytes
            entries = {
                "gate": {
                    "dtype": "F16",
                    "shape": list(gate.shape),
                    "data_offsets": [0, gate.nbytes],
                },
                "records": {
                    "dtype": "U8",
                    "shape": [self.n_records, self.record_bytes],
                    "data_offsets": [gate.nbytes, gate.nbytes + n_bytes],
                },
            }
            header = json.dumps(entries).encode()
            header += b" " * (-len(header) % 8)
            part_path, path = self._part_path(layer), _layer_path(self.folder, layer)
            with part_path.open("rb") as part, replacing(path) as out:
                out.write(struct.pack("<Q", len(header)) + header + gate.tobytes())
                while block := part.read(_COPY_BYTES):
                    out.write(block)
            part_path.unlink()
        self.drop_stale()
        sizes = {
            "n_layers": self.n_layers,
            "n_neurons": self.n_neurons,
            "hidden_size": self.hidden_size,
            "n_tokens": self.n_records,
            "stride": self.stride,
        }
        content = {"hybrid_trace": VERSION, **sizes, **about}
        with replacing(self.folder / _FILE) as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()


def _part_path(folder: Path, layer: int, stride: int) -> Path:
    return folder / f"layer_{layer:03}.{stride}.part"


def _layer_path(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:03}.safetensors"
