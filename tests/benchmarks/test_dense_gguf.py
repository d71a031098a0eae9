"""The GGUF file that the comparison gives to llama.cpp has the model's shape and one type."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny_models import write_model

from hybrid.checkpoint import open_checkpoint

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def dense_gguf() -> ModuleType:
    """The script, which is no module of a package."""
    path = Path(__file__).parent / "dense_gguf.py"
    spec = importlib.util.spec_from_file_location("dense_gguf", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("quant", ["q4", "q8", "bf16"])
def test_the_file_has_the_models_shape_and_one_type(tmp_path, dense_gguf, quant):
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


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["q4", "q8", "bf16"])
def test_llama_cpp_computes_with_the_file(tmp_path, dense_gguf, quant):
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama.cpp is not installed: pip install '.[peers]'")
    with open_checkpoint(write_model(tmp_path / "model", intermediate_size=192)) as checkpoint:
        config = checkpoint.config
    path = tmp_path / "dense.gguf"
    dense_gguf.write_dense_gguf(path, config, quant)
    code = (
        "import llama_cpp, numpy as np, sys\n"
        "model = llama_cpp.Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False)\n"
        "model.eval([5, 6, 7])\n"
        "logits = model.scores[:3]\n"
        "assert np.isfinite(logits).all() and logits.std() > 0\n"
        "print(logits.shape)\n"
    )
    command = [sys.executable, "-c", code, str(path)]  # a crash of it must not end the tests
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == -signal.SIGILL:
        pytest.skip("this build of llama.cpp has instructions that this CPU lacks")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str((3, config.vocab_size))
