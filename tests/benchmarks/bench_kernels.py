"""Measure kernels at MiniCPM-S-1B's shapes, on one thread, with weights beyond the L2 cache.

    pytest tests/benchmarks --benchmark-only --benchmark-columns=median

`extra_info` holds the GB/s of weights read. Each round reads the next of N_LAYERS layers.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hybrid.kernels import Activation, Format, _native
from hybrid.weights.formats import row_bytes
from hybrid.weights.packed_rows import pack_bundles, pack_matrix

HIDDEN, N_NEURONS = 1536, 3840
N_LAYERS = 12  # more than an L2 cache holds; a server's last-level cache may hold them all


@pytest.fixture(scope="module", params=list(Format), ids=lambda format: format.name)
def layers(request: pytest.FixtureRequest):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((N_NEURONS, HIDDEN), np.float32)
    packed = [
        (pack_matrix(request.param, w), *pack_bundles(request.param, w, w)) for _ in range(N_LAYERS)
    ]
    x = rng.standard_normal(HIDDEN, np.float32)
    return request.param, packed, _native.quantize(request.param, x)[None], w @ x


def test_gemv(benchmark, isa, layers):
    format, packed, x, _ = layers
    matrices = itertools.cycle([layer[0] for layer in packed])
    benchmark(lambda: _native.gemm(next(matrices), x, 0, N_NEURONS))
    report_bandwidth(benchmark, N_NEURONS * sum(row_bytes(format, HIDDEN)))


@pytest.mark.parametrize("active_fraction", [0.05, 0.12, 0.3, 1.0])
def test_sparse_ffn(benchmark, isa, layers, active_fraction):
    format, packed, x, gates = layers
    threshold = float(np.quantile(gates, 1 - active_fraction)) if active_fraction < 1 else -1e9
    layers = itertools.cycle(packed)
    _, n_active = benchmark(
        lambda: _native.sparse_ffn(*next(layers), x, 0, N_NEURONS, Activation.fatrelu, threshold)
    )
    assert n_active == pytest.approx(active_fraction * N_NEURONS, rel=0.05)
    report_bandwidth(benchmark, (N_NEURONS + 2 * n_active) * sum(row_bytes(format, HIDDEN)))


def report_bandwidth(benchmark, n_bytes: int) -> None:
    benchmark.extra_info["bytes"] = n_bytes
    if benchmark.stats is not None:  # None if benchmarks are disabled
        benchmark.extra_info["gbs"] = n_bytes / benchmark.stats["median"] / 1e9
