"""Plans fit the budget, get no slower with more of it, and agree with those worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.placement.machine import CpuSpeeds, GpuSpeeds, Machine
from hybrid.placement.plan import ON_CPU, LayerPlacement, PlacementPlan, cpu_plan, whole_plan
from hybrid.placement.sizes import ModelSizes
from hybrid.placement.solver import alternatives, best, solve
from hybrid.placement.time_model import PredictorCost, TimeModel, buckets, flat_frequencies
from hybrid.weights.layout import packed_layout
from hybrid.weights.preview import LEAST_ROWS, preview_bytes

CONFIG = ModelConfig(
    family="minicpm",
    vocab_size=4096,
    hidden_size=256,
    n_layers=5,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    n_neurons=1024,
    max_context=512,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    activation="relu",
    threshold=0.0,
    embedding_scale=1.0,
    residual_scale=1.0,
    logit_scale=1.0,
    has_tied_head=True,
    bos_id=1,
    eos_ids=(2,),
)
CPU = CpuSpeeds(stream_gbs=20.0, gather_gbs=12.0, kv_gbs=15.0, layer_us=5.0)
GPU = GpuSpeeds("a GPU", 1 << 33, 0, 200.0, 120.0, node_us=0.5, hand_off_us=4.0)
MACHINE = Machine("a PC", "q8", 4, "avx2", 1 << 34, CPU, GPU)
CPU_ONLY = cpu_plan(CONFIG, "q8", 256, "model", "order")


def frequencies(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    f = rng.beta(0.6, 4.4, (CONFIG.n_layers, CONFIG.n_neurons))
    return np.sort(f, 1)[:, ::-1]


def time_model(machine: Machine = MACHINE, **options) -> TimeModel:
    sizes = ModelSizes(packed_layout(CONFIG, Format.q8), 256)
    return TimeModel(machine, sizes, frequencies(), n_positions=128, **options)


def with_gpu(**speeds) -> Machine:
    return replace(MACHINE, gpu=replace(GPU, **speeds))


ALL = ModelSizes(packed_layout(CONFIG, Format.q8), 256).plan(whole_plan(CPU_ONLY))
machines = st.builds(
    with_gpu,
    stream_gbs=st.floats(5, 1000),
    gather_gbs=st.floats(5, 500),
    node_us=st.floats(0, 5),
    hand_off_us=st.floats(0, 100),
)


@given(machine=machines, budget=st.integers(0, 2 * ALL))
def test_never_over_budget_and_never_slower_than_the_cpu(machine, budget):
    model = time_model(machine)
    plan = solve(model, CPU_ONLY, budget)
    assert model.sizes.plan(plan) == plan.vram_bytes <= budget
    for layer in plan.layers:
        assert layer.n_hot % 64 == 0
        assert layer.n_gate % 64 == 0
    assert model.plan(plan) <= model.plan(CPU_ONLY)


def test_more_budget_is_never_slower():
    model = time_model()
    seconds = [model.plan(solve(model, CPU_ONLY, ALL * step // 12)) for step in range(14)]
    for less, more in itertools.pairwise(seconds):
        assert more <= less * 1.001  # bytes are rounded
    assert seconds[-1] < seconds[0]


def test_endless_hand_offs_keep_everything_on_the_cpu():
    model = time_model(with_gpu(hand_off_us=1e9))
    for budget in (ALL // 4, ALL // 2, ALL):
        # A token begins at the CPU's embedding: even one layer on the GPU needs a hand-off.
        assert solve(model, CPU_ONLY, budget) == CPU_ONLY


def test_slow_hand_offs_put_whole_layers_on_the_gpu():
    model = time_model(with_gpu(hand_off_us=60.0))
    plan = solve(model, CPU_ONLY, ALL // 2)
    assert plan.uses_gpu
    assert not any(plan.is_split(layer) for layer in plan.layers)


def test_a_budget_for_everything_puts_everything_on_the_gpu():
    assert solve(time_model(), CPU_ONLY, ALL).is_all_on_gpu


def test_without_a_budget_or_a_gpu_the_plan_is_cpu_only():
    assert solve(time_model(), CPU_ONLY, 0) == CPU_ONLY
    model = time_model(replace(MACHINE, gpu=None))
    assert solve(model, CPU_ONLY, ALL) == CPU_ONLY
    assert [way.name for way in alternatives(model, CPU_ONLY, ALL)] == ["CPU only"]


def test_a_gpu_slower_than_the_cpu_is_not_used():
    model = time_model(with_gpu(stream_gbs=2.0, gather_gbs=1.0))
    assert solve(model, CPU_ONLY, ALL) == CPU_ONLY


def test_the_same_problem_gives_the_same_plan():
    plans = {solve(time_model(), CPU_ONLY, ALL // 2) for _ in range(3)}
    assert len(plans) == 1


def test_hybrid_beats_whole_layers_at_half_the_budget():
    candidates = {way.name: way.seconds for way in alternatives(time_model(), CPU_ONLY, ALL // 2)}
    assert candidates["hybrid"] < 0.95 * candidates["whole layers"] < candidates["CPU only"]
    assert "all on the GPU" not in candidates
    assert best(alternatives(time_model(), CPU_ONLY, ALL // 2)).name == "hybrid"


# For results by hand: one block of 32 columns, so that sizes are small numbers.
TINY = replace(
    CONFIG, vocab_size=100, hidden_size=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32,
    n_neurons=64, max_context=64,
)  # fmt: skip


def tiny_model(machine: Machine) -> TimeModel:
    sizes = ModelSizes(packed_layout(TINY, Format.bf16), 64)
    return TimeModel(machine, sizes, flat_frequencies(1, 64, 0.25), n_positions=10)


def test_sizes_by_hand():
    sizes = ModelSizes(packed_layout(TINY, Format.bf16), 64)
    assert sizes.neuron == 64  # 32 columns of 2 bytes
    assert sizes.attention == 96 * 64 + 32 * 64
    assert sizes.kv(64) == 64 * 32 * 2 * 2
    assert sizes.resident == 8192 + 8192 + 2 * 128
    assert sizes.layer(LayerPlacement(True, 64, 0)) == 16640 + 64 * 64
    assert sizes.layer(LayerPlacement(True, 64, 64)) == 16640 + 3 * 64 * 64
    assert sizes.head == 100 * (64 + 4) + 128
    assert sizes.layer(ON_CPU) == 0


def test_times_by_hand():
    """1 GB/s is one byte per nanosecond, and only bytes take time."""
    machine = Machine(
        "", "", 1, "", 0, CpuSpeeds(1.0, 0.5, 1.0, 0.0), GpuSpeeds("", 1, 0, 10.0, 5.0, 0.0, 0.0)
    )
    model = tiny_model(machine)
    # The CPU reads attention (8192 B), keys and values of 10 positions (1280 B), gates (4096 B) and
    # a quarter of the up and down rows (2048 B at half the speed).
    assert model.layer(0, ON_CPU).total == pytest.approx((8192 + 1280 + 4096 + 4096) * 1e-9)
    whole = model.layer(0, LayerPlacement(True, 64, 64))
    assert whole.total == pytest.approx((8192 + 1280 + 4096 + 4096) * 1e-10)
    # All gates are on the GPU and all rows on the CPU, so each waits for the other.
    split = model.layer(0, LayerPlacement(True, 64, 0))
    assert split.total == pytest.approx((8192 + 1280 + 4096) * 1e-10 + 4096e-9)
    assert model.head(False) == pytest.approx(6400e-9)
    assert model.head(True) == pytest.approx(6400e-10)


def test_hand_offs_by_hand():
    """The head on the GPU saves 5.76 µs. That pays for a hand-off of 5 µs, but not of 6 µs."""
    for hand_off_us, is_worth_it in ((5.0, True), (6.0, False)):
        gpu = GpuSpeeds("", 1, 0, 10.0, 5.0, 0.0, hand_off_us)
        model = tiny_model(Machine("", "", 1, "", 0, CpuSpeeds(1.0, 0.5, 1.0, 0.0), gpu))
        cpu_only = cpu_plan(TINY, "bf16", 64, "", "")
        room = model.sizes.buffers() + model.sizes.head  # and nothing else
        plan = solve(model, cpu_only, room)
        assert plan.is_head_on_gpu is is_worth_it
        assert plan.layers == (ON_CPU,)


def test_a_predictor_makes_cold_gates_cheaper():
    cost = PredictorCost(n_bytes=10_000, predicted_fraction=0.2)
    exact, predicting = time_model(), time_model(predictors=(cost,) * CONFIG.n_layers)
    own_gates = LayerPlacement(True, 256, 256)
    assert predicting.layer(0, own_gates).cold < exact.layer(0, own_gates).cold
    all_gates = LayerPlacement(True, 1024, 256)
    assert predicting.layer(0, all_gates) == exact.layer(0, all_gates)
    assert predicting.plan(CPU_ONLY) < exact.plan(CPU_ONLY)


@given(n=st.integers(1, 20_000))
def test_buckets_cover_all_neurons(n):
    ranges = buckets(n)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == n
    assert all(a[1] == b[0] and b[0] % 64 == 0 for a, b in itertools.pairwise(ranges))


def test_the_summary_says_what_is_where():
    plan = solve(time_model(), CPU_ONLY, ALL // 2)
    assert isinstance(plan, PlacementPlan)
    assert "on the GPU" in plan.summary()
    assert CPU_ONLY.summary() == "plan: all on the CPU"
    assert "all layers and the head" in whole_plan(CPU_ONLY).summary()


@pytest.mark.parametrize("format", list(Format))
def test_a_previewed_head_reads_less(format):
    config = replace(CONFIG, vocab_size=LEAST_ROWS)
    plain = ModelSizes(packed_layout(config, format), 256)
    assert plain.cpu_head == LEAST_ROWS * plain.cpu_neuron
    previewed = ModelSizes(packed_layout(config, format, has_preview=True), 256)
    least = preview_bytes(LEAST_ROWS, config.hidden_size)
    assert least < previewed.cpu_head < 0.6 * plain.cpu_head
