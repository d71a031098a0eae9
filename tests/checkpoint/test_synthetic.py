"""Synthetic models follow their recipe in every format, their files are cached and survive damage,
and no one can take them for real models.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from slow import slow_except
from tiny_models import change_json

import hybrid
from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.synthetic import folder as synthetic
from hybrid.checkpoint.synthetic.weights import ACTIVE_FRACTION, BIAS_DIMS, firing_quantiles
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.hub.catalog import catalog, expected_active_fraction, resolve
from hybrid.kernels import Format
from hybrid.model.families import expected_tensors
from hybrid.text.tokenizer import Tokenizer

TINY = "synthetic:tiny"
IDS = np.random.default_rng(99).integers(0, 512, 512).astype(np.int32)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def tiny(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A synthetic model's folder, calibrated once for all tests that do not change it."""
    monkeypatch.setenv("HYBRID_HOME", str(shared_home))
    return resolve(TINY)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that a test may damage."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "fresh"))
    return resolve(TINY)


def bias_file(folder: Path, format: Format = Format.q8) -> Path:
    return folder / f"gate_bias.{format.name}.safetensors"


def test_a_tokenizer_of_an_earlier_version_is_made_anew(fresh):
    path = fresh / "tokenizer.json"
    made = path.read_bytes()
    earlier = json.loads(made) | {"post_processor": None}
    for content in (json.dumps(earlier).encode(), b"{", b""):
        path.write_bytes(content)
        assert resolve(TINY) == fresh
        assert path.read_bytes() == made
    before = {path.name: path.stat().st_mtime_ns for path in fresh.iterdir()}
    assert resolve(TINY) == fresh
    assert {path.name: path.stat().st_mtime_ns for path in fresh.iterdir()} == before


def calibrations(folder: Path, format: Format | None = Format.q8) -> list[tuple[str, int, int]]:
    """Open the folder and return its progress calls: none if it is calibrated already."""
    calls: list[tuple[str, int, int]] = []
    open_checkpoint(folder, format, lambda *call: calls.append(call)).close()
    return calls


# The recipe


@pytest.mark.parametrize("quant", ["bf16", "q8", "q4"])
@pytest.mark.slow
def test_the_active_fraction_is_that_of_the_recipe_on_other_tokens(tiny, quant):
    with hybrid.load(TINY, quant=quant, threads=2) as engine:
        session = engine.open_session()
        session.prefill(IDS)
        active = np.array(session.active_counts) / (len(IDS) * engine.config.n_neurons)
        assert active.mean() == pytest.approx(ACTIVE_FRACTION, abs=0.01)
        assert np.abs(active - ACTIVE_FRACTION).max() < 0.02  # in every layer
        (notice,) = engine.notices
    assert "random weights" in notice
    assert "noise" in notice
    assert "12." in notice
    assert "\n" not in notice


def test_neurons_fire_as_often_as_the_recipe_says(tiny):
    with open_checkpoint(tiny, Format.bf16) as checkpoint:
        weights = read_weights(checkpoint, Format.bf16)
        active = []
        for ids in IDS.reshape(-1, 64):
            session = ReferenceSession(weights, checkpoint.config, Format.bf16)
            session.prefill(ids)
            active.append(session.active)
    frequencies = np.sort(np.mean(active, (0, 2)), -1)[:, ::-1]  # (layers, neurons), falling
    share = frequencies[:, : frequencies.shape[1] // 5].sum(-1) / frequencies.sum(-1)
    assert share.min() > 0.5
    wanted = firing_quantiles(frequencies.shape[1])
    for layer, frequency in enumerate(frequencies):
        assert np.mean(frequency < 0.01) > 0.15, layer  # the long cold tail
        assert np.mean(frequency > 0.5) == pytest.approx(np.mean(wanted > 0), abs=0.02)


def test_the_constant_dimensions_stay_constant(tiny, format):
    class Watching(ReferenceSession):
        def attend(self, x, *args):
            residuals.append(x)
            return super().attend(x, *args)

        def ffn(self, x, *args):
            residuals.append(x)
            return super().ffn(x, *args)

        def head(self, x, *args):
            residuals.append(x)
            return super().head(x, *args)

    residuals: list[np.ndarray] = []
    with open_checkpoint(tiny, format) as checkpoint:
        weights = read_weights(checkpoint, format)
        Watching(weights, checkpoint.config, format).prefill(IDS[:50])
        assert len(residuals) == 2 * checkpoint.config.n_layers + 1
    constant = residuals[0][0, 0]
    assert constant == pytest.approx(1, abs=0.01)
    for x in residuals:
        assert (x[:, :BIAS_DIMS] == constant).all()
        assert 0.8 < x[:, BIAS_DIMS:].std() < 1.5


def test_the_gate_is_a_bias_a_planted_rank_and_noise(tiny):
    with open_checkpoint(tiny) as checkpoint:
        gate = checkpoint.read("gate", 1)
    assert (gate[:, :BIAS_DIMS] == gate[:, :1]).all()
    power = np.square(np.linalg.svd(gate[:, BIAS_DIMS:], compute_uv=False))
    assert power[:64].sum() / power.sum() > 1 / 1.09  # the signal, and a little of the noise


def test_tensors_have_the_shapes_of_the_config_and_are_bf16_values(tiny):
    with open_checkpoint(tiny) as checkpoint:
        for role, layer, _, shape in expected_tensors(checkpoint.config):
            w = checkpoint.read(role, layer)
            assert w.shape == shape
            assert w.dtype == np.float32
            assert not (w.view(np.uint32) & 0xFFFF).any()
        assert np.array_equal(checkpoint.read("head"), checkpoint.read("embedding"))
        with pytest.raises(hybrid.InvalidOption, match="role"):
            checkpoint.read("bias")
    with pytest.raises(hybrid.EngineClosed):
        checkpoint.read("norm")


def test_a_synthetic_model_may_have_any_hidden_size(fresh, monkeypatch, format):
    """The shape of the folder changes, but not the recipe."""
    shape = {"hidden_size": 100, "num_attention_heads": 5, "num_key_value_heads": 1}
    change_json(fresh / "config.json", **shape, num_hidden_layers=2)
    with hybrid.load(fresh, quant=format.name) as engine:
        session = engine.open_session()
        session.prefill(IDS[:128])
        fraction = sum(session.active_counts) / (128 * 2 * engine.config.n_neurons)
    assert fraction == pytest.approx(ACTIVE_FRACTION, abs=0.02)


def test_tensors_are_not_correlated(tiny):
    with open_checkpoint(tiny) as checkpoint:
        names = [("up", 0), ("up", 1), ("gate", 0), ("gate", 1)]
        parts = [checkpoint.read(*name)[:, BIAS_DIMS:].ravel() for name in names]
    correlation = np.corrcoef(parts) - np.eye(len(parts))
    assert np.abs(correlation).max() < 0.02


# Files


def test_two_homes_hold_the_same_model(tiny, fresh):
    assert fresh != tiny
    calibrations(fresh)
    calibrations(tiny)
    names = sorted(path.name for path in fresh.iterdir())
    assert names == [
        *("config.json", "gate_bias.q8.safetensors", "generation_config.json"),
        *("synthetic.json", "tokenizer.json"),
    ]
    for name in names:
        assert (fresh / name).read_bytes() == (tiny / name).read_bytes(), name
    with open_checkpoint(fresh, Format.q8) as one, open_checkpoint(tiny, Format.q8) as other:
        for role in ("embedding", "gate", "down"):
            layer = None if role == "embedding" else 3
            assert np.array_equal(one.read(role, layer), other.read(role, layer))


def test_calibration_happens_once_per_format_and_reports_its_progress(fresh):
    calls = calibrations(fresh)
    total = calls[0][2]
    assert [call[1] for call in calls] == [total * part // 4 for part in range(5)]
    assert {(task, size) for task, _, size in calls} == {(f"calibrating {TINY} for q8", total)}
    assert not calibrations(fresh)
    assert calibrations(fresh, None)
    assert not calibrations(fresh, Format.bf16)  # None means bf16


def damage_bias(damage: str, path: Path) -> None:
    content = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        bias = load_file(path)["gate_bias"]
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        if damage == "another recipe":
            values = json.loads(metadata["calibration"]) | {"recipe": 2}
            metadata = {"calibration": json.dumps(values)}
        elif damage == "no metadata":
            metadata = None
        elif damage == "metadata of another kind":
            metadata = {"calibration": "[1]"}
        elif damage == "another shape":
            bias = bias[:2]
        else:
            bias[1, 1] = np.inf
        save_file({"gate_bias": bias}, path, metadata)


@pytest.mark.parametrize(
    "damage",
    slow_except(
        ["cut off", "empty", "another recipe", "no metadata", "metadata of another kind"]
        + ["another shape", "infinite"],
        "cut off",
        "infinite",
    ),
)
def test_a_broken_bias_file_is_made_anew(fresh, damage):
    calibrations(fresh)
    before = bias_file(fresh).read_bytes()
    damage_bias(damage, bias_file(fresh))
    assert bias_file(fresh).read_bytes() != before
    assert calibrations(fresh)
    assert bias_file(fresh).read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff", b'{"recipe": 2, "name": "tiny", "seed": 1}', b'{"recipe": 1}']
    + [b'{"recipe": 1, "name": "tiny", "seed": -1}'],
)
def test_a_broken_synthetic_json_is_refused(fresh, content):
    (fresh / "synthetic.json").write_bytes(content)
    with pytest.raises(hybrid.InvalidCheckpoint, match=r"synthetic\.json"):
        open_checkpoint(fresh)
    with pytest.raises(hybrid.InvalidCheckpoint, match=r"synthetic\.json"):
        hybrid.load(TINY)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "synthetic.json"])
def test_a_file_that_is_missing_is_made_again(fresh, name):
    content = (fresh / name).read_bytes()
    (fresh / name).unlink()
    assert resolve(TINY) == fresh
    assert (fresh / name).read_bytes() == content


def test_a_config_that_is_not_a_model_is_refused(fresh):
    (fresh / "config.json").write_text(json.dumps({"architectures": ["MiniCPMForCausalLM"]}))
    with pytest.raises(hybrid.InvalidCheckpoint, match=r"config\.json"):
        open_checkpoint(fresh)


def test_a_home_that_cannot_be_made_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "file"))
    with pytest.raises(hybrid.ModelNotFound, match="HYBRID_HOME"):
        resolve(TINY)


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(fresh, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(fresh.iterdir())
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(hybrid.ModelNotFound, match=r"No space left.*HYBRID_HOME"):
        open_checkpoint(fresh, Format.q8)
    assert sorted(fresh.iterdir()) == before


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_that_cannot_be_written_is_reported_before_calibration(fresh):
    fresh.chmod(0o500)
    calls: list[tuple[str, int, int]] = []
    try:
        with pytest.raises(hybrid.ModelNotFound, match="HYBRID_HOME"):
            open_checkpoint(fresh, Format.q8, lambda *call: calls.append(call))
    finally:
        fresh.chmod(0o700)
    assert not calls


@pytest.mark.slow
def test_threads_that_make_the_same_model_at_once_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    notices: list[tuple[str, ...]] = []

    def make() -> None:
        with open_checkpoint(resolve(TINY), Format.q8) as checkpoint:
            notices.append(checkpoint.notices)

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(notices) == 3
    assert len(set(notices)) == 1
    assert not list(tmp_path.rglob("*.tmp"))


# Names


def test_names_are_known_in_any_case(tiny):
    assert resolve("Synthetic:TINY") == tiny
    assert tiny.name == "tiny-v1"


@pytest.mark.parametrize("name", ["synthetic:", "synthetic:MiniCPM", "synthetic:../tiny"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(hybrid.ModelNotFound, match=r"synthetic:MiniCPM-S-1B, synthetic:tiny"):
        resolve(name)
    assert expected_active_fraction(name) is None


def test_the_1b_has_the_published_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))
    folder = resolve("synthetic:minicpm-s-1b")
    assert folder == tmp_path / "synthetic" / "MiniCPM-S-1B-v1"
    config = synthetic.read_config(folder)
    sizes = [np.prod(shape) for _, _, _, shape in expected_tensors(config)]
    assert sum(sizes) == 1_360_246_272
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 << 20  # no weights
    tokenizer = Tokenizer.from_folder(folder, vocab_size=config.vocab_size, bos_id=config.bos_id)
    assert not tokenizer.has_chat_template
    assert (tokenizer.bos, tokenizer.notices) == ((1,), ())
    assert tokenizer.decode(tokenizer.encode("naïve text, 你好")) == "naïve text, 你好"
    assert tokenizer.decode([73439]) == "w73439"


def test_the_expected_active_fraction_is_known_by_name_and_folder(tiny, tmp_path):
    assert expected_active_fraction("Synthetic:MiniCPM-S-1B") == 0.1211
    assert expected_active_fraction(TINY) == expected_active_fraction(tiny) == 0.1211
    assert expected_active_fraction(str(tiny)) == 0.1211
    for entry in catalog():
        assert expected_active_fraction(entry.name) == entry.expected_active_fraction
    for model in (tmp_path, "no such model", "n" * 5000):
        assert expected_active_fraction(model) is None


def test_a_real_model_has_no_notice():
    with contextlib.closing(open_checkpoint(resolve("stories"))) as checkpoint:
        assert checkpoint.notices == ()
