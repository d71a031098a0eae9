"""hybrid.bench prints a table and one line of JSON, and refuses bad options.

No test asserts a time.
"""

from __future__ import annotations

import json

import pytest
from tiny_models import write_model

import hybrid
from hybrid import bench
from hybrid.checkpoint.identity import ModelIdentity
from hybrid.placement import hardware
from hybrid.placement.disturbance import StolenTime

KEYS = [
    "model",
    "quant",
    "kv",
    "threads",
    "isa",
    "synthetic",
    "mmap",
    "mlock",
    "load_s",
    "copying_s",
    "prefill_tps",
    "decode_tps",
    "device",
    "vram_bytes",
    "decode_gbs",
    "stream_gbs",
    "decode_mbu",
    "stolen_fraction",
    "bytes_per_token",
    "active_fraction",
    "predictor",
    "recall",
    "predicted_fraction",
    "shortlisted_rows",
    "dense_decode_tps",
    "rss_bytes",
]


@pytest.fixture(autouse=True)
def small_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the bandwidth on 8 MiB only, which is quick."""
    monkeypatch.setattr(hardware, "STREAM_BYTES", 8 << 20)


@pytest.mark.parametrize("quant", ["bf16", "q8", "q4"])
def test_the_last_line_is_one_json_object(capsys, quant):
    assert bench.main(["--quant", quant, "--runs", "2", "-n", "20", "-t", "2"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert list(summary) == KEYS
    assert (summary["model"], summary["quant"], summary["threads"]) == ("stories", quant, 2)
    assert summary["isa"] == hybrid.active_isa()
    assert summary["synthetic"] is False
    assert list(summary["prefill_tps"]) == ["128", "512"]
    assert 0 < summary["active_fraction"] < 1
    # GB are 1e9 bytes; both figures are rounded.
    expected_gbs = summary["bytes_per_token"] * summary["decode_tps"] / 1e9
    assert summary["decode_gbs"] == pytest.approx(expected_gbs, rel=0.01, abs=0.005)
    assert any(line.startswith("decode, all neurons") for line in table)


def test_stages_add_up_to_the_bytes_of_a_token(capsys):
    assert bench.main(["--runs", "1", "-n", "10", "--stages"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert list(summary) == [*KEYS, "stages", "long_stages"]
    stages = summary["stages"]
    assert list(stages)[-2:] == ["waiting", "sampling"]
    assert sum(stage["bytes"] for stage in stages.values()) == pytest.approx(
        summary["bytes_per_token"], abs=len(stages)
    )
    assert all(any(line.startswith(name) for line in table) for name in stages)


def test_a_bad_number_of_threads_is_refused_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("hybrid.cli.command_line.load", lambda *a, **k: pytest.fail("loaded"))
    assert bench.main(["-t", "0"]) == 2
    assert "threads" in capsys.readouterr().err


def test_the_share_of_bandwidth_is_given_if_the_weights_exceed_the_cache(capsys, monkeypatch):
    monkeypatch.setattr("hybrid.engine.engine.last_level_cache_bytes", lambda: 1 << 20)
    bench.main(["--runs", "1", "-n", "10"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["decode_mbu"] == pytest.approx(
        summary["decode_gbs"] / summary["stream_gbs"], rel=0.02
    )
    monkeypatch.setattr("hybrid.engine.engine.last_level_cache_bytes", lambda: 1 << 30)
    bench.main(["--runs", "1", "-n", "10"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["decode_mbu"] is None


@pytest.mark.parametrize(("share", "is_reported"), [(0.004, False), (0.12, True)])
def test_time_that_a_hypervisor_took_is_reported(capsys, monkeypatch, share, is_reported):
    monkeypatch.setattr(StolenTime, "share", lambda self, n_threads: share)
    bench.main(["--runs", "1", "-n", "10"])
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["stolen_fraction"] == share
    assert any("hypervisor took 12.0%" in line for line in table) == is_reported


def test_the_same_seed_does_the_same_work(capsys):
    figures = []
    for seed in ("1", "1", "2"):
        bench.main(["--runs", "1", "-n", "10", "--seed", seed])
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        figures.append((summary["bytes_per_token"], summary["active_fraction"]))
    assert figures[0] == figures[1] != figures[2]


def test_a_miscount_is_not_reported_as_a_speed(monkeypatch):
    monkeypatch.setattr(hybrid.Engine, "expected_decode_bytes", lambda self, **sizes: 1)
    with pytest.raises(AssertionError, match="bytes counted"):
        bench.main(["--runs", "1", "-n", "4"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--runs", "-1"], "--runs"),
        (["--long-context", "0"], "--long-context"),
        (["--seed", "-1"], "--seed"),
        (["--quant", "q3"], "--quant"),
    ],
)
def test_options_out_of_range_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        bench.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["-n", "496"], ["--long-context", "16", "-n", "4"]])
def test_the_long_context_may_be_the_short_one(capsys, arguments):
    assert bench.main(["--runs", "1", *arguments]) == 0
    assert capsys.readouterr().out.count("decode, context 16") == 2


def test_more_tokens_than_the_context_holds_are_refused(capsys):
    assert bench.main(["-n", "500"]) == 2
    assert "--tokens 500" in capsys.readouterr().err


def test_an_unknown_model_gives_one_line_of_error(capsys):
    assert bench.main(["-m", "./no such model"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bench_needs_no_hash_of_the_model(tmp_path, capsys, monkeypatch):
    def refuse(identity) -> str:
        raise AssertionError("the model is hashed")

    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ModelIdentity, "_compute", refuse)
    model = write_model(tmp_path / "model", vocab_size=4096)
    assert bench.main(["-m", str(model), "--runs", "1", "-n", "2", "--long-context", "16"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["vram_bytes"] == 0
