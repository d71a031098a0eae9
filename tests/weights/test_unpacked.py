"""Weights that are unpacked from a packed model equal those that were packed."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import ODD_SHAPES, scale_weights, write_model

from hybrid.checkpoint.hf import open_checkpoint
from hybrid.kernels import Format
from hybrid.model.weights import read_balanced
from hybrid.weights.formats import (
    GPU_FORMATS,
    pack_rows,
    quantize_q4,
    quantize_q8,
    round_weights,
)
from hybrid.weights.layout import packed_layout
from hybrid.weights.matrix_scale import find_matrix_scale
from hybrid.weights.packing import pack_model
from hybrid.weights.unpacked import PackedReader, PlainRows, unpack_rows


@pytest.fixture(params=GPU_FORMATS, ids=lambda format: format.name)
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


def values_of(format: Format, rows: PlainRows) -> np.ndarray:
    """Return fp32 values, computed only from the documented layout of PlainRows."""
    if rows.scales is None:
        return (rows.values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if format is Format.q8:
        integers = rows.values.astype(np.float32).reshape(*rows.scales.shape, 32)
    else:
        packed = rows.values.reshape(*rows.scales.shape, 16)
        integers = np.concatenate((packed & 15, packed >> 4), -1).astype(np.float32) - 8
    return (integers * rows.scales.astype(np.float32)[..., None]).reshape(len(rows.values), -1)


def check_values(format: Format, rows: PlainRows, w: np.ndarray) -> None:
    """Assert that rows hold the rounded weights, and zeros up to whole blocks."""
    check_rounded(format, rows, round_weights(format, w))


def check_rounded(format: Format, rows: PlainRows, expected: np.ndarray) -> None:
    values, n_cols = values_of(format, rows), expected.shape[1]
    assert values.shape[1] == -(-n_cols // 32) * 32
    np.testing.assert_array_equal(values[:, :n_cols], expected)
    assert not values[:, n_cols:].any()


@pytest.mark.parametrize("n_cols", [8, 32, 36, 96, 100, 256, 288])
def test_unpack_rows_undoes_pack_rows(format, n_cols):
    w = np.random.default_rng(0).standard_normal((5, n_cols), np.float32)
    rows = unpack_rows(format, *pack_rows(format, w), n_cols)
    check_values(format, rows, w)
    if format is Format.q8:
        np.testing.assert_array_equal(rows.values[:, :n_cols], quantize_q8(w)[0])
    if format is Format.q4:
        np.testing.assert_array_equal(rows.scales, quantize_q4(w)[1])


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("has_preview", [False, True])
@pytest.mark.parametrize("predicted_layers", [frozenset(), frozenset({1})])
def test_reader_finds_every_matrix(format, tmp_path, predicted_layers, has_preview, is_tied):
    with open_checkpoint(write_model(tmp_path, tie_word_embeddings=is_tied)) as checkpoint:
        layout = packed_layout(checkpoint.config, format, predicted_layers, has_preview=has_preview)
        check_reader(checkpoint, layout)


@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_reader_finds_matrices_of_any_width(format, tmp_path, shape):
    with open_checkpoint(write_model(tmp_path, **shape)) as checkpoint:
        check_reader(checkpoint, packed_layout(checkpoint.config, format, {1}))


@pytest.mark.parametrize("factor", [1e-8, 1e12, 1e-30])
def test_reader_returns_weights_with_their_matrix_scales(format, tmp_path, factor):
    """Each matrix has a scale of its own: q, k and v too, which are one array."""
    scaled = ("embed", "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    folder = scale_weights(write_model(tmp_path), dict.fromkeys(scaled, factor))
    with open_checkpoint(folder) as checkpoint:
        layout = packed_layout(checkpoint.config, format, frozenset({1}))
        check_reader(checkpoint, layout)


def check_reader(checkpoint, layout):
    config, format = layout.config, layout.format
    order = np.random.default_rng(1).permutation(config.n_neurons)
    orders = [order] * config.n_layers
    model = pack_model(checkpoint, layout, neuron_orders=orders)
    reader = PackedReader(model.embedding.memory, layout)

    def rounded(w: np.ndarray) -> np.ndarray:
        scale = np.float32(find_matrix_scale(format, w, "w"))
        return round_weights(format, w / scale) * scale

    def expect(rows: PlainRows, *matrices: np.ndarray) -> None:
        check_rounded(format, rows, np.concatenate([rounded(w) for w in matrices]))

    def read(role: str, layer: int | None = None) -> np.ndarray:
        if layer is None:
            return checkpoint.read(role)
        return read_balanced(checkpoint.read, role, layer)

    for layer in range(config.n_layers):
        expect(reader.matrix(f"{layer}.qkv"), *(read(role, layer) for role in ("q", "k", "v")))
        expect(reader.matrix(f"{layer}.o"), read("o", layer))
        n = 61
        expect(reader.matrix(f"{layer}.gate", n), read("gate", layer)[order[:n]])
        up, down = reader.up_and_down(layer, n)
        expect(up, read("up", layer)[order[:n]])
        expect(down, np.ascontiguousarray(read("down", layer).T[order[:n]]))
        np.testing.assert_array_equal(reader.norm(f"{layer}.ffn_norm"), read("ffn_norm", layer))
    expect(reader.matrix(layout.head.name), read("embedding" if config.has_tied_head else "head"))
    if not config.has_tied_head:
        expect(reader.matrix("embedding"), read("embedding"))
