"""A tiny MiniCPM: its config, its arrays, its folder on disk, and a writer of safetensors files.

Tensor names and shapes are written out here, so that the package's own tables are tested.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SaveSafetensors = Callable[..., None]


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Float32 values that are exact in float16 and bfloat16 too."""
    shapes = {"model.embed_tokens": (10, 32), "model.norm": (32,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm": (32,),
            f"{prefix}self_attn.q_proj": (32, 32),
            f"{prefix}self_attn.k_proj": (16, 32),
            f"{prefix}self_attn.v_proj": (16, 32),
            f"{prefix}self_attn.o_proj": (32, 32),
            f"{prefix}post_attention_layernorm": (32,),
            f"{prefix}mlp.gate_proj": (48, 32),
            f"{prefix}mlp.up_proj": (48, 32),
            f"{prefix}mlp.down_proj": (32, 48),
        }
    rng = np.random.default_rng(7)
    return {
        f"{name}.weight": rng.integers(-128, 128, shape).astype(np.float32) / 64
        for name, shape in shapes.items()
    }


@pytest.fixture
def save_safetensors() -> SaveSafetensors:
    """save(path, arrays, dtype="F32"). It writes by hand, as NumPy has no bfloat16."""

    def save(path: Path, arrays: dict[str, np.ndarray], dtype: str = "F32") -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name, array in arrays.items():
            content = as_bytes(array, dtype)
            header[name] = {
                "dtype": dtype,
                "shape": array.shape,
                "data_offsets": [len(data), len(data) + len(content)],
            }
            data += content
        encoded = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)

    return save


def as_bytes(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (array.view(np.uint32) >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]).tobytes()


@pytest.fixture
def model(
    tmp_path: Path,
    config: dict[str, Any],
    arrays: dict[str, np.ndarray],
    save_safetensors: SaveSafetensors,
) -> Path:
    """A folder with config.json and model.safetensors."""
    folder = tmp_path / "tiny model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_safetensors(folder / "model.safetensors", arrays)
    return folder
