"""Attention in spans, merged as in the native session, matches the plain oracle."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid.kernels import KvFormat, _native, reference

SPAN, KEY_TILE = _native.SPAN, _native.KEY_TILE


def attend_span(q, k, v, kv=KvFormat.fp16):
    """Attend to k, v (positions, head_dim). NaN fills the last tile and must not be read."""
    n_tiles = -(-len(k) // KEY_TILE)
    tiles = np.full((n_tiles * KEY_TILE, k.shape[1]), np.nan, np.float32)
    tiles[: len(k)] = k
    tiles = tiles.reshape(n_tiles, KEY_TILE, -1).transpose(0, 2, 1)
    keys, values = (_native.to_kv(kv, x.astype(np.float32))[0].reshape(x.shape) for x in (tiles, v))
    return _native.attend_span(q, keys, values, kv)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("n_context", [1, 5, 31, 255, 256, 257, 700])
@pytest.mark.parametrize("kv", KvFormat, ids=lambda kv: kv.name)
def test_merged_spans_match_the_oracle(isa, head_dim, n_context, kv):
    rng = np.random.default_rng(n_context)
    n_group = 3
    q = rng.standard_normal((n_group, head_dim)).astype(np.float32)
    size = 2 if kv is KvFormat.fp16 else 1e5  # of values that only bf16 holds
    k, v = (rng.standard_normal((2, n_context, head_dim)) * 2).astype(np.float32)
    k, v = reference.round_kv(kv, k), reference.round_kv(kv, v * np.float32(size))
    scaled = q / np.float32(np.sqrt(head_dim))
    spans = [
        attend_span(scaled, k[first : first + SPAN], v[first : first + SPAN], kv)
        for first in range(0, n_context, SPAN)
    ]
    largest = np.max([span[0] for span in spans], 0)
    weights = [np.exp(span[0] - largest) for span in spans]
    total = sum(weight * span[1] for weight, span in zip(weights, spans, strict=True))
    merged = sum(weight[:, None] * span[2] for weight, span in zip(weights, spans, strict=True))
    expected = reference.attention(q[None], k[:, None], v[:, None], n_context - 1)[0]
    np.testing.assert_allclose(merged / total[:, None], expected, rtol=0, atol=5e-6 * size)


def test_a_dominant_score_does_not_overflow(isa):
    q = np.full((1, 16), 100.0, np.float32)
    k = np.zeros((40, 16), np.float16)
    k[7], k[8] = 100, -100
    v = np.arange(40, dtype=np.float16)[:, None].repeat(16, 1)
    largest, total, out = attend_span(q, k, v)
    np.testing.assert_allclose(out / total[:, None], 7.0, rtol=1e-6)
    assert largest[0] == 160000.0


@pytest.mark.parametrize("position", [0, 7, 39])
def test_a_key_that_is_nan_gives_nan(isa, position):
    k = np.ones((40, 16), np.float16)
    k[position, 0] = np.nan
    v = np.ones((40, 16), np.float16)
    _, total, out = attend_span(np.ones((1, 16), np.float32), k, v)
    assert np.isnan(total).all()
    assert np.isnan(out).all()
