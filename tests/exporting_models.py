"""Export models in tests, and read what was written by other means than ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hybrid
from hybrid.evaluation.fp32 import Fp32Engine
from hybrid.exporting import Exported, Request, export_model

SHARED = Path(__file__).parents[2] / "shared" / "data"
TEXT = "Once upon a time there was a cat"


def export(model: Path, target: str, out: Path, kind: str | None = None, **more: Any) -> Exported:
    """Export a model; `more` are fields of the request. A model without a tokenizer has none."""
    more = {"has_tokenizer": model.is_file() or (model / "tokenizer.json").exists()} | more
    return export_model(Request(model, str(model), out, target, kind, **more))


def fp32_logits(model: Path, ids: list[int] | None = None) -> np.ndarray:
    """Return the oracle's logits of all positions, without any rounding."""
    with Fp32Engine(model) as engine, engine.open_session() as session:
        return session.prefill(ids or engine.tokenizer.encode(TEXT), all_logits=True)


def greedy(model: Path, n: int = 24, **options: Any) -> str:
    with hybrid.load(model, threads=1, **options) as engine:
        return "".join(engine.generate(TEXT, max_tokens=n, temperature=0.0))


def read_with_gguf_package(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys, and the tensors as (name of the type, bytes) of each name."""
    gguf = pytest.importorskip("gguf", reason="gguf")
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: (tensor.tensor_type.name, np.array(tensor.data)) for tensor in reader.tensors
    }
    return keys, tensors


def values_of(kind: str, data: np.ndarray) -> np.ndarray:
    """Return float32 values as the `gguf` package dequantises them."""
    gguf = pytest.importorskip("gguf", reason="gguf")
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
