"""Machine: the speeds of the hardware that the time model needs.

They are measured in some seconds and kept in a JSON file per machine, format and model shape.
Machines that are not at hand are modelled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hybrid.errors import InvalidArtifact
from hybrid.files import read_bytes, write_atomically
from predictors.schema import boolean, integer, nullable, number, parse_json, record, text

VERSION = 1
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CpuSpeeds:
    """Speeds of all threads together, in one weight format."""

    stream_gbs: float  # rows that every token reads
    gather_gbs: float  # up and down rows of active neurons, which are scattered
    kv_gbs: float  # keys and values
    layer_us: float  # fixed cost of a layer: waiting between its phases


@dataclass(frozen=True, slots=True)
class GpuSpeeds:
    """Speeds of one GPU, in one weight format."""

    name: str
    vram_bytes: int  # free VRAM after this process has created its context
    context_bytes: int  # what CUDA and torch take for themselves
    stream_gbs: float
    gather_gbs: float  # rows of which some are skipped
    node_us: float  # cost of one more kernel in a graph
    hand_off_us: float  # cost of a hand-off in which the CPU computes nothing
    mechanism: str = "modelled"  # of hand-offs (engine.gpu.device)
    torch_bytes: int = 0  # torch's share of context_bytes


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    quant: str  # the weight format of the speeds
    n_threads: int
    isa: str
    ram_bytes: int
    cpu: CpuSpeeds
    gpu: GpuSpeeds | None = None
    is_modelled: bool = False

    def save(self, path: Path) -> None:
        """Write the file. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        write_atomically(path, content.encode())


# Every field is optional, because a user may replace some only.
_gbs = number(1e-6, 1e9)
_us = number(0.0, 1e9)
_MACHINE = record(
    {},
    {
        "version": integer(),
        **dict.fromkeys(("name", "quant", "isa"), text()),
        "n_threads": integer(1, 1 << 16),
        "ram_bytes": integer(),
        "is_modelled": boolean,
        "cpu": record(
            {}, {**dict.fromkeys(("stream_gbs", "gather_gbs", "kv_gbs"), _gbs), "layer_us": _us}
        ),
        "gpu": nullable(
            record(
                {},
                {
                    **dict.fromkeys(("name", "mechanism"), text()),
                    **dict.fromkeys(("vram_bytes", "context_bytes", "torch_bytes"), integer()),
                    **dict.fromkeys(("stream_gbs", "gather_gbs"), _gbs),
                    **dict.fromkeys(("node_us", "hand_off_us"), _us),
                },
            )
        ),
    },
)


_OPTIONAL = {"gpu", "is_modelled", "version"}  # of a whole machine


def read_overrides(path: Path) -> dict[str, Any]:
    """Read fields of a machine from a JSON file: all of them, or only those to be replaced.

    `cpu` and `gpu` are objects. Raises InvalidArtifact.
    """
    try:
        values = parse_json(read_bytes(path, _MAX_BYTES))
        version = values.get("version", VERSION) if isinstance(values, dict) else VERSION
        if version != VERSION:
            raise InvalidArtifact(f"{path}: has another version; measure the machine again")
        values = _MACHINE(values)
    except OSError as error:
        raise InvalidArtifact(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidArtifact(f"{path}: {error}") from error
    values.pop("version", None)
    return values


def override(machine: Machine, values: dict[str, Any], path: Path) -> Machine:
    """Return the machine with some fields replaced. Raises InvalidArtifact."""
    own = dict(values)
    if "cpu" in own:
        own["cpu"] = replace(machine.cpu, **own["cpu"])
    if own.get("gpu") is not None:
        if machine.gpu is None:
            needed = {f.name for f in fields(GpuSpeeds)} - {"mechanism", "torch_bytes"}
            missing = needed - own["gpu"].keys()
            if missing:
                raise InvalidArtifact(f"{path}: its gpu lacks {', '.join(sorted(missing))}")
            own["gpu"] = GpuSpeeds(**own["gpu"])
        else:
            own["gpu"] = replace(machine.gpu, **own["gpu"])
    return replace(machine, **own)


def load_machine(path: Path) -> Machine:
    """Read a machine that `Machine.save` wrote. Raises InvalidArtifact."""
    values = read_overrides(path)
    for what, kind, found in (("", Machine, values), ("its cpu ", CpuSpeeds, values.get("cpu"))):
        missing = {f.name for f in fields(kind)} - _OPTIONAL - (found or {}).keys()
        if missing:
            raise InvalidArtifact(f"{path}: {what}lacks {', '.join(sorted(missing))}")
    nothing = Machine("", "", 1, "", 0, CpuSpeeds(1.0, 1.0, 1.0, 0.0))
    return override(nothing, values, path)


def _modelled(name: str, memory: float, gpu: str, vram_gbs: float) -> Machine:
    """Model a machine from the bandwidths in its data sheets, in GB/s.

    Each bandwidth is multiplied by the share that kernels reach. The CPU's shares were measured on
    our machine. The GPU's shares and latencies are those that others report (docs/log.md).
    """
    return Machine(
        name=name,
        quant="any",
        n_threads=8,
        isa="avx2",
        ram_bytes=16 << 30,
        cpu=CpuSpeeds(0.85 * memory, 0.5 * memory, 0.8 * memory, 15.0),
        gpu=GpuSpeeds(gpu, 64 << 30, 0, 0.8 * vram_gbs, 0.55 * vram_gbs, 2.0, 10.0),
        is_modelled=True,
    )


MODELLED: dict[str, Callable[[], Machine]] = {
    "ddr4-gtx1650": lambda: _modelled("DDR4 50 GB/s", 50, "GTX 1650, 128 GB/s", 128),
    "ddr4-rtx3050": lambda: _modelled("DDR4 50 GB/s", 50, "RTX 3050, 224 GB/s", 224),
    "ddr5-rtx4060": lambda: _modelled("DDR5 80 GB/s", 80, "RTX 4060, 272 GB/s", 272),
    "ddr5-rtx5060": lambda: _modelled("DDR5 80 GB/s", 80, "RTX 5060, 448 GB/s", 448),
}
