"""Plans by load(vram_budget=…) and --plan are used and reported, and replaced if they do not fit.

The GPU is torch's CPU device.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import predictor_files
import pytest
from slow import slow_except

torch = pytest.importorskip("torch")

from engine.gpu.hybrid_models import Greedy, check_greedy, check_logits, write_greedily  # noqa: E402

import hybrid  # noqa: E402
from hybrid.cli.kept_session import KeptSession  # noqa: E402
from hybrid.engine.gpu import executor as gpu_executor  # noqa: E402
from hybrid.engine.gpu import measurement  # noqa: E402
from hybrid.engine.gpu.device import HostDevice  # noqa: E402
from hybrid.engine.loading import executors, planning  # noqa: E402
from hybrid.engine.speculation import DraftLength  # noqa: E402
from hybrid.errors import (  # noqa: E402
    DeviceUnavailable,
    InvalidArtifact,
    InvalidOption,
    OutOfMemory,
)
from hybrid.placement.disturbance import OtherLoad  # noqa: E402
from hybrid.placement.machine import GpuSpeeds  # noqa: E402
from hybrid.placement.plan import LayerPlacement, load_plan  # noqa: E402
from hybrid.plan import main as plan_main  # noqa: E402
from hybrid.run import main as run_main  # noqa: E402

MIB = 1 << 20
GPU = GpuSpeeds("a GPU", 64 * MIB, 8 * MIB, 400.0, 250.0, 0.0, 0.1, "synchronise", 3 * MIB)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    # Speeds that a busy machine measured are not kept; the tests' machine may be busy.
    monkeypatch.setattr(OtherLoad, "share", lambda self, n_threads: 0.0)
    return tmp_path / "home"


@pytest.fixture
def gpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """A GPU of 64 MiB that is much faster than the CPU."""
    device = HostDevice()
    monkeypatch.setattr(planning, "open_device", lambda: device)
    monkeypatch.setattr(measurement, "measure_gpu", lambda *_, **__: GPU)
    memory = measurement.DeviceMemory(GPU.vram_bytes, GPU.context_bytes, GPU.torch_bytes)
    monkeypatch.setattr(measurement, "measure_memory", lambda *_, **__: memory)
    return device


def greedy(**options) -> tuple[Greedy, hybrid.Engine]:
    """Load an engine with `options`, write greedily, and return both."""
    with hybrid.load("stories", threads=2, context_size=256, **options) as engine:
        return write_greedily(engine), engine


@pytest.mark.parametrize("budget", slow_except([12 * MIB, 14 * MIB, 16 * MIB, 64 * MIB], 14 * MIB))
def test_a_budget_changes_no_text(gpu, budget):
    expected, engine = greedy()
    assert engine.device_name == "cpu"
    actual, engine = greedy(vram_budget=budget)
    assert engine.plan.uses_gpu
    assert engine.plan.vram_bytes + engine.plan.context_bytes <= budget
    assert engine.plan.is_all_on_gpu is (budget == 64 * MIB)
    assert engine.device_name == gpu.name
    check_greedy(actual, expected)


def test_keys_and_values_on_a_gpu_are_neither_saved_nor_copied(gpu, tmp_path):
    path = tmp_path / "session"
    with hybrid.load("stories", threads=2, vram_budget=40 * MIB, context_size=256) as engine:
        session = engine.open_session()
        session.prefill([5, 6, 7])
        uses = (
            lambda: session.save(path),
            lambda: engine.open_session(path),
            lambda: engine.open_session().copy_prefix(session, 2),
            lambda: KeptSession(engine, path),
        )
        for use in uses:
            with pytest.raises(InvalidOption, match=r"on (a|the) GPU.*device cpu"):
                use()
    assert not path.exists()


def test_sequences_of_a_batch_use_the_gpu_one_after_the_other(gpu):
    options = {"max_tokens": 12, "temperature": 0}
    prompts = ("One day, a cat ran", "The sun", list(range(20, 110)))
    with hybrid.load("stories", threads=2, vram_budget=14 * MIB, context_size=256) as engine:
        assert engine.uses_gpu
        alone = ["".join(engine.generate(prompt, **options)) for prompt in prompts]
        with hybrid.BatchLoop(engine, n_sequences=2) as loop:
            assert "one sequence at a time" in loop.notices[0]
            batched = [loop.submit(prompt, **options) for prompt in prompts]
            assert ["".join(generation) for generation in batched] == alone
        with pytest.raises(InvalidOption, match="its sessions count"):
            _ = engine.open_batch().decode_bytes


def test_speculation_changes_no_text(gpu, monkeypatch):
    monkeypatch.setattr(DraftLength, "choose", lambda self, length, room: min(3, room))
    prompt = "One day, a cat ran. One day, a cat ran. One day, a cat ran."
    options = {"max_tokens": 24, "temperature": 0}
    with hybrid.load("stories", threads=2, vram_budget=14 * MIB, context_size=256) as engine:
        assert engine.uses_gpu
        text = "".join(engine.generate(prompt, **options))
        speculated = engine.generate(prompt, **options, speculate="ngram")
        assert "".join(speculated) == text
        assert speculated.stats.drafted_tokens > 0


def test_sessions_work_alike_on_every_plan(gpu):
    def use(engine: hybrid.Engine) -> tuple[tuple[int, ...], np.ndarray]:
        """Return counts of tokens, and the logits after fixed tokens."""
        ids = engine.tokenizer.encode("Tom had a red ball. He")
        with engine.open_session() as session:
            "".join(engine.generate(ids, session=session, max_tokens=4, temperature=0.0))
            again = engine.generate([*ids, 5, 6], session=session, max_tokens=1, temperature=0.0)
            "".join(again)
            counts, logits = [again.stats.cached_tokens], []
            session.truncate(3)
            for token in (7, 8, 9):
                session.decode(token)
                logits.append(session.logits.copy())
            counts.append(session.position)
            sampled = []
            for _ in range(2):
                session.reset()
                pieces = engine.generate(ids, session=session, max_tokens=12, seed=3)
                sampled.append("".join(pieces))
            assert sampled[0] == sampled[1]  # on one engine; two devices may sample other texts
            return (*counts, len(ids)), np.array(logits)

    with hybrid.load("stories", threads=2) as engine:
        expected_counts, expected = use(engine)
    with hybrid.load("stories", threads=2, vram_budget=14 * MIB, context_size=256) as engine:
        assert engine.plan.uses_gpu
        counts, logits = use(engine)
    assert counts == expected_counts
    assert counts[0] == counts[-1]  # the shared prompt was cached
    check_logits(logits, expected)


def test_torch_is_held_to_the_budget(gpu, monkeypatch):
    limits = []
    monkeypatch.setattr(gpu, "limit", limits.append)
    greedy(vram_budget=16 * MIB)
    assert limits == [11 * MIB]  # the budget without what CUDA itself takes


@pytest.mark.slow
def test_measurements_are_kept_and_used_again(gpu, home, monkeypatch):
    greedy(vram_budget=16 * MIB)
    assert len(list((home / "machines").iterdir())) == 2  # the CPU alone, and with the GPU
    monkeypatch.setattr(measurement, "measure_gpu", lambda *_, **__: 1 / 0)
    _, engine = greedy(vram_budget=16 * MIB)
    assert engine.plan.uses_gpu


@pytest.mark.slow
def test_budgets_beyond_the_gpu_and_below_what_cuda_takes_are_reported(gpu):
    _, engine = greedy(vram_budget=1 << 40)
    assert any("planned for those" in notice for notice in engine.notices)
    _, engine = greedy(vram_budget=MIB)
    assert not engine.plan.uses_gpu
    assert any("CUDA and torch alone take" in notice for notice in engine.notices)
    for options in ({"vram_budget": 0}, {"device": "cpu"}, {}):
        _, engine = greedy(**options)
        assert not engine.plan.uses_gpu
        assert engine.notices == ()
    _, engine = greedy(device="cuda")  # the budget is all free memory
    assert engine.plan.is_all_on_gpu


def test_a_plan_that_does_not_fit_after_all_is_solved_anew(gpu, monkeypatch):
    real, attempts = gpu_executor.upload, []

    def upload(*args):
        attempts.append(args)
        if len(attempts) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")
        return real(*args)

    monkeypatch.setattr(gpu_executor, "upload", upload)
    actual, engine = greedy(vram_budget=30 * MIB)
    assert engine.plan.vram_budget == int(executors.SMALLER * int(executors.SMALLER * 30 * MIB))
    assert sum("planned anew" in notice for notice in engine.notices) == 2
    check_greedy(actual, greedy()[0])


def test_a_plan_from_a_file_that_does_not_fit_is_an_error(gpu, monkeypatch, tmp_path):
    _, engine = greedy(vram_budget=30 * MIB)
    path = tmp_path / "plan.json"
    engine.plan.save(path)
    actual, engine = greedy(plan=path)
    assert engine.plan == load_plan(path)
    check_greedy(actual, greedy()[0])

    def upload(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")

    monkeypatch.setattr(gpu_executor, "upload", upload)
    with pytest.raises(OutOfMemory, match="smaller --vram-budget"):
        greedy(plan=path)


@pytest.mark.slow
def test_plans_of_another_model_or_format_are_refused(gpu, tmp_path):
    _, engine = greedy(vram_budget=30 * MIB)
    path = tmp_path / "plan.json"
    replace(engine.plan, model_hash="another").save(path)
    with pytest.raises(InvalidArtifact, match="model hash"):
        greedy(plan=path)
    engine.plan.save(path)
    with pytest.raises(InvalidArtifact, match="format: expected q4, found q8"):
        greedy(plan=path, quant="q4")
    with pytest.raises(InvalidArtifact, match="cannot be read"):
        greedy(plan=tmp_path / "none.json")


def test_the_plan_that_setup_made_is_used(gpu, home):
    _, engine = greedy(vram_budget=30 * MIB)
    path = planning.plan_path(home, engine.spec)
    path.parent.mkdir(parents=True)
    engine.plan.save(path)
    _, engine = greedy()
    assert engine.plan.uses_gpu
    _, engine = greedy(device="cpu")
    assert not engine.plan.uses_gpu
    _, engine = greedy(kv="bf16")
    assert not engine.plan.uses_gpu
    assert any("plan not used: the GPU's KV cache is fp16" in notice for notice in engine.notices)
    with hybrid.load("stories", threads=2, context_size=128) as engine:
        assert not engine.plan.uses_gpu
        assert any("context of 256 positions, but 128 are requested" in n for n in engine.notices)
    path.write_text("{}")
    _, engine = greedy()
    assert not engine.plan.uses_gpu
    assert any("plan not used" in notice for notice in engine.notices)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "gpu"},
        {"vram_budget": -1},
        {"vram_budget": 1.5},
        {"vram_budget": 1 << 30, "plan": Path("p")},
        {"device": "cpu", "vram_budget": 1 << 30},
    ],
)
def test_bad_options_are_refused(home, options):
    with pytest.raises(InvalidOption):
        greedy(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_reported(home):
    with pytest.raises(DeviceUnavailable, match="use device cpu"):
        greedy(device="cuda")
    actual, engine = greedy(vram_budget=1 << 30)
    assert any("everything runs on the CPU" in notice for notice in engine.notices)
    assert actual.tokens == greedy()[0].tokens


def test_missing_torch_is_reported(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "hybrid.engine.gpu.device", None)
    with pytest.raises(DeviceUnavailable, match=r"pip install 'hybrid-inference\[gpu\]'"):
        greedy(device="cuda")


def test_run_prints_the_plan(gpu, capsys):
    assert run_main(["-p", "Once", "-n", "5", "-c", "256", "--vram-budget", "64MiB"]) == 0
    error = capsys.readouterr().err
    assert "note: plan: on the GPU all layers and the head" in error
    assert gpu.name in error


def test_a_saved_plan_runs(gpu, capsys, tmp_path):
    path = tmp_path / "plan.json"
    options = ["--vram-budget", "14MiB", "-c", "256"]
    assert plan_main([*options, "--save", str(path), "--explain"]) == 0
    shown = capsys.readouterr().out
    assert "CUDA takes 5 and torch 3" in shown
    for name in ("CPU only", "hybrid"):
        assert f"\n{name}" in shown
    assert run_main(["-p", "Once", "-n", "5", "-c", "256", "--plan", str(path)]) == 0
    assert "plan: on the GPU" in capsys.readouterr().err


def test_predictors_find_cold_neurons(gpu, tmp_path, monkeypatch):
    """In split layers whose cold gates are on the CPU, the predictor names the cold neurons."""
    n = 192
    random = predictor_files.random_lowrank

    def hot_always(engine, rank):
        made = random(engine, rank)
        named = np.random.default_rng(1).random(len(made.bias)) < 0.5
        named[:n] = True  # so that the CPU alone computes the same neurons
        made.bias[:] = np.where(named, 1e30, -1e30)
        return made

    monkeypatch.setattr(predictor_files, "random_lowrank", hot_always)
    with hybrid.load("stories", threads=2) as engine:
        path = tmp_path / "predictor.safetensors"
        config = engine.config
        predictor_files.write_predictor(path, engine, kinds=("lowrank",) * config.n_layers)
        split = (LayerPlacement(True, n, n),) * config.n_layers
        plan = replace(engine.plan, layers=split)
    plan_file = tmp_path / "plan.json"
    plan.save(plan_file)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, 40)

    def run(**options) -> tuple[np.ndarray, np.ndarray, int]:
        with hybrid.load("stories", threads=2, predictor=path, **options) as engine:
            session = engine.open_session()
            logits = session.prefill(ids, all_logits=True)
            for token in (5, 6, 7):
                session.decode(token)
            return logits, session.logits.copy(), sum(session.predicted_counts)

    expected, decoded, n_gates = run()
    logits, own_decoded, own_gates = run(plan=plan_file)
    for own, oracle in ((logits, expected), (own_decoded, decoded)):
        # Half of the model's neurons are missing, so its logits are off and every rounding shows.
        assert np.abs(own - oracle).max() < 0.05 * np.abs(oracle).max()
    assert abs(own_gates - n_gates) < 0.01 * n_gates
    assert n_gates < 0.9 * (len(ids) + 3) * config.n_layers * config.n_neurons


@pytest.mark.slow
def test_triton_decodes_the_same_text(gpu, monkeypatch, tmp_path):
    """The whole engine runs the kernels of a real GPU, interpreted if there is none."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from hybrid.kernels.gpu.triton_kernels import TritonKernels

    def write(**options) -> tuple[Greedy, hybrid.Engine]:
        with hybrid.load("stories", threads=2, context_size=64, **options) as engine:
            return write_greedily(engine, 4), engine

    expected, engine = write()
    n = engine.config.n_neurons
    split, whole = LayerPlacement(True, n, 128), LayerPlacement(True, n, n)
    rest = (LayerPlacement(),) * (engine.config.n_layers - 2)
    path = tmp_path / "plan.json"
    replace(engine.plan, layers=(split, whole, *rest)).save(path)
    monkeypatch.setattr(planning, "decode_kernels", lambda *_: TritonKernels())
    actual, engine = write(plan=path)
    assert engine.plan.uses_gpu
    check_greedy(actual, expected)


@pytest.mark.slow
def test_a_solved_plan_takes_the_mechanism_that_measured_fastest(gpu):
    _, engine = greedy(vram_budget=14 * MIB)
    assert engine.plan.hand_offs == GPU.mechanism


def test_torch_is_loaded_only_if_a_gpu_is_used(home):
    program = (
        "import sys, hybrid\n"
        "with hybrid.load('stories') as engine:\n"
        "    next(iter(engine.generate('Once', max_tokens=1)))\n"
        "assert not {'torch', 'triton', 'scipy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
