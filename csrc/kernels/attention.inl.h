// Attention over one span of the context, in three steps: scores, a softmax relative to the span's
// own maximum, and weighted values. The caller merges spans in index order, so the result does not
// depend on which thread computed which span.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// exp(x) for x <= 0, as 2^n * exp(r) with |r| <= ln(2)/2 and a Taylor polynomial of degree 6 (error
// < 2e-7). Below -87 the result stays at exp(-87), which changes no sum in fp32.
inline F32 Exp(F32 x) {
  x = Max(Set(-87.0f), x);  // in this order of arguments a NaN stays NaN
  const F32 n = Round(Mul(x, Set(1.44269504f)));
  F32 r = Fma(n, Set(-0.693359375f), x);
  r = Fma(n, Set(2.12194440e-4f), r);
  F32 y = Set(1.0f / 720.0f);
  y = Fma(y, r, Set(1.0f / 120.0f));
  y = Fma(y, r, Set(1.0f / 24.0f));
  y = Fma(y, r, Set(1.0f / 6.0f));
  y = Fma(y, r, Set(0.5f));
  y = Fma(y, r, Set(1.0f));
  y = Fma(y, r, Set(1.0f));
  return Mul(y, Pow2(n));
}

template <KvFormat kKv>
inline F32 LoadKv(const uint16_t* p) {
  return kKv == KvFormat::kFp16 ? LoadFp16(p) : LoadBf16(p);
}

constexpr int32_t kSums = kLanes == 16 ? 4 : 2;  // registers per head: as many as fit

// scores[head] of kSums * kLanes keys from `first` on. The lanes of a register are keys, so no sum
// runs across lanes. A key is read once for all heads.
template <KvFormat kKv, int kHeads>
inline void ScoreKeys(const AttendSpanArgs& a, const float* q, int32_t first, float* scores) {
  const uint16_t* k = a.k + int64_t{first / kKeyTile * kKeyTile} * a.head_stride + first % kKeyTile;
  const uint16_t* v = a.v + int64_t{first} * a.head_stride;  // values, which are read next
  F32 sum[kHeads][kSums];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sum[h][i] = Zero();
  for (int32_t d = 0; d < a.head_stride; ++d) {
    if (a.next != nullptr)
      for (int at = 0; at < kSums * kLanes; at += 32) PrefetchL2(v + d * kSums * kLanes + at);
    F32 keys[kSums];
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) keys[i] = LoadKv<kKv>(k + d * kKeyTile + i * kLanes);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const F32 element = Set(q[h * a.head_stride + d]);
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) sum[h][i] = Fma(element, keys[i], sum[h][i]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) Store(scores + h * kSpan + first + i * kLanes, sum[h][i]);
}

// Replaces scores by exp(score - max) and returns their sum. Scores beyond n, up to kSpan, are
// scratch.
inline float Exponentiate(float* scores, int32_t n, float* largest) {
  const int32_t padded = RoundUp(n, kLanes);
  for (int32_t i = n; i < padded; ++i) scores[i] = -INFINITY;
  F32 max_lanes = Load(scores);
  for (int32_t i = kLanes; i < padded; i += kLanes) max_lanes = Max(max_lanes, Load(scores + i));
  const float max = ReduceMax(max_lanes);
  F32 sum_lanes = Zero();
  for (int32_t i = 0; i < padded; i += kLanes) {
    const F32 p = Exp(Add(Load(scores + i), Set(-max)));
    Store(scores + i, p);
    sum_lanes = Add(sum_lanes, p);
  }
  *largest = max;
  return ReduceAdd(sum_lanes);
}

// out[head] = sum over i of scores[head][i] * v[i], for kParts registers of a value, from dimension
// `first` on. The sums are many and independent, so no addition waits for the one before.
template <KvFormat kKv, int kHeads, int kParts>
inline void WeighSpan(const AttendSpanArgs& a, const float* scores, int32_t first, float* out) {
  F32 sum[kHeads][kParts];
  for (int h = 0; h < kHeads; ++h)
    for (int part = 0; part < kParts; ++part) sum[h][part] = Zero();
  for (int32_t i = 0; i < a.n; ++i) {
    const uint16_t* v = a.v + int64_t{i} * a.head_stride + first;
    if (a.next != nullptr)
      for (int at = 0; at < kParts * kLanes; at += 32)
        PrefetchL2(static_cast<const uint16_t*>(a.next) + i * a.head_stride + first + at);
    F32 value[kParts];
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) value[part] = LoadKv<kKv>(v + part * kLanes);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const F32 score = Set(scores[h * kSpan + i]);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part)
        sum[h][part] = Fma(score, value[part], sum[h][part]);
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int part = 0; part < kParts; ++part)
      Store(out + h * a.head_stride + first + part * kLanes, sum[h][part]);
}

template <KvFormat kKv, int kHeads>
inline void AttendHeads(const AttendSpanArgs& a, int32_t head) {
  float* out = a.out + head * a.head_stride;
  for (int32_t first = 0; first < a.n; first += kSums * kLanes)
    ScoreKeys<kKv, kHeads>(a, a.q + head * a.head_stride, first, a.scores);
  for (int h = 0; h < kHeads; ++h)
    a.sum[head + h] = Exponentiate(a.scores + h * kSpan, a.n, a.max + head + h);
  int32_t first = 0;
  for (; first + kSums * kLanes <= a.head_stride; first += kSums * kLanes)
    WeighSpan<kKv, kHeads, kSums>(a, a.scores, first, out);
  for (; first < a.head_stride; first += kLanes) WeighSpan<kKv, kHeads, 1>(a, a.scores, first, out);
}

template <KvFormat kKv>
inline void AttendSpanAs(const AttendSpanArgs& a) {
  int32_t head = 0;
  for (; head + kHeadTile <= a.n_group; head += kHeadTile) AttendHeads<kKv, kHeadTile>(a, head);
  switch (a.n_group - head) {
    case 3:
      return AttendHeads<kKv, 3>(a, head);
    case 2:
      return AttendHeads<kKv, 2>(a, head);
    case 1:
      return AttendHeads<kKv, 1>(a, head);
    default:
      return;
  }
}

void AttendSpan(const AttendSpanArgs& a) {
  if (a.kv == KvFormat::kFp16)
    AttendSpanAs<KvFormat::kFp16>(a);
  else
    AttendSpanAs<KvFormat::kBf16>(a);
}

void Rotate(const float* x, const float* cos, const float* sin, int32_t half, float scale,
            float* out) {
  for (int32_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    out[i] = (first * cos[i] - second * sin[i]) * scale;
    out[i + half] = (second * cos[i] + first * sin[i]) * scale;
  }
}

void MergeSpans(const float* max, const float* sum, const float* values, int32_t n_spans,
                int64_t stride, int32_t head_dim, int32_t head_stride, float* merged) {
  float largest = max[0];
  for (int32_t span = 1; span < n_spans; ++span)
    largest = max[span * stride] > largest ? max[span * stride] : largest;
  float total = 0.0f;
  memset(merged, 0, sizeof(float) * static_cast<size_t>(head_dim));
  for (int32_t span = 0; span < n_spans; ++span) {
    const float weight = expf(max[span * stride] - largest);
    const float* v = values + span * stride * head_stride;
    total += weight * sum[span * stride];
    for (int32_t i = 0; i < head_dim; ++i) merged[i] += weight * v[i];
  }
  for (int32_t i = 0; i < head_dim; ++i) merged[i] /= total;
}

}  // namespace
}  // namespace hybrid
