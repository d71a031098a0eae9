"""The Triton kernels match torch's, on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
from slow import slow_except

torch = pytest.importorskip("torch")
IS_INTERPRETED = not torch.cuda.is_available()
if IS_INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when first imported, which is here
pytest.importorskip("triton")

from hybrid.kernels import Activation, Format  # noqa: E402
from hybrid.kernels.gpu.torch_kernels import (  # noqa: E402
    DeviceMatrix,
    Gating,
    LayerCache,
    Neurons,
    Rope,
    TorchKernels,
    Vectors,
    empty_vectors,
)
from hybrid.kernels.gpu.triton_kernels import TritonKernels  # noqa: E402
from hybrid.weights.formats import pack_rows  # noqa: E402
from hybrid.weights.unpacked import unpack_rows  # noqa: E402

DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
ORACLE = TorchKernels()
SHAPES = [(1, 32), (7, 96), (40, 150), (100, 64), (9, 1536)]
CASES = [
    shape if shape == (40, 150) else pytest.param(*shape, marks=pytest.mark.slow)
    for shape in SHAPES
]


@pytest.fixture(scope="module")
def kernels() -> TritonKernels:
    return TritonKernels()


def matrix(format: Format, n_rows: int, n_cols: int, seed: int = 0) -> DeviceMatrix:
    w = np.random.default_rng(seed).standard_normal((n_rows, n_cols)).astype(np.float32)
    rows = unpack_rows(format, *pack_rows(format, w), n_cols)
    values = torch.from_numpy(rows.values).to(DEVICE)
    if format is Format.bf16:
        return DeviceMatrix(format, values.view(torch.bfloat16), None)
    return DeviceMatrix(format, values, torch.from_numpy(rows.scales).to(DEVICE))


def floats(*shape: int, seed: int = 1) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values).to(DEVICE)


def vectors(format: Format, n: int, seed: int = 2) -> Vectors:
    out = empty_vectors(format, 1, n, DEVICE)
    ORACLE.quantize(floats(1, n, seed=seed), out)
    return out


def poison_rows(m: DeviceMatrix, rows: torch.Tensor) -> None:
    """Fill rows that no kernel may read with NaN."""
    (m.values if m.scales is None else m.scales)[rows] = float("nan")


def close(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-5 * scale)


@pytest.mark.parametrize("n", [8, 32, 96, 100, 1536])
def test_norm_matches_torch(kernels, format, n):
    x, weight = floats(1, n), floats(n, seed=5)
    actual, expected = torch.empty_like(x), torch.empty_like(x)
    quants = [empty_vectors(format, 1, n, DEVICE) for _ in range(2)]
    for k, out, quant in ((kernels, actual, quants[0]), (ORACLE, expected, quants[1])):
        k.norm(x, weight, 1e-5, 0.7, out, quant)
    close(actual, expected)
    again = empty_vectors(format, 1, n, DEVICE)
    ORACLE.quantize(actual, again)  # the same values must give the same bits
    assert torch.equal(quants[0].values, again.values)
    assert format is Format.bf16 or torch.equal(quants[0].scales, again.scales)


@pytest.mark.parametrize("n", [8, 32, 96, 100, 1536])
def test_quantize_is_bit_equal(kernels, format, n):
    x = floats(1, n) * torch.logspace(-3, 3, n, device=DEVICE)
    x[0, :32] = 0.0
    x[0, -1] = 0.5 * x[0, -2]
    actual, expected = (empty_vectors(format, 1, n, DEVICE) for _ in range(2))
    kernels.quantize(x, actual)
    ORACLE.quantize(x, expected)
    assert torch.equal(actual.values, expected.values)
    assert format is Format.bf16 or torch.equal(actual.scales, expected.scales)


@pytest.mark.parametrize("format", [Format.q8, Format.q4], ids=lambda format: format.name)
def test_scales_may_be_fp32(kernels, format):
    """Then they contain the matrix scale, a power of two that fp16 does not hold."""
    m, x = matrix(format, 40, 96), vectors(format, 96)
    scale = 2.0**-40
    scaled = DeviceMatrix(format, m.values, m.scales.float() * scale)
    ordinary, actual = torch.empty(1, 40, device=DEVICE), torch.empty(1, 40, device=DEVICE)
    kernels.linear(m, x, ordinary)
    kernels.linear(scaled, x, actual)
    assert torch.equal(actual, ordinary * scale)
    sums = [torch.empty(kernels.n_splits, 1, 96, device=DEVICE) for _ in range(2)]
    for own, out in zip((m, scaled), sums, strict=True):
        kernels.down(own, floats(1, 40), False, out)
    assert torch.equal(sums[1], sums[0] * scale)


@pytest.mark.parametrize("which", ["triton", "torch"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of the interpreter
def test_a_value_that_is_nan_gives_nan_dot_products(kernels, format, which):
    own = kernels if which == "triton" else ORACLE
    x = floats(1, 96)
    x[0, 40] = float("nan")
    quantized, out = empty_vectors(format, 1, 96, DEVICE), torch.zeros(1, 40, device=DEVICE)
    own.quantize(x, quantized)
    own.linear(matrix(format, 40, 96), quantized, out)
    assert out.isnan().all()


@pytest.mark.parametrize(("n_rows", "n_cols"), CASES)
def test_linear_and_add_match_torch(kernels, format, n_rows, n_cols):
    m, x = matrix(format, n_rows, n_cols), vectors(format, n_cols)
    actual, expected = torch.full((1, n_rows), 7.0, device=DEVICE), torch.empty(1, n_rows)
    expected = expected.to(DEVICE)
    kernels.linear(m, x, actual)
    ORACLE.linear(m, x, expected)
    close(actual, expected, n_cols**0.5)
    residual = floats(1, n_rows, seed=9)
    own = residual.clone()
    kernels.add_linear(m, x, 0.3, own)
    ORACLE.add_linear(m, x, 0.3, residual)
    close(own, residual, n_cols**0.5)


@pytest.mark.parametrize(
    "activation", slow_except(Activation, Activation.fatrelu), ids=lambda a: a.name
)
@pytest.mark.parametrize(("n_rows", "n_cols"), CASES[:4])
def test_gates_match_torch(kernels, format, activation, n_rows, n_cols):
    m, x = matrix(format, n_rows, n_cols), vectors(format, n_cols)
    actual, expected = (torch.empty(1, n_rows, device=DEVICE) for _ in range(2))
    for k, out in ((kernels, actual), (ORACLE, expected)):
        k.gates(m, x, Gating(activation, 0.4), out)
    close(actual, expected, n_cols**0.5)


def test_a_gate_that_is_nan_fires(kernels, format):
    m, x = matrix(format, 9, 64), vectors(format, 64)
    poison_rows(m, torch.tensor([4]))
    out = torch.empty(1, 9, device=DEVICE)
    for activation in (Activation.relu, Activation.fatrelu):
        kernels.gates(m, x, Gating(activation, 0.4), out)
        assert torch.isnan(out[0, 4])
        assert not torch.isnan(out[0, :4]).any()


@pytest.mark.parametrize("activation", [Activation.relu, Activation.silu], ids=lambda a: a.name)
@pytest.mark.parametrize(("n_rows", "n_cols"), CASES[:4])
def test_up_and_down_never_read_inactive_rows(kernels, format, activation, n_rows, n_cols):
    up, down = matrix(format, n_rows, n_cols), matrix(format, n_rows, n_cols, seed=3)
    x, gates = vectors(format, n_cols), floats(1, n_rows, seed=4)
    gates[0, torch.rand(n_rows, generator=torch.Generator().manual_seed(5)) < 0.6] = 0.0
    expected, values, everything = (torch.empty(1, n_rows, device=DEVICE) for _ in range(3))
    counts = torch.full((kernels.n_counts(n_rows),), 3, dtype=torch.int64, device=DEVICE)
    before, oracle_counts = counts.sum(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    ORACLE.up(up, x, activation, False, Neurons(gates, expected, oracle_counts))
    total = torch.empty(1, 1, n_cols, device=DEVICE)
    ORACLE.down(down, expected, False, total)
    kernels.up(up, x, activation, True, Neurons(gates, everything, counts.clone()))
    for m in (up, down):
        poison_rows(m, gates[0] == 0)
    kernels.up(up, x, activation, False, Neurons(gates, values, counts))
    assert counts.sum() - before == oracle_counts[0]
    close(values, expected, n_cols**0.5)
    assert torch.equal(everything, values)
    partials = torch.full((kernels.n_splits, 1, n_cols), float("nan"), device=DEVICE)
    kernels.down(down, values, False, partials)
    close(partials.sum(0), total[0], 10 * n_rows**0.5)


@pytest.mark.parametrize(
    "activation", slow_except(Activation, Activation.fatrelu), ids=lambda a: a.name
)
@pytest.mark.parametrize(("n_rows", "n_cols"), CASES[:4])
def test_gates_and_up_in_one_kernel_match_torch(kernels, format, activation, n_rows, n_cols):
    gating = Gating(activation, 0.4)
    gate, up, x = (
        matrix(format, n_rows, n_cols),
        matrix(format, n_rows, n_cols, seed=3),
        vectors(format, n_cols),
    )
    results = []
    for k in (kernels, ORACLE):
        gates, values = (torch.empty(1, n_rows, device=DEVICE) for _ in range(2))
        counts = torch.zeros(k.n_counts(n_rows), dtype=torch.int64, device=DEVICE)
        k.gates_and_up(gate, up, x, gating, False, Neurons(gates, values, counts))
        results.append((gates, values, counts.sum()))
    close(results[0][0], results[1][0], n_cols**0.5)
    close(results[0][1], results[1][1], n_cols)
    assert results[0][2] == results[1][2]
    # Two separate kernels give the same bits, and the fused one does not read inactive rows either.
    gates, values = (torch.empty(1, n_rows, device=DEVICE) for _ in range(2))
    counts = torch.zeros(kernels.n_counts(n_rows), dtype=torch.int64, device=DEVICE)
    kernels.gates(gate, x, gating, gates)
    kernels.up(up, x, activation, False, Neurons(gates, values, counts))
    assert torch.equal(values, results[0][1])
    poison_rows(up, gates[0] == 0)
    kernels.gates_and_up(gate, up, x, gating, False, Neurons(gates, values, counts))
    assert torch.equal(values, results[0][1])


@pytest.mark.parametrize("has_cold", [False, True])
@pytest.mark.parametrize("has_hot", [False, True])
@pytest.mark.parametrize("n", [96, 100, 1536])
def test_merge_matches_torch(kernels, n, has_cold, has_hot):
    partials, cold, residual = floats(kernels.n_splits, 1, n), floats(1, n, seed=2), floats(1, n)
    own = residual.clone()
    hot, given = partials if has_hot else None, cold if has_cold else None
    kernels.merge(hot, given, 0.25, own)
    ORACLE.merge(hot, given, 0.25, residual)
    close(own, residual)


@pytest.mark.parametrize(
    ("n_gate", "n_hot"),
    [(200, 64), *(pytest.param(n, n, marks=pytest.mark.slow) for n in (200, 64))],
)
def test_with_integers_both_backends_give_the_same_bits(kernels, format, n_gate, n_hot):
    from engine.gpu.test_split_ffn import HIDDEN, Case

    case = Case(format)
    x = empty_vectors(format, 1, HIDDEN, DEVICE)
    kernels.quantize(torch.from_numpy(case.h[:1]).to(DEVICE), x)

    def on_device(w: np.ndarray, n: int) -> DeviceMatrix:
        m = case.device_matrix(w, n)
        scales = None if m.scales is None else m.scales.to(DEVICE)
        return DeviceMatrix(m.format, m.values.to(DEVICE), scales)

    gates = torch.zeros(1, n_gate, device=DEVICE)
    kernels.gates(on_device(case.gate, n_gate), x, Gating(Activation.relu, 0.0), gates)
    values = torch.zeros(1, n_hot, device=DEVICE)
    partials = torch.zeros(kernels.n_splits, 1, HIDDEN, device=DEVICE)
    hot = gates[:, :n_hot]
    counts = torch.zeros(kernels.n_counts(n_hot), dtype=torch.int64, device=DEVICE)
    neurons = Neurons(hot, values, counts)
    kernels.up(on_device(case.up, n_hot), x, Activation.relu, False, neurons)
    kernels.down(on_device(case.down, n_hot), values, False, partials)
    residual = torch.zeros(1, HIDDEN, device=DEVICE)
    kernels.merge(partials, None, 1.0, residual)
    expected_gates, expected = case.hot(n_gate, n_hot)
    np.testing.assert_array_equal(gates.cpu().numpy()[0], expected_gates[0, :n_gate])
    np.testing.assert_array_equal(residual.cpu().numpy()[0], expected[0])


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim"), [(6, 2, 32), (4, 4, 64), (4, 1, 24)]
)
@pytest.mark.parametrize("position", slow_except([0, 31, 70], 70))
def test_attention_matches_torch(kernels, n_heads, n_kv_heads, head_dim, position):
    n_context, n_visible = 128, 96
    caches = []
    for _ in range(2):
        k, v = (floats(n_kv_heads, n_context, head_dim, seed=seed).half() for seed in (6, 7))
        k[:, position:] = v[:, position:] = float("nan")  # not written yet
        caches.append(LayerCache(k, v))
    cos, sin = floats(n_context, head_dim // 2, seed=8), floats(n_context, head_dim // 2, seed=9)
    qkv = floats(1, (n_heads + 2 * n_kv_heads) * head_dim, seed=10)
    where = torch.tensor([position], device=DEVICE)
    outs = []
    for k, cache in zip((kernels, ORACLE), caches, strict=True):
        q = torch.zeros(1, n_heads, head_dim, device=DEVICE)
        out = torch.full((1, n_heads * head_dim), float("nan"), device=DEVICE)
        k.rope_and_cache(qkv, Rope(cos, sin), where, q, cache)
        quant = empty_vectors(Format.q8, 1, out.numel(), DEVICE)
        k.attend(q, cache, where, n_visible, out, quant)
        outs.append(out)
    close(outs[0], outs[1])
    seen = slice(0, position + 1)
    for own, oracle in zip(*caches, strict=True):
        torch.testing.assert_close(own[:, seen], oracle[:, seen], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("which", ["triton", "torch"])
@pytest.mark.parametrize("value", [7e4, -7e4])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of the interpreter
def test_keys_and_values_beyond_fp16_show_as_nan(kernels, which, value):
    """An infinite key could have a score of -inf, and attention would leave its position out."""
    own = kernels if which == "triton" else ORACLE
    n_heads, n_kv_heads, head_dim, n_context = 4, 2, 16, 8
    qkv = floats(1, (n_heads + 2 * n_kv_heads) * head_dim)
    qkv[0, n_heads * head_dim + 3] = value  # a key of the first KV head
    qkv[0, (n_heads + 2 * n_kv_heads) * head_dim - 1] = value  # a value of the second KV head
    table = torch.zeros(n_context, head_dim // 2, device=DEVICE)
    rope = Rope(table + 1, table)
    cache = LayerCache(
        *(
            torch.zeros(n_kv_heads, n_context, head_dim, dtype=torch.float16, device=DEVICE)
            for _ in range(2)
        )
    )
    q = torch.zeros(1, n_heads, head_dim, device=DEVICE)
    out = torch.zeros(1, n_heads * head_dim, device=DEVICE)
    position = torch.full((1,), 2, dtype=torch.int64, device=DEVICE)
    own.rope_and_cache(qkv, rope, position, q, cache)
    assert cache.k.isnan().nonzero().tolist() == [[0, 2, 3]]
    assert cache.v.isnan().nonzero().tolist() == [[1, 2, head_dim - 1]]
    own.attend(q, cache, position, n_context, out, empty_vectors(Format.q8, 1, out.numel(), DEVICE))
    heads = out.view(n_heads, head_dim).isnan()
    assert heads[:2].all()
    assert heads[2:, -1].all()
