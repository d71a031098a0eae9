"""Attention of one token in Triton.

Three kernels: rope and cache write, attention over spans of the context in parallel, and the merge
of the spans. Importing this module loads triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_cache(v):
    """fp16. What exceeds its range becomes NaN, because attention could hide an infinite value."""
    return tl.where(tl.abs(v) < 65520.0, v, float("nan")).to(tl.float16)


@triton.jit
def rope_and_cache(
    qkv,
    cos,
    sin,
    position,
    q,
    k_cache,
    v_cache,
    q_scale,
    n_context,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program computes one head of q, k or v."""
    head = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    mask = at < HALF
    where = tl.load(position)
    first = tl.load(qkv + head * 2 * HALF + at, mask=mask, other=0.0)
    second = tl.load(qkv + head * 2 * HALF + HALF + at, mask=mask, other=0.0)
    if head < N_HEADS + N_KV_HEADS:
        c = tl.load(cos + where * HALF + at, mask=mask, other=0.0)
        s = tl.load(sin + where * HALF + at, mask=mask, other=0.0)
        first, second = first * c - second * s, second * c + first * s
    if head < N_HEADS:
        tl.store(q + head * 2 * HALF + at, first * q_scale, mask=mask)
        tl.store(q + head * 2 * HALF + HALF + at, second * q_scale, mask=mask)
    else:
        kv_head = (head - N_HEADS) % N_KV_HEADS
        row = (kv_head * n_context + where) * 2 * HALF
        if head < N_HEADS + N_KV_HEADS:
            tl.store(k_cache + row + at, to_cache(first), mask=mask)
            tl.store(k_cache + row + HALF + at, to_cache(second), mask=mask)
        else:
            tl.store(v_cache + row + at, to_cache(first), mask=mask)
            tl.store(v_cache + row + HALF + at, to_cache(second), mask=mask)


@triton.jit
def attend_span(
    q,
    k_cache,
    v_cache,
    position,
    largest,
    sums,
    values,
    n_context,
    N_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Each program computes the query heads of one KV head over SPAN positions.

    It stores the largest score, the sum of exponentials and the weighted sum of values. Positions
    beyond the token's are never read.
    """
    kv_head, span = tl.program_id(0), tl.program_id(1)
    n_seen = tl.load(position) + 1
    group = tl.arange(0, GROUP_WIDTH)
    d = tl.arange(0, WIDTH)
    head = kv_head * GROUP + group
    is_head = group < GROUP
    at = span * SPAN + tl.arange(0, SPAN)
    is_seen = at < n_seen
    query = tl.load(
        q + head[:, None] * DIM + d[None, :], mask=is_head[:, None] & (d < DIM)[None, :], other=0.0
    )
    rows = (kv_head * n_context + at) * DIM
    mask = is_seen[:, None] & (d < DIM)[None, :]
    k = tl.load(k_cache + rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    scores = tl.sum(query[:, None, :] * k[None, :, :], 2)
    scores = tl.where(is_seen[None, :], scores, float("-inf"))
    most = tl.max(scores, 1)
    # In a span beyond the token, weights must be 0, not NaN.
    weights = tl.where(
        is_seen[None, :], tl.exp(scores - tl.where(most > float("-inf"), most, 0.0)[:, None]), 0.0
    )
    v = tl.load(v_cache + rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.sum(weights[:, :, None] * v[None, :, :], 1)
    row = span * N_HEADS + head
    tl.store(largest + row, most, mask=is_head)
    tl.store(sums + row, tl.sum(weights, 1), mask=is_head)
    tl.store(
        values + row[:, None] * DIM + d[None, :],
        out,
        mask=is_head[:, None] & (d < DIM)[None, :],
    )


@triton.jit
def merge_spans(
    largest,
    sums,
    values,
    out,
    n_spans,
    N_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Each program merges one head's softmax over its spans, in order."""
    head = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    most = tl.full((CHUNK,), float("-inf"), tl.float32)
    for first in range(0, n_spans, CHUNK):
        span = first + tl.arange(0, CHUNK)
        here = tl.load(largest + span * N_HEADS + head, mask=span < n_spans, other=float("-inf"))
        most = tl.maximum(most, here)
    top = tl.max(most, 0)
    total = tl.zeros((CHUNK,), tl.float32)
    weighed = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, n_spans, CHUNK):
        span = first + tl.arange(0, CHUNK)
        row = span * N_HEADS + head
        is_span = span < n_spans
        here = tl.load(largest + row, mask=is_span, other=float("-inf"))
        weight = tl.exp(here - top)
        total += weight * tl.load(sums + row, mask=is_span, other=0.0)
        mask = is_span[:, None] & (d < DIM)[None, :]
        v = tl.load(values + row[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        weighed += tl.sum(weight[:, None] * v, 0)
    tl.store(out + head * DIM + d, weighed / tl.sum(total, 0), mask=d < DIM)
