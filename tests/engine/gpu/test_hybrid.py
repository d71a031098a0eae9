"""With every plan, the hybrid executor computes what the CPU engine does.

The GPU is torch's CPU device, or a fake device that runs beside the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from slow import slow_except
from tiny_models import ODD_SHAPES, STORIES, scale_weights, write_model

torch = pytest.importorskip("torch")

from engine.gpu.fake_device import FakeDevice, FakeEvent  # noqa: E402
from engine.gpu.hybrid_models import N_CONTEXT, PackedFolder, check_logits, some_ids  # noqa: E402

import hybrid  # noqa: E402
from hybrid.engine.gpu.device import MECHANISMS, HostDevice  # noqa: E402
from hybrid.engine.gpu.measurement import (  # noqa: E402
    DeviceMemory,
    HandOffLoop,
    hand_off_seconds,
    measure_gpu,
)
from hybrid.engine.session import Session  # noqa: E402
from hybrid.errors import (  # noqa: E402
    DeviceFailed,
    InvalidOption,
    NumericOverflow,
    OutOfMemory,
)
from hybrid.kernels import Format, KvFormat, ThreadPool  # noqa: E402
from hybrid.kernels.gpu.torch_kernels import TorchKernels  # noqa: E402
from hybrid.placement.machine import MODELLED  # noqa: E402
from hybrid.placement.sizes import ModelSizes  # noqa: E402
from hybrid.weights.formats import BLOCK, GPU_FORMATS, whole_blocks  # noqa: E402
from hybrid.weights.layout import packed_layout  # noqa: E402

PLANS = list(PackedFolder(STORIES, Format.q8).plans())


@pytest.fixture(scope="module", params=GPU_FORMATS, ids=lambda f: f.name)
def packed(request: pytest.FixtureRequest) -> PackedFolder:
    return PackedFolder(STORIES, request.param)


@pytest.mark.parametrize("name", slow_except(PLANS, "everything", "hot"))
def test_every_plan_gives_the_cpu_engines_logits(packed, name):
    plan = packed.plans()[name]
    ids = some_ids(packed.config, 90)
    own = packed.cpu().open_session()
    expected = own.prefill(ids[:80], True)
    with packed.hybrid(plan, HostDevice()) as executor:
        session = executor.open_session()
        check_logits(session.prefill(ids[:80], True), expected)
        check_logits(session.logits, expected[-1])
        for token in ids[80:]:
            session.decode(int(token))
            own.decode(int(token))
            check_logits(session.logits, own.logits)
        assert session.position == own.position
        counts, own_counts = np.array(session.active_counts), np.array(own.active_counts)
        assert np.abs(counts - own_counts).max() <= 0.01 * own_counts.max()


@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_models_of_any_hidden_size_run_on_both_devices(tmp_path, format, shape):
    """Two sessions that differ in nothing but the device. Sizes are those that a plan counts."""
    packed = PackedFolder(write_model(tmp_path, **shape), format)
    ids = some_ids(packed.config, 24)
    own = packed.cpu().open_session()
    expected = own.prefill(ids, True)
    for name in ("all", "everything", "hot"):
        plan = packed.plans()[name]
        with packed.hybrid(plan, HostDevice()) as executor:
            session = executor.open_session()
            check_logits(session.prefill(ids, True), expected)
            session = executor.open_session()
            for position, token in enumerate(ids[:4]):
                session.decode(int(token))
                check_logits(session.logits, expected[position])
            sizes = ModelSizes(packed.layout, N_CONTEXT, n_splits=1, rows_per_count=0)
            assert executor.weight_bytes + executor.lane_bytes == sizes.plan(plan)


@pytest.mark.parametrize("name", slow_except(["everything", "all"], "everything"))
def test_matrix_scales_are_applied_on_both_devices(tmp_path, format, name):
    """What up, q and o are divided by, down, k and v are multiplied by."""
    small = dict.fromkeys(("up_proj", "q_proj", "o_proj"), 1e-4)
    large = dict.fromkeys(("down_proj", "k_proj", "v_proj"), 1e4)
    packed = PackedFolder(scale_weights(write_model(tmp_path), small | large), format)
    if format is not Format.bf16:
        assert packed.model.layers[0].up.matrix_scale != 1
    ids = some_ids(packed.config, 30)
    expected = packed.cpu().open_session().prefill(ids, True)
    plan = packed.plans()[name]
    with packed.hybrid(plan, HostDevice()) as executor:
        check_logits(executor.open_session().prefill(ids, True), expected)
        # A plan has room for the scales of blocks, which are fp32 where there is a matrix scale.
        sizes = ModelSizes(packed.layout, N_CONTEXT, n_splits=1, rows_per_count=0)
        counted = replace(sizes, has_matrix_scales=format is not Format.bf16).plan(plan)
        used = executor.weight_bytes + executor.lane_bytes
        assert used <= counted
        assert format is Format.bf16 or used > sizes.plan(plan)


def test_a_model_with_matrix_scales_is_planned_with_them(tmp_path):
    folder = write_model(tmp_path / "plain", vocab_size=4096)
    with hybrid.load(folder) as engine:
        assert not engine.spec.has_matrix_scales
    scale_weights(folder, {"up_proj": 1e-4, "down_proj": 1e4})
    with hybrid.load(folder) as engine:
        assert engine.spec.has_matrix_scales
        spec = engine.spec
    with hybrid.load(folder, quant="bf16") as engine:
        assert not engine.spec.has_matrix_scales
    sizes = spec.time_model(MODELLED["ddr4-rtx3050"]()).sizes
    plain = replace(sizes, has_matrix_scales=False)
    assert sizes.neuron == plain.neuron + 2 * whole_blocks(spec.config.hidden_size) // BLOCK


def test_the_gpu_has_no_bf16_cache_and_reports_an_overflow_of_its_own(tmp_path):
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3] *= np.float32(1e7)
    save_file(tensors, folder / "model.safetensors")
    packed = PackedFolder(folder, Format.q8)
    with packed.hybrid(packed.plans()["all"], HostDevice()) as executor:
        with pytest.raises(InvalidOption, match="kv bf16: the GPU's KV cache is fp16"):
            executor.open_session(kv=KvFormat.bf16)
        session = Session(executor.open_session(), packed.config)
        for append in (lambda: session.prefill([5, 6, 7]), lambda: session.decode(5)):
            with pytest.raises(NumericOverflow, match="KV cache overflows fp16"):
                append()
        assert session.tokens == ()


def decode_all(executor, ids: np.ndarray, device: FakeDevice | None = None) -> np.ndarray:
    """Logits after a prefill and after each token of a decode."""
    session = executor.open_session()
    if device is not None:
        device.exchange = session._lane.exchange
    session.prefill(ids[:20])
    logits = [session.logits.copy()]
    for token in ids[20:]:
        session.decode(int(token))
        logits.append(session.logits.copy())
    return np.array(logits)


@pytest.fixture(scope="module")
def stories() -> PackedFolder:
    return PackedFolder(STORIES, Format.q8)


@pytest.fixture
def fake() -> Iterator[FakeDevice]:
    # This thread must sum in the device thread's order, on one thread (tests/conftest.py). Numba
    # gives the thread that first uses it as many OpenMP threads as there are processors.
    torch.set_num_threads(1)
    device = FakeDevice()
    yield device
    device.close()


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", slow_except(PLANS, "everything", "head"))
def test_a_device_that_runs_beside_the_cpu_gives_the_same_bits(stories, fake, name, mechanism):
    plan, ids = stories.plans()[name], some_ids(stories.config, 32)
    with stories.hybrid(plan, HostDevice()) as executor:
        expected = decode_all(executor, ids)
    with stories.hybrid(plan, fake, mechanism=mechanism) as executor:
        np.testing.assert_array_equal(decode_all(executor, ids, fake), expected)
        # Another sequence takes over the lane and its recordings.
        np.testing.assert_array_equal(decode_all(executor, ids, fake), expected)


class NeverWaits(FakeDevice):
    """Its stream does not wait for the CPU's answers."""

    def wait(self, link, slot, mechanism) -> None:
        pass


class AsksTooEarly(FakeDevice):
    """Its requests do not wait for the work that was launched before them."""

    def request(self, link, slot, mechanism) -> None:
        self.call(lambda: link.request(slot))


class NeverSynchronises(FakeDevice):
    """The CPU does not wait for its events."""

    def event(self) -> FakeEvent:
        event = super().event()
        event.synchronize = lambda: None
        return event


@pytest.mark.parametrize(
    ("broken", "mechanism"),
    [
        (NeverWaits, "memory-operations"),
        (AsksTooEarly, "memory-operations"),
        (NeverSynchronises, "synchronise"),
    ],
)
@pytest.mark.parametrize("name", slow_except(["all gates", "everything"], "everything"))
def test_every_wait_is_needed(stories, name, broken, mechanism):
    plan, ids = stories.plans()[name], some_ids(stories.config, 32)
    with stories.hybrid(plan, HostDevice()) as executor:
        expected = decode_all(executor, ids)
    device = broken(jitter_s=2e-3)
    try:
        with stories.hybrid(plan, device, mechanism=mechanism, patience_s=0.5) as executor:
            try:
                actual = decode_all(executor, ids, device)
            except DeviceFailed:
                return
            assert not np.array_equal(actual, expected)
    finally:
        device.close()


def test_hot_neurons_are_summed_while_the_cpu_works(stories, fake):
    """The GPU's whole share of a split FFN is launched between request and wait."""
    plan = stories.plans()["hot"]
    with stories.hybrid(plan, fake) as executor:
        launched = []
        up = executor.prefill_kernels.up
        executor.prefill_kernels.up = lambda *args: (fake.log.append("up"), up(*args))[1]
        executor.prefill_kernels.down = _logging(executor.prefill_kernels.down, fake.log, "down")
        executor.prefill_kernels.merge = _logging(executor.prefill_kernels.merge, fake.log, "merge")
        session = executor.open_session()
        for token in (5, 6, 7):
            launched = fake.log.copy()
            fake.log.clear()
            session.decode(token)
            fake.synchronize()
        launched = fake.log
    slots = range(1, stories.config.n_layers + 1)
    expected = ["request 0", "wait 0"]
    for slot in slots:
        expected += [f"request {slot}", "up", "down", f"wait {slot}", "merge"]
    assert launched[: len(expected)] == expected


def _logging(kernel, log, name):
    def logged(*arguments) -> None:
        log.append(name)
        kernel(*arguments)

    return logged


def test_a_stream_that_fails_stops_the_engine_for_good(stories, fake):
    plan = stories.plans()["all gates"]
    with stories.hybrid(plan, fake, patience_s=0.3) as executor:
        session = executor.open_session()
        for token in (5, 6, 7):
            session.decode(token)
        lane, broken = session._lane, torch.full((1,), float("nan"))
        for recording in list(lane.recordings):
            lane.recordings[recording] = [lambda: fake.enqueue(lambda: 1 / 0)]
        with pytest.raises(DeviceFailed, match="did not request"):
            session.decode(8)
        del broken
        for call in (
            lambda: session.decode(9),
            lambda: session.prefill(np.array([3])),
            executor.open_session,
        ):
            with pytest.raises(DeviceFailed, match="load the model again"):
                call()


def test_an_interruption_releases_the_device(stories, fake):
    """Ctrl-C comes after the launch of a token and before the CPU's share of it."""
    plan = stories.plans()["all gates"]
    with stories.hybrid(plan, fake, patience_s=5) as executor:
        session = executor.open_session()
        for token in (5, 6):
            session.decode(token)

        def interrupt() -> None:
            raise KeyboardInterrupt

        for recording in session._lane.recordings.values():
            recording.append(interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.decode(7)
        fake.synchronize()  # hangs if it still waits for an answer
        with pytest.raises(DeviceFailed):
            session.decode(8)


def test_a_thread_that_never_answers_is_given_up(stories, fake):
    """The watchdog lets the stream continue with NaN, which no one can mistake for text."""
    plan = stories.plans()["all gates"]
    with stories.hybrid(plan, fake, patience_s=0.2) as executor:
        session = executor.open_session()
        for token in (5, 6):
            session.decode(token)
        link = session._lane.exchange.link
        link.arm()
        for recording in session._lane.recordings.values():
            for step in recording:
                step()
        fake.synchronize()  # no thread serves the link
        assert link.error == 2
        assert torch.isnan(session._lane.tensors.x[0]).all()
        with pytest.raises(DeviceFailed):
            session.decode(7)


def test_a_budget_bounds_the_sessions_that_are_open_at_a_time(stories):
    plan = replace(stories.plans()["all"], vram_budget=1)
    with stories.hybrid(plan, HostDevice()) as executor:
        first = executor.open_session()
        with pytest.raises(OutOfMemory, match="room for 1 session"):
            executor.open_session()
        del first
        executor.open_session()


def test_observing_masks_is_refused(stories):
    with stories.hybrid(stories.plans()["all"], HostDevice()) as executor:
        session = executor.open_session()
        with pytest.raises(InvalidOption, match="device cpu"):
            session.prefill(np.array([3]), False, np.zeros(1, np.uint8))


@pytest.mark.parametrize("name", PLANS)
def test_a_plans_bytes_equal_those_on_the_device(packed, name):
    plan = packed.plans()[name]
    with packed.hybrid(plan, HostDevice()) as executor:
        sizes = ModelSizes(packed.layout, N_CONTEXT, n_splits=1, rows_per_count=0)
        assert executor.weight_bytes + executor.lane_bytes == sizes.plan(plan)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_hand_offs_are_measured_with_the_real_link(fake, mechanism):
    pool = ThreadPool(2)
    assert hand_off_seconds(fake, pool, mechanism, n=4) > 0
    loop = HandOffLoop(fake, pool, mechanism, 4)
    recording = fake.record(loop.launch)
    loop.y.fill_(float("nan"))
    loop.replay(recording)
    assert not loop.y.any()  # every answer came: each is a sum over no neurons, so 0


def test_the_speeds_of_a_device_are_measured(format):
    config = replace(PackedFolder(STORIES, Format.q8).config, hidden_size=100)
    layout = packed_layout(config, format)
    speeds = measure_gpu(
        HostDevice(), TorchKernels(), layout, ThreadPool(1), DeviceMemory(1), n_rows=256
    )
    assert min(speeds.stream_gbs, speeds.gather_gbs, speeds.node_us, speeds.hand_off_us) > 0
    assert speeds.mechanism == "synchronise"


@pytest.mark.slow
def test_sessions_on_several_threads_alternate(stories, fake):
    plan = stories.plans()["everything"]
    with stories.hybrid(plan, fake) as executor:
        expected = [decode_all(executor, some_ids(stories.config, 30, seed)) for seed in (1, 2)]
        with ThreadPoolExecutor(2) as threads:
            futures = [
                threads.submit(decode_all, executor, some_ids(stories.config, 30, seed))
                for seed in (1, 2)
            ]
            for future, alone in zip(futures, expected, strict=True):
                np.testing.assert_array_equal(future.result(), alone)


def test_bad_tokens_are_refused_before_anything_runs(stories, fake):
    with stories.hybrid(stories.plans()["all gates"], fake) as executor:
        session = executor.open_session()
        for token in (5, 6, 7):
            session.decode(token)
        fake.log.clear()
        for call in (
            lambda: session.decode(-1),
            lambda: session.decode(stories.config.vocab_size),
            lambda: session.prefill(np.array([3, -1])),
            lambda: session.prefill(np.zeros(0, np.int64)),
            lambda: session.prefill(np.zeros(N_CONTEXT, np.int64)),
        ):
            with pytest.raises(ValueError, match=r"token|context"):
                call()
        assert not fake.log
        session.decode(8)
        assert session.position == 4
