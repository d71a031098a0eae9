"""The sampler draws only tokens that a full sort allows, and as often as the softmax says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from slow import slow_except

from hybrid.errors import HybridError, InvalidOption, NumericOverflow
from hybrid.kernels import _native, available_isas, using_isa
from hybrid.text.sampling import Sampler, SamplingParams, _largest, log_probabilities

Floats = npt.NDArray[np.float32]
INF, NAN = float("inf"), float("nan")


def floats(*values: float) -> Floats:
    return np.array(values, dtype=np.float32)


def draws(logits: Floats, n: int, **options: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**{"seed": 7, **options}))
    return [sampler.sample(logits) for _ in range(n)]


def noise(size: int, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


# Options


def test_defaults_are_valid_and_frozen() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (0.8, 0, 0.95, None)
    with pytest.raises(FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("temperature", value) for value in (-0.1, NAN, INF, -INF, True, "1", None, 10**400)],
        *[("top_k", value) for value in (-1, 1.0, False, "40", None)],
        *[("top_p", value) for value in (-0.5, 1.0001, NAN, INF, True, "0.9", None)],
        *[("seed", value) for value in (-2, 1.5, True, "1")],
        *[("presence_penalty", value) for value in (-2.1, NAN, "1", True)],
        *[("frequency_penalty", value) for value in (2.1, INF, None)],
    ],
)
def test_bad_options_are_refused_by_name_and_value(option: str, value: object) -> None:
    with pytest.raises(InvalidOption) as error:
        SamplingParams(**{option: value})  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{option}: expected ")
    assert str(error.value).endswith(f"found {value!r}")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 5e-324},
        {"temperature": sys.float_info.max},
        {"top_p": 1},
        {"top_p": 5e-324},
        {"top_k": 10**30},
        {"seed": 10**30},
    ],
)
def test_extreme_options_still_sample(options: dict[str, Any]) -> None:
    logits = floats(1, 3, -INF, 2, -3e38)
    assert set(draws(logits, 50, **options)) <= {0, 1, 3, 4}


# Greedy


def test_temperature_zero_takes_the_largest_logit_with_the_lowest_id() -> None:
    assert draws(floats(1, 5, 5, -INF), 5, temperature=0, top_k=2, top_p=0.1) == [1] * 5


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.integers(-99, 99)))
@settings(deadline=None)
def test_the_smallest_temperature_top_p_or_top_k_takes_a_largest_logit(logits: Floats) -> None:
    logits /= 16
    largest = set(np.flatnonzero(logits == logits.max()).tolist())
    assert set(draws(logits, 3, temperature=0)) == {min(largest)}
    assert set(draws(logits, 3, temperature=1e-300)) <= largest
    assert set(draws(logits, 3, top_k=1)) == {min(largest)}
    assert set(draws(logits, 3, top_p=1e-9)) <= largest


# Cuts, against a full sort

# Few distinct values, so that ties are common.
VALUES = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.sampled_from([-INF, -8.0, -2.0, 0.5, 0.75, 3.0])
) | hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-20, 20, width=32))


def by_falling_value(values: Floats) -> list[int]:
    return sorted(range(values.size), key=lambda index: (-values[index], index))


@given(values=VALUES, n=st.integers(1, 250))
@settings(deadline=None, max_examples=300)
@pytest.mark.slow
def test_top_k_keeps_the_first_k_of_a_full_sort(values: Floats, n: int) -> None:
    assert _largest(values, n).tolist() == sorted(by_falling_value(values)[:n])


def native_draw(logits: Floats, uniform: float, **options: float) -> int:
    settings = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, **options}
    return _native.Sampler().draw(logits, top=float(logits.max()), uniform=uniform, **settings)


@given(
    values=VALUES,
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_p=st.floats(1e-6, 1) | st.just(1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
)
@settings(deadline=None, max_examples=300)
def test_draws_are_those_of_a_full_sort(
    values: Floats, temperature: float, top_p: float, min_p: float
) -> None:
    values = np.round(values * 16) / 16  # smaller differences may vanish from fp32 weights
    if values.max() == -INF:
        values[0] = 0
    weights = np.exp((values.astype(np.float64) - values.max()) / temperature)
    weights[values < values.max() - 80 * temperature] = 0
    order = by_falling_value(values)
    sums = weights[order].cumsum() / weights.sum()
    rounding = 1e-6  # weights are fp32
    least = int(np.searchsorted(sums, top_p - rounding)) + 1 if top_p < 1 else len(order)
    most = int(np.searchsorted(sums, top_p + rounding)) + 1 if top_p < 1 else len(order)
    options = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    for isa in available_isas():
        with using_isa(isa):
            fits = False
            for n in range(least, min(most, len(order)) + 1):
                kept = sorted(i for i in order[:n] if weights[i] >= min_p)
                ends = weights[kept].cumsum() / weights[kept].sum()
                middles = ends - np.diff(ends, prepend=0) / 2
                likely = np.flatnonzero(np.diff(ends, prepend=0) > 1e-3)
                fits |= all(
                    native_draw(values, float(middles[i]), **options) == kept[i] for i in likely
                )
            assert fits


@pytest.mark.parametrize("size", [1, 7, 255, 257, 5000])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_all_instruction_sets_draw_the_same_tokens(size: int, spread: float) -> None:
    logits, uniforms = noise(size) * np.float32(spread), np.random.default_rng(size).random(50)
    for options in ({}, {"top_p": 0.95}, {"top_p": 0.5, "min_p": 0.1}, {"top_p": 1 - 2.0**-53}):
        drawn = []
        for isa in available_isas():
            with using_isa(isa):
                drawn.append([native_draw(logits, float(u), **options) for u in uniforms])
        # The portable kernels have no fused multiply-add, so their last bits differ.
        assert all(tokens == drawn[-1] for tokens in drawn[1:])
        assert np.mean(np.equal(drawn[0], drawn[-1])) > 0.9


@pytest.mark.parametrize(
    "wrong",
    [
        {"logits": np.empty(0, np.float32)},
        {"logits": np.zeros((2, 2), np.float32)},
        {"top": INF},
        {"temperature": 0.0},
        {"temperature": NAN},
        {"top_p": -0.1},
        {"min_p": 1.5},
        {"uniform": 1.0},
        {"uniform": NAN},
    ],
)
def test_the_native_sampler_checks_what_it_gets(wrong: dict[str, Any]) -> None:
    right = {"logits": floats(1, 2), "top": 2.0, "temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
    with pytest.raises(ValueError, match="must be"):
        _native.Sampler().draw(**{**right, "uniform": 0.5, **wrong})


def test_a_native_sampler_serves_vocabularies_of_any_size() -> None:
    sampler = _native.Sampler()
    for size in (10, 1000, 3):
        assert sampler.draw(noise(size), float(noise(size).max()), 1.0, 1e-9, 0.0, 0.5) == int(
            noise(size).argmax()
        )


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 5000, 70_001])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e30])
def test_log_probabilities_are_those_of_the_softmax(isa: str, size: int, spread: float) -> None:
    logits = noise(size, seed=size) * np.float32(spread)
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    n_top, token = min(size, 9), size // 2
    logprob, likeliest = log_probabilities(logits, token, n_top)
    np.testing.assert_allclose(logprob, exact[token], rtol=1e-12, atol=1e-9)
    assert [other for other, _ in likeliest] == np.argsort(-logits, kind="stable")[:n_top].tolist()
    for other, value in likeliest:
        np.testing.assert_allclose(value, exact[other], rtol=1e-12, atol=1e-9)
    assert log_probabilities(logits, token, 0) == (logprob, ())


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_log_probabilities_of_broken_logits_are_refused(broken: float) -> None:
    logits = np.full(7, -np.inf if broken < 0 else 1, np.float32)
    logits[3] = broken
    with pytest.raises(NumericOverflow, match="not finite"):
        log_probabilities(logits, 0, 1)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.25, {0}), (0.5, {0, 1}), (0.51, {0, 1, 2}), (0.75, {0, 1, 2})]
)
def test_top_p_of_equal_tokens_counts_them_from_the_lowest_id(top_p: float, kept: set[int]) -> None:
    assert set(draws(floats(2, 2, 2, 2), 300, top_p=top_p)) == kept


def test_temperature_comes_before_top_p() -> None:
    logits = np.log(floats(0.6, 0.3, 0.1))
    assert set(draws(logits, 300, temperature=1, top_p=0.5)) == {0}
    # At temperature 4 the shares are 0.40, 0.34 and 0.26: two are needed.
    assert set(draws(logits, 300, temperature=4, top_p=0.5)) == {0, 1}


def test_top_p_counts_shares_of_what_top_k_kept() -> None:
    logits = np.log(floats(0.4, 0.3, 0.2, 0.1))
    assert set(draws(logits, 300, temperature=1, top_p=0.5)) == {0, 1}
    assert set(draws(logits, 300, temperature=1, top_p=0.5, top_k=2)) == {0}  # 0.4 of 0.7


def test_top_k_beyond_the_vocabulary_is_off() -> None:
    logits = noise(100)
    assert draws(logits, 50, top_k=101) == draws(logits, 50, top_k=0)


# Frequencies


@pytest.mark.parametrize("temperature", slow_except([0.5, 1.0, 2.0], 0.5))
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    logits, n = floats(0.3, -1.2, 2.0, 0.0, 1.1, -INF, -0.4, 1.9), 20_000
    counts = np.bincount(draws(logits, n, temperature=temperature, top_p=1), minlength=8)
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = n * weights / weights.sum()
    assert counts[5] == 0
    others = np.arange(8) != 5
    chi_square = ((counts - expected)[others] ** 2 / expected[others]).sum()
    assert chi_square < 22.46  # 6 degrees of freedom, 0.1 %


@pytest.mark.slow
def test_frequencies_in_a_nucleus_are_those_of_the_softmax_of_its_tokens() -> None:
    weights, n = np.array([0.1, 0.4, 0.05, 0.3, 0.15]), 20_000
    counts = np.bincount(
        draws(np.log(weights).astype(np.float32), n, temperature=1, top_p=0.8), minlength=5
    )
    assert counts[[0, 2]].tolist() == [0, 0]
    expected = n * weights[[1, 3, 4]] / 0.85
    assert ((counts[[1, 3, 4]] - expected) ** 2 / expected).sum() < 13.82  # 2 degrees, 0.1 %


@given(
    logits=hnp.arrays(
        np.float32, st.integers(1, 600), elements=st.sampled_from([-INF, -1.0, 0.0, -200.0])
    ),
    top_p=st.sampled_from([1.0, 0.999, 1 - 2.0**-53]),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None)
def test_a_token_without_weight_is_never_drawn(
    logits: Floats, top_p: float, uniform: float
) -> None:
    logits[logits.size // 2] = 0
    index = native_draw(logits, uniform, top_p=top_p)
    assert logits[index] > -200
    if top_p == 1:
        weights = np.where(logits > -200, np.exp(logits.astype(np.float64)), 0)
        sums = weights.cumsum() / weights.sum()
        rounding = 1e-6  # weights are fp32
        assert sums[index] - weights[index] / weights.sum() - rounding <= uniform
        assert uniform <= sums[index] + rounding


# Seeds


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = noise(1000)
    assert draws(logits, 100, seed=3) == draws(logits, 100, seed=3)
    assert draws(logits, 100, seed=3) != draws(logits, 100, seed=4)


def test_a_drawn_seed_repeats_the_run() -> None:
    first, second = Sampler(SamplingParams()), Sampler(SamplingParams())
    assert first.seed != second.seed
    logits = noise(1000)
    tokens = [first.sample(logits) for _ in range(50)]
    assert draws(logits, 50, seed=first.seed) == tokens


def test_other_processes_draw_the_same_tokens() -> None:
    code = (
        "import numpy as np; from hybrid.text.sampling import Sampler, SamplingParams; "
        "sampler = Sampler(SamplingParams(seed=11, top_k=40)); "
        "logits = ((np.arange(500) * 37 % 101) / 16).astype(np.float32); "
        "print([sampler.sample(logits) for _ in range(40)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    logits = ((np.arange(500) * 37 % 101) / 16).astype(np.float32)
    assert outputs == {f"{draws(logits, 40, seed=11, top_k=40)}\n"}


# Logits


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("logits", "problem"),
    [
        (floats(1, NAN, 2), "found nan"),
        (floats(NAN, INF), "found nan"),
        (floats(-INF, NAN), "found nan"),
        (floats(1, INF), "found inf"),
        (floats(-INF, -INF), "every token is banned"),
    ],
)
def test_logits_that_are_not_finite_are_refused(
    logits: Floats, problem: str, temperature: float
) -> None:
    with pytest.raises(HybridError, match=problem):
        Sampler(SamplingParams(temperature=temperature)).sample(logits)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 1.0}, {"temperature": 0}])
def test_banned_tokens_are_never_drawn(options: dict[str, Any]) -> None:
    logits = np.full(100, -np.inf, dtype=np.float32)
    logits[[3, 97]] = [1, 1.5]
    assert set(draws(logits, 100, **options)) <= {3, 97}


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 1.0}, {"temperature": 0}])
def test_logits_are_not_changed(options: dict[str, Any]) -> None:
    logits = noise(1000)
    logits.flags.writeable = False
    before = logits.tobytes()
    draws(logits, 3, **options)
    assert logits.tobytes() == before


def test_the_whole_range_of_floats_is_sampled_without_a_warning() -> None:
    largest = np.finfo(np.float32).max
    assert draws(floats(largest, -largest, 0), 20) == [0] * 20
    assert set(draws(floats(-largest, -largest), 100)) == {0, 1}


def test_repeat_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    before = logits.copy()
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=2.0))
    assert sampler.sample(logits) == 0
    assert sampler.sample(logits, [0]) == 1
    assert sampler.sample(logits, [0, 1, 1]) == 0
    assert sampler.sample(np.array([-3.0, -2.0], np.float32), [1]) == 0
    np.testing.assert_array_equal(logits, before)


def test_a_repeat_penalty_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    import torch

    rng = np.random.default_rng(0)
    for penalty in (0.5, 1.3, 4.0):
        processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=penalty))
        for _ in range(50):
            logits = rng.standard_normal(20).astype(np.float32)
            seen = rng.integers(0, 20, 12)
            expected = processor(torch.from_numpy(seen)[None], torch.from_numpy(logits)[None])
            assert sampler.sample(logits, set(seen.tolist())) == int(expected.argmax())


def test_what_the_caller_bans_is_never_drawn() -> None:
    logits = np.array([5.0, 4.0, 0.0], np.float32)
    before = logits.copy()
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=1e9, top_p=1)):
        sampler = Sampler(params)
        assert {sampler.sample(logits, (), [0, 1, 0]) for _ in range(20)} == {2}
    with pytest.raises(HybridError, match="every token is banned"):
        sampler.sample(logits, (), [0, 1, 2])
    np.testing.assert_array_equal(logits, before)


def test_a_top_p_of_zero_keeps_the_likeliest() -> None:
    logits = np.array([1.0, 1.1, 1.0], np.float32)
    assert set(draws(logits, 50, temperature=1.0, top_p=0.0)) == {1}


def test_min_p_drops_what_is_far_below_the_likeliest() -> None:
    logits = np.log(np.array([0.6, 0.25, 0.1, 0.05], np.float32))
    params = SamplingParams(temperature=1.0, top_p=1.0, min_p=0.3, seed=1)
    sampler = Sampler(params)
    assert {sampler.sample(logits) for _ in range(300)} == {0, 1}
    everything = Sampler(SamplingParams(temperature=1.0, top_p=1.0, seed=1))
    assert {everything.sample(logits) for _ in range(300)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": float("nan")},
        {"repeat_penalty": 100},
    ],
)
def test_more_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        SamplingParams(**options)


def test_penalties_count_the_tokens_of_the_answer() -> None:
    logits = floats(1.0, 0.9, -3.0)
    for options, counts, token in (
        ({"frequency_penalty": 0.25}, {0: 1}, 1),
        ({"frequency_penalty": 0.25}, {0: 2, 1: 2}, 0),
        ({"frequency_penalty": 0.25}, {0: 3, 1: 2}, 1),
        ({"presence_penalty": 0.25}, {0: 1, 1: 9}, 0),
        ({"presence_penalty": 0.25}, {0: 1}, 1),
        ({"presence_penalty": -2.0, "frequency_penalty": -2.0}, {2: 1}, 0),
        ({"presence_penalty": -2.0, "frequency_penalty": -2.0}, {2: 2}, 2),
        ({"frequency_penalty": 2.0}, {}, 0),
    ):
        sampler = Sampler(SamplingParams(temperature=0, **options))
        assert sampler.sample(logits, counts=counts) == token
    assert logits.tolist() == floats(1.0, 0.9, -3.0).tolist()


def test_penalties_come_after_the_repeat_penalty() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=2, presence_penalty=0.5))
    assert sampler.sample(floats(2, 0.6), seen=[0], counts={0: 1}) == 1  # 2 / 2 - 0.5
    assert sampler.sample(floats(2, 0.4), seen=[0], counts={0: 1}) == 0


def test_a_bias_is_added_first() -> None:
    logits = floats(1, 2, 3)
    for bias, token in (((0, 2.5),), 0), (((2, -100.0),), 1), (((1, 0.5), (2, -0.6)), 1):
        assert draws(logits, 3, temperature=0, logit_bias=bias) == [token] * 3
    assert set(draws(logits, 200, logit_bias=((2, -100),), top_p=1)) == {0, 1}
    sampler = Sampler(SamplingParams(logit_bias=((2, 100),)))
    assert sampler.sample(logits, banned=[2]) in (0, 1)
    assert logits.tolist() == [1, 2, 3]
