"""hybrid.selfcheck passes sound models on every instruction set, and finds every fault by the check
that is meant for it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from slow import slow_except
from tiny_models import ODD_SHAPES, STORIES, change_json, write_model

import hybrid
from hybrid import kernels, selfcheck
from hybrid.checking import Check, check_model, model, setting
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.cpu import executor as cpu_executor
from hybrid.engine.oracle import comparison
from hybrid.engine.oracle.executor import (
    ReferenceSession,
    SideBySide,
    read_weights,
    stream_weights,
)
from hybrid.hub.catalog import CatalogEntry, catalog
from hybrid.kernels import Format


def checks_of(folder: Path | str, **options: Any) -> dict[str, Check]:
    return {check.name: check for check in check_model(folder, **options)}


def copy_stories(folder: Path, **changes: Any) -> Path:
    """Copy the bundled model to `folder`, with `changes` in its config.json."""
    shutil.copytree(STORIES, folder)
    change_json(folder / "config.json", **changes)
    return folder


def expect_active(monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    """Replace the catalog by one model "known" with this published active fraction."""
    entry = CatalogEntry("known", "someone/known", "a model with a published sparsity", fraction)
    monkeypatch.setattr(model, "catalog", lambda: (entry,))


@pytest.mark.parametrize("quant", slow_except(["bf16", "f16", "q8", "q4"], "q8"))
def test_the_bundled_model_passes_every_check(isa, quant):
    checks = checks_of("stories", quant=quant, threads=2)
    verdicts = {name: check.verdict for name, check in checks.items()}
    verdicts.pop("instruction set")  # capped if isa is not the best
    verdicts.pop("threads")  # the machine may have one core
    assert set(verdicts.values()) == {"ok"}, checks
    assert checks["oracle"].figures["positions"] == 64


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"hidden_act": "relu", "hidden_act_param": None, "num_hidden_layers": 6},
            marks=pytest.mark.slow,
        ),
        {"hidden_act": "silu", "hidden_act_param": None},
        pytest.param({"hidden_act_param": 0.5, "num_hidden_layers": 12}, marks=pytest.mark.slow),
        {"tie_word_embeddings": False, "head_dim": 32},
        ODD_SHAPES["hidden 100"],
    ],
    ids=["fatrelu", "relu", "silu", "a high threshold", "untied", "hidden 100"],
)
def test_random_models_agree_with_the_oracle(tmp_path, format, changes):
    folder = write_model(tmp_path, vocab_size=4096, **changes)
    checks = checks_of(folder, quant=format.name, threads=2)
    for name in ("prefill = decode", "2 = 1 threads", "active neurons", "oracle"):
        assert checks[name].verdict == "ok", checks[name]
    assert checks["text"].verdict == "warning"  # random weights predict nothing
    if changes.get("hidden_act") == "silu":
        assert "none is skipped" in checks["active neurons"].message


def test_tensors_that_are_not_used_are_named(tmp_path):
    assert checks_of("stories")["tensors"].verdict == "ok"
    folder = write_model(tmp_path, vocab_size=4096)
    tensors = load_file(folder / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {bias: np.ones(4, np.float32)}, folder / "model.safetensors")
    checks = checks_of(folder)
    check = checks["tensors"]
    assert (check.verdict, check.figures) == ("warning", {"unused": 1})
    assert bias in check.message
    assert bias not in checks["weights"].message  # once is enough
    assert "config.json may be of another model" in check.advice


def test_streamed_weights_give_the_same_logits(tmp_path, format):
    folder = write_model(tmp_path, num_hidden_layers=3, tie_word_embeddings=False)
    ids = np.random.default_rng(0).integers(0, 320, 20).tolist()
    told: list[tuple[int, int]] = []
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
        weights = read_weights(checkpoint, format)
        streamed = stream_weights(
            checkpoint, format, progress=lambda task, done, total: told.append((done, total))
        )
        sessions = [ReferenceSession(streamed, config, f) for f in (format, None)]
        logits = SideBySide(sessions).prefill(ids, streamed, config)
        layer_bytes = told[0][0]
        assert told == [(n * layer_bytes, 3 * layer_bytes) for n in (1, 2, 3)]
        for session, own in zip(sessions, logits, strict=True):
            alone = ReferenceSession(weights, config, session.format)
            np.testing.assert_array_equal(own, alone.prefill(ids))
            np.testing.assert_array_equal(session.active, alone.active)
            assert session.position == 20


@pytest.mark.parametrize("quant", slow_except(["bf16", "f16", "q8", "q4"], "q8"))
@pytest.mark.parametrize(
    "recorded", [{"threshold": 0.15}, {"threshold": 0.25}, {"activation": "relu"}]
)
def test_an_activation_that_differs_from_the_oracles_is_found(monkeypatch, quant, recorded):
    init = cpu_executor.ProgramRecorder.__init__

    def record_another(self, program, config, predictors):
        init(self, program, replace(config, **recorded), predictors)

    monkeypatch.setattr(cpu_executor.ProgramRecorder, "__init__", record_another)
    checks = checks_of("stories", quant=quant)
    assert checks["oracle"].verdict == "failed"
    assert "HYBRID_ISA=scalar" in checks["oracle"].advice
    assert checks["text"].verdict == "ok"  # this check alone would not have found it


@pytest.mark.parametrize("scale", ["embedding_scale", "residual_scale", "logit_scale"])
def test_a_scale_that_differs_from_the_oracles_is_found(monkeypatch, scale):
    forward = cpu_executor.forward

    def record_another(recorder, weights, config):
        forward(recorder, weights, replace(config, **{scale: 1.05 * getattr(config, scale)}))

    monkeypatch.setattr(cpu_executor, "forward", record_another)
    assert checks_of("stories")["oracle"].verdict == "failed"


def swap_layers(header: dict[str, Any], data: memoryview) -> None:
    for name in [name for name in header if ".layers.2." in name]:
        other = name.replace(".layers.2.", ".layers.3.")
        header[name], header[other] = header[other], header[name]


def zero_up(header: dict[str, Any], data: memoryview) -> None:
    first, end = header["model.layers.2.mlp.up_proj.weight"]["data_offsets"]
    data[first:end] = bytes(end - first)


@pytest.mark.parametrize("damage", [swap_layers, zero_up])
def test_weights_that_are_wrong_for_engine_and_oracle_alike_are_found(
    tmp_path, monkeypatch, damage
):
    folder = copy_stories(tmp_path / "copy")
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    damage(header, memoryview(raw)[8 + n :])
    raw[8 : 8 + n] = json.dumps(header, separators=(",", ":")).encode().ljust(n)
    path.write_bytes(raw)
    [stories] = [entry for entry in catalog() if entry.name == "stories"]
    monkeypatch.setattr(model, "find_entry", lambda *_: stories)
    checks = checks_of(folder)
    assert checks["oracle"].verdict == "ok"  # it reads the same weights
    assert checks["text"].verdict == "failed"


def test_one_wrong_position_is_found(monkeypatch):
    run_native = comparison.run_native

    def spoiled(engine, ids):
        run, at_once = run_native(engine, ids)
        for logits in (run.logits, at_once):
            logits[40] = logits[39]
        return run, at_once

    monkeypatch.setattr(comparison, "run_native", spoiled)
    oracle = checks_of("stories")["oracle"]
    assert oracle.verdict == "failed"
    assert oracle.figures["worst_position"] == 40


def test_logits_that_depend_on_threads_or_on_prefill_are_found(monkeypatch):
    run_native = comparison.run_native

    def spoiled(engine, ids):
        run, at_once = run_native(engine, ids)
        at_once[-1, -1] = np.nextafter(at_once[-1, -1], np.float32(np.inf))
        return run, at_once

    monkeypatch.setattr(comparison, "run_native", spoiled)
    checks = checks_of("stories", threads=1)
    assert checks["prefill = decode"].verdict == "failed"
    assert checks["1 = 2 threads"].verdict == "failed"
    assert checks["oracle"].verdict == "ok"


@pytest.mark.parametrize(
    ("changes", "found_by"),
    [
        ({"scale_depth": 2.45}, "active neurons"),
        pytest.param({"scale_emb": 1.0}, "active neurons", marks=pytest.mark.slow),
        pytest.param({"scale_emb": 6.0}, "text", marks=pytest.mark.slow),
        pytest.param({"scale_depth": 14.0}, "text", marks=pytest.mark.slow),
        pytest.param({"dim_model_base": 256}, "text", marks=pytest.mark.slow),
        ({"dim_model_base": 16}, "text"),
        ({"hidden_act_param": 0.005}, "active neurons"),
        pytest.param(
            {"hidden_act": "relu", "hidden_act_param": None},
            "active neurons",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"hidden_act": "silu", "hidden_act_param": None},
            "active neurons",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_wrong_config_is_found_though_the_oracle_reads_it_too(
    tmp_path, monkeypatch, changes, found_by
):
    with hybrid.load("stories") as engine:
        ids = model.text_ids(engine)
        run, _ = comparison.run_native(engine, ids)
        active = run.active.sum() / (run.active.size * engine.config.n_neurons)
    expect_active(monkeypatch, float(active))
    assert checks_of(copy_stories(tmp_path / "sound" / "known"))["active neurons"].verdict == "ok"
    checks = checks_of(copy_stories(tmp_path / "known", **changes))
    assert checks["oracle"].verdict == "ok"
    assert checks[found_by].verdict == "failed"
    assert checks[found_by].advice


def test_a_poor_text_fails_known_models_and_warns_of_others(tmp_path):
    changes = {"dim_model_base": 256}
    assert checks_of(copy_stories(tmp_path / "mine", **changes))["text"].verdict == "warning"
    copy = copy_stories(tmp_path / "MiniCPM-1B-sft-bf16", **changes)
    assert checks_of(copy)["text"].verdict == "failed"


def test_a_minicpm_without_scales_gives_a_warning(tmp_path):
    folder = copy_stories(tmp_path / "model", scale_emb=1)
    assert checks_of(folder)["architecture"].verdict == "warning"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    folder = write_model(tmp_path, vocab_size=4096)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 5] = value
    save_file(tensors, folder / "model.safetensors")
    *_, last = check_model(folder)
    assert (last.name, last.verdict) == ("weights", "failed")
    assert "not finite" in last.message


def test_an_oracle_that_overflows_is_reported(tmp_path):
    folder = copy_stories(tmp_path / "model", scale_emb=1e38)
    checks = checks_of(folder)
    assert checks["oracle"].verdict == "failed"
    assert "no usable logits" in checks["oracle"].message


def hub_copy(cache: Path, name: str) -> Path:
    """Lay out the bundled model as in huggingface_hub's cache; returns the snapshot's folder."""
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / name
    snapshot.mkdir(parents=True)
    for file in filter(Path.is_file, STORIES.iterdir()):
        data = file.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        (cache / "blobs" / etag).write_bytes(data)
        (snapshot / file.name).symlink_to(f"../../blobs/{etag}")
    return snapshot


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_checksums_in_the_hubs_cache_are_checked(tmp_path):
    folder = hub_copy(tmp_path, "c0ffee")
    check = setting.check_files(folder)
    assert (check.verdict, check.figures["checked"]) == (
        "ok",
        sum(map(Path.is_file, STORIES.iterdir())),
    )
    flip_a_bit(folder / "model.safetensors")
    check = setting.check_files(folder)
    assert check.verdict == "failed"
    assert "model.safetensors" in check.message
    assert str((folder / "model.safetensors").resolve()) in check.advice
    assert (folder / "model.safetensors").exists()  # what to do is the user's decision


def test_checksums_of_a_downloaded_folder_are_checked(tmp_path):
    folder = copy_stories(tmp_path / "model")
    assert "none was checked" in setting.check_files(folder).message
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    etag = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (notes / "model.safetensors.metadata").write_text(f"{'c' * 40}\n{etag}\n1700000000.0\n")
    (notes / "config.json.metadata").write_text("not what it should be")
    check = setting.check_files(folder)
    assert (check.verdict, check.figures["checked"]) == ("ok", 1)
    flip_a_bit(folder / "model.safetensors")
    assert setting.check_files(folder).verdict == "failed"


def test_a_model_is_known_by_name_repository_and_folder():
    entry = next(entry for entry in catalog() if entry.name == "MiniCPM-S-1B")
    somewhere = Path("/models/x")
    assert model.find_entry("minicpm-s-1b", somewhere) is entry
    assert model.find_entry("openbmb/MiniCPM-S-1B-sft", somewhere) is entry
    assert model.find_entry("./MiniCPM-S-1B-sft", Path("MiniCPM-S-1B-sft")) is entry
    assert model.find_entry("x", somewhere) is None


def test_minicpms_vocabulary_gets_a_chinese_sentence(tmp_path, shared_data):
    folder = write_model(tmp_path, vocab_size=73440, hidden_size=32, num_attention_heads=2)
    shutil.copy(shared_data / "tokenizers" / "MiniCPM-S-1B-sft" / "tokenizer.json", folder)
    with hybrid.load(folder) as engine:
        ids = model.text_ids(engine)
        assert len(ids) == 64
        text = engine.tokenizer.decode(ids)
    assert text.startswith("Once upon a time")
    assert "从前有一个小女孩" in text


def test_a_short_context_is_checked_as_far_as_it_goes(tmp_path):
    folder = write_model(tmp_path, vocab_size=4096, max_position_embeddings=20)
    assert checks_of(folder)["oracle"].figures["positions"] == 20


def test_too_little_memory_gives_a_warning(monkeypatch):
    monkeypatch.setattr(setting, "available_memory_bytes", lambda: 1000)
    with open_checkpoint(STORIES) as checkpoint:
        check = setting.check_memory(checkpoint.config, Format.q8)
    assert check.verdict == "warning"


def test_a_capped_instruction_set_and_a_cpu_without_avx2_are_reported(monkeypatch):
    with kernels.using_isa("scalar"):
        check = setting.check_isa()
    if len(kernels.available_isas()) > 1:
        assert (check.verdict, check.figures["active"]) == ("warning", "scalar")
        assert "HYBRID_ISA" in check.message
    monkeypatch.setattr(setting, "available_isas", lambda: ["scalar"])
    monkeypatch.setattr(setting, "active_isa", lambda: "scalar")
    assert "lacks AVX2" in setting.check_isa().message


def test_the_command_prints_a_line_per_check_and_a_verdict(capsys):
    assert selfcheck.main(["-t", "1"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-3].endswith(("passed.", "have a warning."))
    assert out.splitlines()[-2].startswith("Not checked:")
    assert "oracle" in out
    assert all(len(line) <= selfcheck.WIDTH for line in out.splitlines())


def test_json_is_one_object(capsys):
    assert selfcheck.main(["--json", "--quant", "bf16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] in ("ok", "warning")
    assert report["quant"] == "bf16"
    assert {"name", "verdict", "message", "advice", "figures", "table"} == set(report["checks"][0])


def test_json_has_no_nan():
    check = Check("text", "failed", "", figures={"loss": float("nan"), "isa": "avx2", "n": 1})
    assert selfcheck.as_json(check)["figures"] == {"loss": None, "isa": "avx2", "n": 1}


def test_the_exit_code_says_what_went_wrong(tmp_path, capsys):
    folder = copy_stories(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"<html>")
    assert selfcheck.main(["-m", str(folder)]) == 1
    assert "web page" in " ".join(capsys.readouterr().out.split())
    assert selfcheck.main(["-m", str(tmp_path / "nothing")]) == 1
    assert "FAILED  files" in capsys.readouterr().out
    assert selfcheck.main(["-t", "0"]) == 2
    assert "threads" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        selfcheck.main(["--quant", "q3"])
    assert stop.value.code == 2


def test_equal_runs_are_within_the_bounds_and_spoiled_ones_are_not():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8, 50)).astype(np.float32)
    active = rng.integers(0, 9, (8, 2))
    oracle = comparison.Run(logits, active)
    same = comparison.compare(oracle, oracle, 10)
    assert (same.rms, same.largest, same.flips) == (0, 0, 0)
    bound = comparison.bounds(same)
    assert comparison.is_within(same, bound)
    for spoiled in (
        comparison.Run(logits + np.float32(0.01), active),
        comparison.Run(logits, active + (np.arange(16).reshape(8, 2) == 3)),
        comparison.Run(np.where(logits == logits.max(), np.nan, logits), active),
    ):
        assert not comparison.is_within(comparison.compare(spoiled, oracle, 10), bound)


def test_losses_and_agreement_by_hand():
    logits = np.zeros((3, 4), np.float32)
    assert comparison.mean_loss(logits, [0, 1, 2]) == pytest.approx(np.log(4))
    logits[0, 1], logits[1, 2], logits[2, 3] = 5, 5, 0.1
    run = comparison.Run(logits, np.zeros((3, 1), np.int64))
    other = comparison.Run(logits.copy(), run.active)
    other.logits[2, 3] = -1
    assert comparison.argmax_agreement(other, run, margin=1.0) == (2, 2, 2)
    assert comparison.mean_loss(logits, [0, 1, 2]) < 0.1


def test_oracle_memory_is_known_beforehand():
    with open_checkpoint(STORIES) as checkpoint:
        config = checkpoint.config
    layer = 4 * config.hidden_size * (768 + 3 * config.n_neurons)
    assert comparison.oracle_bytes(config) > 2 * layer + 4 * config.vocab_size * config.hidden_size


@pytest.mark.slow
def test_the_gpu_checks_can_be_rehearsed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    path = tmp_path / "checks.json"
    assert selfcheck.main(["--gpu", "--rehearse", "-o", str(path)]) == 0, capsys.readouterr().out
    results = {name: entry["result"] for name, entry in json.loads(path.read_text()).items()}
    assert all(plan["is_within"] for plan in results["every plan, stories q8"].values())
    assert all(plan["same_argmax"] for plan in results["every plan, stories q8"].values())
    assert results["replays"]["wrong"] == 0
    assert results["decode, q8"]["all on the GPU 100%"]["vram_mib"] > 0
