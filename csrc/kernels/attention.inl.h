// Attention over one span of the context: scores, a softmax relative to the span's own maximum,
// weighted values. Spans are merged by the caller in index order, so the result does not depend on
// who computed which.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// exp(x) for x <= 0, by 2^n * exp(r) with |r| <= ln(2)/2 and a Taylor polynomial of degree 6 (error
// < 2e-7). Below -87 it stays at exp(-87), which no sum in fp32 sees.
inline F32 Exp(F32 x) {
  x = Max(Set(-87.0f), x);  // in this order a NaN stays one
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

void AttendSpan(const AttendSpanArgs& a) {
  const int32_t n = a.last - a.first, padded = RoundUp(n, kLanes);
  for (int32_t head = 0; head < a.n_group; ++head) {
    const float* q = a.q + head * a.head_stride;
    for (int32_t i = 0; i < n; ++i) {
      const uint16_t* k = a.k + static_cast<int64_t>(a.first + i) * a.head_stride;
      F32 sum = Zero();
      for (int32_t d = 0; d < a.head_stride; d += kLanes)
        sum = Fma(Load(q + d), LoadFp16(k + d), sum);
      a.scores[i] = ReduceAdd(sum);
    }
    for (int32_t i = n; i < padded; ++i) a.scores[i] = -INFINITY;
    F32 max_lanes = Load(a.scores);
    for (int32_t i = kLanes; i < padded; i += kLanes)
      max_lanes = Max(max_lanes, Load(a.scores + i));
    const float max = ReduceMax(max_lanes);
    F32 sum_lanes = Zero();
    for (int32_t i = 0; i < padded; i += kLanes) {
      const F32 p = Exp(Add(Load(a.scores + i), Set(-max)));
      Store(a.scores + i, p);
      sum_lanes = Add(sum_lanes, p);
    }
    a.max[head] = max;
    a.sum[head] = ReduceAdd(sum_lanes);
    float* out = a.out + head * a.head_stride;
    for (int32_t d = 0; d < a.head_stride; d += kLanes) {
      F32 sum = Zero();
      for (int32_t i = 0; i < n; ++i) {
        const uint16_t* v = a.v + static_cast<int64_t>(a.first + i) * a.head_stride;
        sum = Fma(Set(a.scores[i]), LoadFp16(v + d), sum);
      }
      Store(out + d, sum);
    }
  }
}

}  // namespace
}  // namespace hybrid
