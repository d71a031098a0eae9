// What drawing a token computes over the whole vocabulary.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/attention.inl.h"
#include "kernels/kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

void WeighLogits(const float* logits, int32_t n, float top, float temperature, float* weights) {
  const F32 minus_top = Set(-top), factor = Set(1.0f / temperature);
  const F32 minus_least = Set(-ReduceMax(Exp(Set(-INFINITY))));
  const auto weigh = [&](const float* from, float* to) {
    const F32 weight = Exp(Mul(Add(Load(from), minus_top), factor));
    Store(to, Add(weight, minus_least));  // what Exp gives for all small weights becomes 0
  };
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) weigh(logits + i, weights + i);
  if (i == n) return;
  float last[kLanes] = {};
  const size_t n_bytes = sizeof(float) * static_cast<size_t>(n - i);
  memcpy(last, logits + i, n_bytes);
  weigh(last, last);
  memcpy(weights + i, last, n_bytes);
}

int32_t FindLikely(const float* weights, int32_t n, float bound, int32_t* ids) {
  const F32 minus_bound = Set(-bound);
  int32_t n_found = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const uint32_t bits = NotNegative(Add(Load(weights + i), minus_bound));
    if (bits == 0) continue;
    for (int32_t lane = 0; lane < kLanes; ++lane) {  // without a branch on each
      ids[n_found] = i + lane;
      n_found += static_cast<int32_t>(bits >> lane & 1);
    }
  }
  for (; i < n; ++i)
    if (weights[i] >= bound) ids[n_found++] = i;
  return n_found;
}

}  // namespace
}  // namespace hybrid
