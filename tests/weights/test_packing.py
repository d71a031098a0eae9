"""Weights are packed part by part: the same bytes whatever the parts are, and little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import TINY, random_tensors, write_model

from hybrid.checkpoint.hf import open_checkpoint
from hybrid.kernels import Format, _native
from hybrid.weights import memory, packing
from hybrid.weights.layout import PackedLayout, packed_layout
from hybrid.weights.packing import pack_model

# More rows than a part has; q, k and v end within parts; no number of rows is a whole tile.
SHAPE = {"vocab_size": 701, "intermediate_size": 602, "head_dim": 32, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), **SHAPE)


def write_as(folder: Path, dtype: str, **changes: object) -> Path:
    """Write a random model whose weights are stored as another type."""
    config = {key: value for key, value in (TINY | changes).items() if value is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: w.astype(dtype) for name, w in random_tensors(config).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def packed_bytes(folder: Path, layout: PackedLayout, orders=None, *, use_mmap=True) -> bytes:
    buffer = _native.allocate_bytes(layout.n_bytes)
    with open_checkpoint(folder, use_mmap=use_mmap) as checkpoint:
        pack_model(checkpoint, layout, buffer=buffer, neuron_orders=orders, n_threads=2)
    return buffer.tobytes()


def layout_of(folder: Path, format: Format) -> PackedLayout:
    """Return a layout that has rows of all kinds."""
    with open_checkpoint(folder) as checkpoint:
        return packed_layout(checkpoint.config, format, {1}, has_preview=True)


@pytest.mark.parametrize("is_ordered", [False, True])
def test_the_parts_do_not_change_a_byte(model, format, monkeypatch, is_ordered):
    layout = layout_of(model, format)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(602) for _ in range(2)] if is_ordered else None
    monkeypatch.setattr(packing, "PART_BYTES", 1 << 30)
    whole = packed_bytes(model, layout, orders)
    monkeypatch.setattr(packing, "PART_BYTES", 1)
    assert packed_bytes(model, layout, orders) == whole
    assert packed_bytes(model, layout, orders, use_mmap=False) == whole


@pytest.mark.parametrize("kind", ["float32", "float16", "transposed"])
def test_parts_are_read_from_every_kind_of_file(tmp_path, format, monkeypatch, kind):
    torch = pytest.importorskip("torch")
    write_as(tmp_path, "float32" if kind == "transposed" else kind, **SHAPE)
    if kind == "transposed":
        tensors = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        stored = {name: torch.from_numpy(w.T.copy()) for name, w in tensors.items()}
        stored = {name: w.T if w.ndim == 2 else w for name, w in stored.items()}
        torch.save(stored, tmp_path / "pytorch_model.bin")
    layout = layout_of(tmp_path, format)
    monkeypatch.setattr(packing, "PART_BYTES", 1 << 30)
    whole = packed_bytes(tmp_path, layout)
    monkeypatch.setattr(packing, "PART_BYTES", 1)
    assert packed_bytes(tmp_path, layout) == whole
    assert packed_bytes(tmp_path, layout, use_mmap=False) == whole


@pytest.mark.parametrize("is_ordered", [False, True])
def test_packing_holds_parts_of_the_weights_and_no_whole_matrix(tmp_path, monkeypatch, is_ordered):
    """NumPy reports what it allocates to tracemalloc, which the kernels' own memory does not."""
    changes = {"vocab_size": 8192, "hidden_size": 256, "num_attention_heads": 8}
    changes |= {"intermediate_size": 8192, "num_hidden_layers": 1}
    folder = write_as(tmp_path, "float16", **changes)
    monkeypatch.setattr(packing, "PART_BYTES", 1 << 18)
    orders = [np.random.default_rng(0).permutation(8192)] if is_ordered else None
    with open_checkpoint(folder) as checkpoint:
        layout = packed_layout(checkpoint.config, Format.q8)
        buffer = _native.allocate_bytes(layout.n_bytes)
        tracemalloc.start()
        try:
            pack_model(checkpoint, layout, buffer=buffer, neuron_orders=orders)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert 1 << 18 <= peak < 8 * (1 << 18)
    assert 4 * 8192 * 256 > 8 * (1 << 18)  # which one matrix would exceed


def test_what_is_packed_into_a_file_is_forced_to_the_disk_meanwhile(model, tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(memory, "sync", synced.append)
    monkeypatch.setattr(memory, "SYNC_BYTES", 100_000)
    monkeypatch.setattr(packing, "PART_BYTES", 1)
    layout = layout_of(model, Format.q8)
    path = tmp_path / "packed"
    with path.open("w+b") as file, open_checkpoint(model) as checkpoint:
        file.truncate(64 + layout.n_bytes)
        pack_model(checkpoint, layout, buffer=memory.MappedOutput(file, 64, layout.n_bytes))
    assert path.read_bytes()[64:] == packed_bytes(model, layout)
    assert layout.n_bytes // 200_000 <= len(synced) <= layout.n_bytes // 100_000
    synced.clear()
    data = np.frombuffer(path.read_bytes(), np.uint8)
    with path.open("w+b") as file:
        memory.write_in_parts(file, data)
    assert path.read_bytes() == data.tobytes()
    assert len(synced) == -(-data.size // 100_000)


LIMITED = """
import resource, sys
from pathlib import Path

import hybrid.public  # its memory is there already
from hybrid.checkpoint import open_checkpoint
from hybrid.kernels import Format
from hybrid.weights import packed_file
from hybrid.weights.layout import packed_layout

folder, use_mmap, extra = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
status = Path("/proc/self/status").read_text()
used = int(status.partition("VmData:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + extra, used + extra))
packed_file.KEEP_FROM_BYTES = 0
with open_checkpoint(Path(folder)) as checkpoint:
    layout = packed_layout(checkpoint.config, Format.q8)
    residence = packed_file.Residence(use_mmap)
    try:
        packed_file.load_packed(
            checkpoint, layout, cache=Path(folder) / "packed", residence=residence
        )
        print("packed")
    except hybrid.OutOfMemory as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts anonymous memory on Linux")
def test_a_model_is_packed_into_its_file_under_a_real_limit(tmp_path):
    """The largest matrix has 67 MB in fp32, and the packed model 18 MB."""
    changes = {"vocab_size": 65536, "hidden_size": 256, "num_attention_heads": 8}
    folder = write_as(tmp_path, "float16", num_hidden_layers=1, **changes)

    def load(use_mmap: bool, extra: int) -> str:
        arguments = [sys.executable, "-c", LIMITED, folder, str(use_mmap), str(extra)]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert result.stderr == ""
        return result.stdout

    assert "use quant q4" in load(False, 16 << 20)
    assert "too little memory to pack" in load(True, 2 << 20)
    assert load(True, 16 << 20) == "packed\n"
