"""The table of a packed model's arrays: names, roles, sizes and offsets."""

from __future__ import annotations

import itertools

import pytest
from tiny_models import ODD_SHAPES, write_model

from hybrid.checkpoint.hf import open_checkpoint
from hybrid.kernels import Format
from hybrid.model.families import expected_tensors
from hybrid.weights.layout import packed_layout


@pytest.fixture
def configs(tmp_path):
    found = []
    for is_tied in (True, False):
        with open_checkpoint(
            write_model(tmp_path / str(is_tied), tie_word_embeddings=is_tied)
        ) as checkpoint:
            found.append(checkpoint.config)
    return found


LAYER = ["attention_norm", "qkv", "o", "ffn_norm", "gate", "bundles"]


def test_arrays_follow_a_token(configs):
    tied, untied = configs
    names = [f"{layer}.{part}" for layer in range(tied.n_layers) for part in LAYER]
    assert list(packed_layout(tied, Format.q8).arrays) == ["embedding", *names, "norm"]
    previewed = packed_layout(untied, Format.q8, has_preview=True)
    assert list(previewed.arrays) == ["embedding", *names, "norm", "head", "preview"]


@pytest.mark.parametrize("has_preview", [False, True])
@pytest.mark.parametrize("predicted_layers", [(), (1,)])
def test_arrays_hold_every_tensor_once_and_leave_no_gap(
    configs, format, predicted_layers, has_preview
):
    for config in configs:
        layout = packed_layout(config, format, predicted_layers, has_preview=has_preview)
        arrays = list(layout.arrays.values())
        assert arrays[0].first == 0
        assert arrays[-1].end == layout.n_bytes
        for array, following in itertools.pairwise(arrays):
            assert array.end == following.first
        for array in arrays:
            assert array.first % 64 == 0
            n_scales = len(array.roles) if array.layout not in ("norm", "preview") else 0
            assert array.n_scales == n_scales
            padding = array.end - array.first - array.n_bytes - (64 if n_scales else 0)
            assert 0 <= padding < 64
        held = sorted((r, a.layer) for a in arrays if a.name != "preview" for r in a.roles)
        assert held == sorted((tensor.role, tensor.layer) for tensor in expected_tensors(config))
        assert layout.predicted_layers == list(predicted_layers)
        assert layout.has_preview is has_preview
        assert layout.head.layout == ("row_major" if has_preview else "interleaved")


def test_sizes_by_hand(configs):
    arrays = packed_layout(configs[0], Format.q8, (1,), has_preview=True).arrays
    assert (configs[0].hidden_size, configs[0].n_neurons, configs[0].vocab_size) == (96, 200, 320)
    row = 256 + 16  # 96 columns are padded to 256; each block of 32 has a scale of 2 bytes
    assert arrays["embedding"].n_bytes == 320 * row
    assert arrays["0.attention_norm"].n_bytes == 4 * 96
    assert arrays["1.gate"].n_bytes == 200 * row
    assert arrays["0.bundles"].n_bytes == 200 * 576  # two rows, padded to 64 bytes
    assert arrays["preview"].n_bytes == 320 // 16 * 64 * (96 // 16 + 1)


def test_rows_are_padded_and_norms_are_not(tmp_path):
    with open_checkpoint(write_model(tmp_path, **ODD_SHAPES["hidden 36"])) as checkpoint:
        config = checkpoint.config
    assert (config.hidden_size, config.attention_size, config.qkv_size) == (36, 18, 54)
    for format, row_36, row_18 in (
        (Format.bf16, 2 * 64, 2 * 32),
        (Format.f16, 2 * 64, 2 * 32),
        (Format.q8, 256 + 16, 256 + 16),
        (Format.q4, 128 + 16, 128 + 16),
    ):
        arrays = packed_layout(config, format, has_preview=True).arrays
        assert arrays["0.attention_norm"].n_bytes == 4 * 36
        assert arrays["0.qkv"].n_bytes == 56 * row_36  # 54 rows in tiles of four
        assert arrays["0.o"].n_bytes == 36 * row_18
        assert arrays["preview"].n_bytes == 320 // 16 * 64 * (3 + 1)  # 36 columns make 3 lines
