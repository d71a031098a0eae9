"""The predictors in files of PowerInfer and Kairox name the neurons that those engines would.

The files are written byte by byte here, from the description of the formats.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import fp32, gguf_name, permuted, vocabulary_of
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tiny_models import LLAMA, STORIES, write_model

import hybrid
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.errors import InvalidArtifact, InvalidCheckpoint, InvalidOption, UnsupportedModel
from hybrid.kernels import Format, reference

RANKS, N_LAYERS, HIDDEN, N_NEURONS = (40, 24), 2, 64, 160
TEXT = "Once upon a time there was a cat who sat on a mat"
VOCABULARY = vocabulary_of(json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8")))


def text_bytes(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value_bytes(value: Any) -> bytes:
    """A value of the metadata: its type, then itself."""
    match value:
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text_bytes(value)
    items = [value_bytes(item) for item in value]
    return (
        struct.pack("<I", 9)
        + items[0][:4]
        + struct.pack("<Q", len(items))
        + b"".join(item[4:] for item in items)
    )


def file_bytes(magic: bytes, keys: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> bytes:
    """A GGUF file of version 3; tensors are F32, F16 or I32."""
    numbers = {"float32": 0, "float16": 1, "int32": 26}
    head = magic + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(text_bytes(key) + value_bytes(value) for key, value in keys.items())
    data = b""
    for name, array in tensors.items():
        head += text_bytes(name) + struct.pack("<I", array.ndim)
        head += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        head += struct.pack("<IQ", numbers[array.dtype.name], len(data))
        data += array.tobytes() + b"\0" * (-array.nbytes % 32)
    return head + b"\0" * (-len(head) % 32) + data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": HIDDEN, "intermediate_size": N_NEURONS, "head_dim": 16}
    return write_model(
        tmp_path_factory.mktemp("sparse") / "model",
        vocab_size=4096,
        **LLAMA | shape | {"num_attention_heads": 4, "hidden_act": "relu"},
    )


def predictors(maker: str) -> dict[str, NDArray[Any]]:
    """Random matrices with the names of PowerInfer or of Kairox, whose have biases."""
    draw, found = np.random.default_rng(5), {}
    names = ("fc1", "fc2") if maker == "PowerInfer" else ("ffn_pred_up", "ffn_pred_down")
    for layer, rank in enumerate(RANKS):
        for name, shape in zip(names, ((rank, HIDDEN), (N_NEURONS, rank)), strict=True):
            matrix = draw.standard_normal(shape).astype(np.float16)
            found[f"blk.{layer}.{name}.weight"] = matrix
            if maker == "Kairox":
                bias = 3 * draw.standard_normal(shape[0])
                found[f"blk.{layer}.{name}.bias"] = bias.astype(np.float32)
    return found


def write(path: Path, folder: Path, maker: str, **keys: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    name = "llama" if maker == "PowerInfer" else "prosparse-llama"
    metadata: dict[str, Any] = {
        "general.architecture": name,
        f"{name}.embedding_length": HIDDEN,
        f"{name}.block_count": N_LAYERS,
        f"{name}.feed_forward_length": N_NEURONS,
        f"{name}.attention.head_count": config["num_attention_heads"],
        f"{name}.attention.head_count_kv": config["num_key_value_heads"],
        f"{name}.attention.key_length": config["head_dim"],
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{name}.rope.freq_base": float(config.get("rope_theta", 10000.0)),
    }
    metadata |= VOCABULARY | keys
    tensors: dict[str, NDArray[Any]] = {}
    for key, w in load_file(folder / "model.safetensors").items():
        w, stored = fp32(w), gguf_name(key)
        if "q_proj" in key:
            w = permuted(w, config["num_attention_heads"])
        if "k_proj" in key:
            w = permuted(w, config["num_key_value_heads"])
        if "ffn_down" in stored:
            w, stored = np.ascontiguousarray(w.T), stored.replace("ffn_down", "ffn_down_t")
        tensors[stored] = w
    tensors |= predictors(maker)
    path.write_bytes(file_bytes(b"PWRI" if maker == "PowerInfer" else b"GGUF", metadata, tensors))
    return path


class WithPredictors(ReferenceSession):
    """The oracle in fp32, in which only named neurons fire."""

    maker, threshold = "", 0.0
    n_named = 0

    def ffn(self, x: Any, weights: Any, layer: int, scale: float) -> Any:
        parts = predictors(self.maker)
        h = reference.rms_norm(x, weights.ffn_norm, self.config.rms_norm_eps)
        if self.maker == "PowerInfer":
            first, second = (parts[f"blk.{layer}.{name}.weight"] for name in ("fc1", "fc2"))
            score = np.maximum(x @ first.T.astype(np.float32), 0) @ second.T.astype(np.float32)
            named = score >= self.threshold
        else:
            before = h if layer == 0 else self.before
            up, up_bias, down, down_bias = (
                parts[f"blk.{layer}.ffn_pred_{name}"].astype(np.float32)
                for name in ("up.weight", "up.bias", "down.weight", "down.bias")
            )
            score = np.maximum(before @ up.T + up_bias, 0) @ down.T + down_bias
            with np.errstate(over="ignore"):
                named = 1 / (1 + np.exp(-score)) >= 0.5
            self.before = h
        self.n_named += int(named.sum())
        gate = h @ weights.gate.T
        fires = gate > 0 if self.config.activation == "relu" else gate >= self.config.threshold
        self.active.append(fires & named)
        y = np.where(fires & named, gate, 0) * (h @ weights.up.T) @ weights.down
        return x + np.float32(scale) * y


@pytest.mark.parametrize("maker", ["PowerInfer", "Kairox"])
@pytest.mark.parametrize("quant", ["bf16", "q8"])
def test_a_files_predictors_name_what_their_engine_names(
    tmp_path: Path, folder: Path, isa: str, maker: str, quant: Any
) -> None:
    keys = {"powerinfer.sparse_threshold": 1.5} if maker == "PowerInfer" else {}
    path = write(tmp_path / "model.gguf", folder, maker, **keys)
    with open_checkpoint(path) as checkpoint:
        weights = read_weights(checkpoint, Format[quant])
        oracle = WithPredictors(weights, checkpoint.config)
        plain = ReferenceSession(weights, checkpoint.config)
    oracle.maker, oracle.threshold = maker, 1.5
    with hybrid.load(path, quant=quant, predictor="own", threads=2) as engine:
        assert engine.prediction is not None
        assert engine.prediction.kinds == ("mlp40", "mlp24")
        ids = engine.tokenizer.encode(TEXT)
        with engine.open_session() as session:
            session.prefill(ids)
            logits = session.logits.copy()
        with engine.open_session() as session:
            masks = session.observe(ids).masks
        with engine.open_session() as session:
            for token in ids:
                session.decode(token)
            np.testing.assert_array_equal(session.logits, logits)  # prefill equals decode
            named = sum(session.predicted_counts)
            n_active = sum(session.active_counts)
            assert sum(session.decode_bytes.values()) == engine.expected_decode_bytes(
                n_tokens=len(ids), first_position=0, n_active=n_active, n_gates=named
            )
    expected, exact = oracle.prefill(ids)[-1], plain.prefill(ids)[-1]
    # Rounding may move scores near the threshold, so a few neurons may differ.
    assert abs(named - oracle.n_named) <= 0.02 * len(ids) * N_LAYERS * N_NEURONS
    assert 0.1 < oracle.n_named / (len(ids) * N_LAYERS * N_NEURONS) < 0.9
    active = np.unpackbits(masks, axis=-1, bitorder="little")[..., :N_NEURONS].astype(bool)
    is_wrong = active != np.stack(oracle.active)
    assert is_wrong.sum() < 0.06 * active.sum()
    error = np.abs(logits - expected).mean()
    assert error < 0.35 * np.abs(exact - expected).mean()


def test_exact_and_own_are_both_there_and_said(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "model.gguf", folder, "PowerInfer")
    (tmp_path / "model.gguf.generated.gpuidx").write_bytes(b"x")
    with hybrid.load(path, quant="bf16") as engine:
        assert engine.prediction is None
        assert any("--predictor own uses them" in line for line in engine.notices)
        assert any("gpuidx is not used" in line for line in engine.notices)
    with pytest.raises(InvalidOption, match="brings no predictors"):
        hybrid.load(folder, predictor="own")
    with pytest.raises(InvalidOption, match="nothing to predict"):
        hybrid.load(path, predictor="own", activation="silu")
    with pytest.raises(InvalidOption, match="predictor own is for the CPU"):
        hybrid.LoadOptions(predictor="own", device="cuda")


def test_counts_of_powerinfer_order_the_neurons_and_the_predictors_rows(
    tmp_path: Path, folder: Path
) -> None:
    torch = pytest.importorskip("torch", reason="torch")
    path, counts = write(tmp_path / "model.gguf", folder, "Kairox"), tmp_path / "activation"
    counts.mkdir()
    draw, dtypes = np.random.default_rng(1), (torch.int64, torch.float32)
    expected = [draw.permutation(N_NEURONS) for _ in range(N_LAYERS)]
    for layer, (numbers, dtype) in enumerate(zip(expected, dtypes, strict=True)):
        torch.save(torch.tensor(numbers, dtype=dtype), counts / f"activation_{layer}.pt")
    found = []
    for profile in ("none", counts):
        options: dict[str, Any] = {"profile": profile, "predictor": "own", "quant": "bf16"}
        with hybrid.load(path, **options) as engine, engine.open_session() as session:
            session.prefill(engine.tokenizer.encode(TEXT))
            found.append((session.predicted_counts, session.logits.copy()))
            orders = engine.neuron_orders
            notices = list(engine.notices)
    assert orders is not None
    for order, numbers in zip(orders, expected, strict=True):
        np.testing.assert_array_equal(numbers[order], np.arange(N_NEURONS)[::-1])
    assert any("its counts order the neurons" in line for line in notices)
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=0.02)
    torch.save(torch.ones(3), counts / "activation_1.pt")
    with pytest.raises(InvalidArtifact, match="has counts of shape"):
        hybrid.load(path, profile=counts)
    torch.save({"a": torch.ones(N_NEURONS)}, counts / "activation_1.pt")
    with pytest.raises(InvalidArtifact, match="expected one tensor and nothing else"):
        hybrid.load(path, profile=counts)
    (counts / "activation_1.pt").unlink()
    with pytest.raises(InvalidArtifact, match=r"expected activation_0\.pt to activation_1\.pt"):
        hybrid.load(path, profile=counts)


def test_a_file_of_groups_is_no_model(tmp_path: Path, folder: Path) -> None:
    order = {f"blk.{at}.ffn_reorder_perms": np.arange(N_NEURONS, dtype=np.int32) for at in (0, 1)}
    path = tmp_path / "groups.gguf"
    path.write_bytes(file_bytes(b"GGUF", {"ffn_group_size": 16}, order))
    with pytest.raises(UnsupportedModel, match="holds no model"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("blk.1.fc2.weight"), "none for layer 1"),
        (
            lambda parts: parts.update({"blk.0.fc2.weight": np.ones((N_NEURONS, 8), np.float32)}),
            "'blk.0.fc2.weight' has shape",
        ),
        (
            lambda parts: parts.update({"blk.2.fc1.weight": np.ones((8, HIDDEN), np.float32)}),
            "a predictor of layer 2",
        ),
    ],
)
def test_broken_predictors_are_named(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    parts = predictors("PowerInfer")
    change(parts)
    monkeypatch.setitem(globals(), "predictors", lambda maker: parts)
    path = write(tmp_path / "model.gguf", folder, "PowerInfer")
    with pytest.raises(InvalidCheckpoint, match=message):
        open_checkpoint(path)


def test_a_threshold_must_be_a_number(tmp_path: Path, folder: Path) -> None:
    keys = {"powerinfer.sparse_threshold": float("nan")}
    path = write(tmp_path / "model.gguf", folder, "PowerInfer", **keys)
    with pytest.raises(InvalidCheckpoint, match="expected a finite number"):
        open_checkpoint(path)
