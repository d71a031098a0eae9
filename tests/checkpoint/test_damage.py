"""A model with random damage to one of its files still loads, or raises a HybridError."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid.checkpoint import open_checkpoint
from hybrid.errors import HybridError

LAYER_ROLES = ("attention_norm", "q", "k", "v", "o", "ffn_norm", "gate", "up", "down")
Arrays = dict[str, np.ndarray]
Save = Callable[..., None]
Damage = Callable[[bytes], bytes]


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """Cut the file, or overwrite bytes, mostly near its ends, where the structure is."""
    near = st.integers(0, 4000) | st.integers(-3000, -1) | st.integers(0, 2**20)
    value = st.sampled_from([0, 1, 0x22, 0x2E, 0x30, 0x39, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)
    edits = draw(st.lists(st.tuples(near, value), max_size=6))
    cut = draw(st.none() | near)

    def damage(content: bytes) -> bytes:
        damaged = bytearray(content)
        for position, byte in edits:
            damaged[position % len(damaged)] = byte
        return bytes(damaged if cut is None else damaged[: cut % len(damaged)])

    return damage


def loads_or_is_refused(folder: Path) -> None:
    with contextlib.suppress(HybridError), open_checkpoint(folder) as checkpoint:
        for role in ("embedding", "norm", "head"):
            checkpoint.read(role)
        for layer in range(checkpoint.config.n_layers):
            for role in LAYER_ROLES:
                checkpoint.read(role, layer)


@pytest.fixture
def sound_safetensors(model: Path, arrays: Arrays, save_safetensors: Save) -> bytes:
    save_safetensors(model / "model.safetensors", arrays, "F16")
    return (model / "model.safetensors").read_bytes()


@pytest.fixture
def sound_bin(model: Path, arrays: Arrays) -> bytes:
    (model / "model.safetensors").unlink()
    torch = pytest.importorskip("torch", reason="torch writes the file that is damaged")
    state = {name: torch.tensor(array).bfloat16() for name, array in arrays.items()}
    torch.save(state, model / "pytorch_model.bin")
    return (model / "pytorch_model.bin").read_bytes()


# All examples share the folder on purpose: each overwrites the same file.
FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(damage=damages())
@pytest.mark.slow
def test_damaged_safetensors_load_or_are_refused(
    model: Path, sound_safetensors: bytes, damage: Damage
) -> None:
    (model / "model.safetensors").write_bytes(damage(sound_safetensors))
    loads_or_is_refused(model)


@FUZZ
@given(damage=damages())
@pytest.mark.slow
def test_a_damaged_bin_file_loads_or_is_refused(
    model: Path, sound_bin: bytes, damage: Damage
) -> None:
    (model / "pytorch_model.bin").write_bytes(damage(sound_bin))
    loads_or_is_refused(model)


@FUZZ
@given(damage=damages())
def test_a_damaged_config_loads_or_is_refused(
    model: Path, config: dict[str, Any], damage: Damage
) -> None:
    (model / "config.json").write_bytes(damage(json.dumps(config).encode()))
    loads_or_is_refused(model)
