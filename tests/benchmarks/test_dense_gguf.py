"""The GGUF file that the comparison gives to llama.cpp has the model's shape and one type."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_model

from hybrid.checkpoint import open_checkpoint

TOOL = Path(__file__).parent / "dense_gguf.py"
gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("quant", ["q4", "q8", "bf16"])
def test_the_file_has_the_models_shape_and_one_type(tmp_path, quant):
    spec = importlib.util.spec_from_file_location("dense_gguf", TOOL)
    assert spec is not None
    assert spec.loader is not None
    dense_gguf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dense_gguf)
    with open_checkpoint(write_model(tmp_path / "model", intermediate_size=192)) as checkpoint:
        config = checkpoint.config
    path = tmp_path / "dense.gguf"
    dense_gguf.write_dense_gguf(path, config, quant)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["dense.gguf"]

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    n_bytes = 0
    for name, n_rows, n_cols in dense_gguf.matrix_shapes(config):
        tensor = tensors.pop(f"{name}.weight")
        assert tensor.shape.tolist() == [n_cols, n_rows]
        assert tensor.tensor_type == dense_gguf.TYPES[quant]
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.std(weights) == pytest.approx(n_cols**-0.5, rel=0.1)
        n_bytes += tensor.n_bytes
    assert n_bytes == dense_gguf.bytes_per_token(config, quant)
    assert all(name.endswith("norm.weight") for name in tensors)
