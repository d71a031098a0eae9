"""A matrix whose weights a format cannot hold gets a scale; an ordinary matrix stays as it is."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid.errors import InvalidCheckpoint
from hybrid.kernels import Format
from hybrid.model.weights import read_balanced
from hybrid.weights.formats import round_weights
from hybrid.weights.matrix_scale import RANGES, find_matrix_scale, largest_of_blocks

RNG = np.random.default_rng(0)
ORDINARY = RNG.standard_normal((300, 96), np.float32) * np.float32(0.05)
FACTORS = [1e-37, 1e-20, 1e-8, 1e-5, 1e-3, 1.0, 1e4, 1e8, 1e20, 1e37]


def rounding_error(format: Format, w: np.ndarray) -> np.ndarray:
    """Return each row's error after rounding with the matrix scale, relative to its length."""
    scale = np.float32(find_matrix_scale(format, w, "w"))
    rounded = (round_weights(format, w / scale) * scale).astype(np.float64)
    return np.linalg.norm(rounded - w, axis=1) / np.linalg.norm(w.astype(np.float64), axis=1)


@pytest.mark.parametrize("n_cols", [32, 96, 100, 1056])
def test_blocks_are_found_whatever_the_order_in_memory(n_cols):
    w = RNG.standard_normal((300, n_cols), np.float32)
    expected = [[np.abs(row[at : at + 32]).max() for at in range(0, n_cols, 32)] for row in w]
    np.testing.assert_array_equal(largest_of_blocks(w), expected)
    np.testing.assert_array_equal(largest_of_blocks(np.asfortranarray(w)), expected)


def test_ordinary_matrices_have_no_scale(format):
    assert find_matrix_scale(format, ORDINARY, "w") == 1.0
    assert find_matrix_scale(format, np.zeros((8, 64), np.float32), "w") == 1.0
    with_dead_rows = ORDINARY.copy()
    with_dead_rows[:1] *= np.float32(1e-6)  # of neurons that never fire
    assert find_matrix_scale(format, with_dead_rows, "w") == 1.0
    with_dead_rows[:100] *= np.float32(1e-30)  # no scale could hold these
    assert find_matrix_scale(format, with_dead_rows, "w") in (1.0, 2.0**-4)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_matrix_of_any_size_is_rounded_as_well_as_an_ordinary_one(format, factor):
    w = ORDINARY * np.float32(factor)
    scale = find_matrix_scale(format, w, "w")
    assert np.frexp(scale)[0] == 0.5  # a power of two
    assert scale == 1.0 or format is not Format.bf16 or not 1e-28 < factor < 1e28
    expected = rounding_error(format, ORDINARY)
    np.testing.assert_allclose(rounding_error(format, w), expected, rtol=0.2, atol=0.002)


@pytest.mark.parametrize(
    ("format", "largest_error"),
    [(Format.f16, 0.0005), (Format.q8, 0.01), (Format.q4, 0.12)],
    ids=lambda value: value.name if isinstance(value, Format) else "",
)
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_parts_of_a_matrix_that_are_small_are_kept(format, largest_error, axis):
    """As if the small neurons' down rows, or the norm's weights, were as much larger."""
    w = ORDINARY.copy()
    if axis == "rows":
        w[::5] *= np.float32(1e-6)
    else:
        w[:, 32:64] *= np.float32(1e-6)
    assert find_matrix_scale(format, w, "w") != 1.0
    small = w[::5] if axis == "rows" else np.ascontiguousarray(w[:, 32:64])
    scale = np.float32(find_matrix_scale(format, w, "w"))
    rounded = round_weights(format, small / scale) * scale
    error = np.linalg.norm(rounded - small) / np.linalg.norm(small)
    assert error < largest_error


@pytest.mark.parametrize("largest", [65504.0, 1.0, 2.0**-12, 2.0**-20])
@pytest.mark.parametrize("small_rows", [0, 1, 100, 290])
def test_fp16_weights_of_any_size_are_packed_to_the_bit(largest, small_rows):
    w = ORDINARY * np.float32(largest / np.abs(ORDINARY).max())
    w[:small_rows] *= np.float32(2.0**-20)
    w = w.astype(np.float16).astype(np.float32)
    scale = np.float32(find_matrix_scale(Format.f16, w, "w"))
    assert scale == 1.0 or largest < 65504.0
    np.testing.assert_array_equal(round_weights(Format.f16, w / scale) * scale, w)


def test_what_no_scale_can_hold_is_refused_by_name(format):
    w = ORDINARY * np.float32(1e3)
    w[:200] *= np.float32(1e-38)
    with pytest.raises(InvalidCheckpoint, match=f"up of layer 3 holds .* {format.name} cannot"):
        find_matrix_scale(format, w, "up of layer 3")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(format, value):
    w = ORDINARY.copy()
    w[7, 5] = value
    with pytest.raises(InvalidCheckpoint, match=r"the head holds values .* not finite"):
        find_matrix_scale(format, w, "the head")


def test_the_largest_weights_of_a_format_do_not_overflow(format):
    w = ORDINARY / np.abs(ORDINARY).max() * np.float32(RANGES[format].most)
    assert find_matrix_scale(format, w, "w") == 1.0
    assert np.isfinite(round_weights(format, w)).all()


# Reads of a layer whose head_dim is 8: roles and their weights.
LAYER = {
    "attention_norm": RNG.uniform(0.5, 1.5, 32).astype(np.float32),
    **{role: RNG.standard_normal((8, 32), np.float32) for role in ("q", "k", "v", "up")},
    "o": RNG.standard_normal((32, 8), np.float32),
}


def test_keys_and_values_of_any_size_are_brought_into_the_range_of_fp16():
    size = {"q": 1e9, "k": 1e-9, "v": 1e12, "o": 1e-12, "up": 1e20, "attention_norm": 1.0}
    weights = {role: w * np.float32(size[role]) for role, w in LAYER.items()}

    def read(role: str, layer: int) -> np.ndarray:
        return weights[role]

    q, k, v, o, up = (read_balanced(read, role, 0) for role in ("q", "k", "v", "o", "up"))
    for balanced in (k, v):
        assert 0.01 < np.abs(balanced).mean() < 10
    x = RNG.standard_normal(32).astype(np.float32)
    scores = (weights["q"] @ x) * (weights["k"] @ x)
    np.testing.assert_allclose((q @ x) * (k @ x), scores, rtol=1e-5)
    np.testing.assert_allclose(o @ (v @ x), weights["o"] @ (weights["v"] @ x), rtol=1e-4)
    assert up is weights["up"]


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0, 0.0])
def test_ordinary_keys_and_values_are_left_as_they_are(factor):
    weights = LAYER | {"k": LAYER["k"] * np.float32(factor)}
    for role in LAYER:
        assert read_balanced(lambda role, _: weights[role], role, 0) is weights[role]
    large_norm = weights | {"attention_norm": LAYER["attention_norm"] * np.float32(1e-7)}
    balanced = read_balanced(lambda role, _: large_norm[role], "v", 0)
    assert np.abs(balanced).mean() > 1e5  # the norm counts
