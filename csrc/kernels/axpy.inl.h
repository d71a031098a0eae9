// Adds rows, each times a factor, to a vector: what active neurons add to a partial sum.
#pragma once

#include "kernels/dot.inl.h"
#include "kernels/kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// kLanes bf16 or fp16 weights.
template <Format kFormat>
inline F32 LoadValues(const uint16_t* p) {
  return kFormat == Format::kBf16 ? LoadBf16(p) : LoadFp16(p);
}

// bf16 and f16. Adds several rows at once: y[col] = (... (y[col] + a0 w0[col]) + a1 w1[col]) ...
// Each row is one fused multiply-add, one after the other. How rows are grouped therefore changes
// no bit, only how often y is loaded. Takes `n_groups` groups of each row. Before each group it
// calls `between` with 2 * kRows: each neuron has an up row and a down row.
template <Format kFormat, int kRows, typename Between>
inline void AxpyValues(RowAt* w, int32_t n_groups, const float* a, float* y, Between& between) {
  F32 factor[kRows];
  for (int r = 0; r < kRows; ++r) factor[r] = Set(a[r]);
  for (int32_t group = 0; group < n_groups; ++group, y += kBlock) {
    between(2 * kRows);
#pragma GCC unroll 4
    for (int32_t col = 0; col < kBlock; col += kLanes) {
      F32 sum = Load(y + col);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        sum = Fma(factor[r],
                  LoadValues<kFormat>(reinterpret_cast<const uint16_t*>(w[r].values) + col), sum);
      Store(y + col, sum);
    }
    for (int r = 0; r < kRows; ++r) w[r].values += w[r].values_step;
  }
}

// q8 and q4: words of four bytes. Their fields (bytes or nibbles) become floats without a shift, so
// a float is its field times the value of the field's position. y is in that order and unit; see
// PartialColumn in kernels.h.
template <Format kFormat, int kRows, typename Between>
inline void AxpyBlocks(RowAt* w, int32_t n_groups, const float* a, float* y, Between& between) {
  constexpr int kFields = WordFields(kFormat), kBits = 32 / kFields;
  constexpr float kZero = kFormat == Format::kQ8 ? 128.0f : 8.0f;
  for (int32_t group = 0; group < n_groups; ++group, y += kGroup) {
    between(2 * kRows);
    F32 factor[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)  // word i of a line belongs to block i % 8
      factor[r] = Mul(Set(a[r]), LoadWeightScales(reinterpret_cast<const uint16_t*>(w[r].scales)));
    for (int32_t at = 0; at < GroupValueBytes(kFormat); at += 4 * kLanes) {
      float* out = y + at / kPartialLine * kFields * kPartialWords + at % kPartialLine / 4;
      F32 sum[kFields];
#pragma GCC unroll 8
      for (int f = 0; f < kFields; ++f) sum[f] = Load(out + f * kPartialWords);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        I32 words = LoadWords(w[r].values + at);
#pragma GCC unroll 8
        for (int f = 0; f < kFields; ++f) {
          if (f == kFields / 2) words = HighHalf(words);
          const int shift = f % (kFields / 2) * kBits;
          const int32_t mask = ((1 << kBits) - 1) << shift;
          const float bias = 8388608.0f + kZero * static_cast<float>(1 << shift);
          sum[f] = Fma(factor[r], Field(words, mask, bias), sum[f]);
        }
      }
#pragma GCC unroll 8
      for (int f = 0; f < kFields; ++f) Store(out + f * kPartialWords, sum[f]);
    }
    for (int r = 0; r < kRows; ++r) {
      w[r].values += w[r].values_step;
      w[r].scales += w[r].scales_step;
    }
  }
}

template <Format kFormat, int kRows, typename Between>
inline void AxpyRows(const Rows& rows, const int32_t* row, const float* a, float* y,
                     Between& between) {
  RowAt w[kRows];
  for (int r = 0; r < kRows; ++r) w[r] = At<kFormat>(rows, row[r]);
  const int32_t n_groups = CountGroups(kFormat, rows.n_cols);
  if constexpr (HasBlocks(kFormat))
    AxpyBlocks<kFormat, kRows>(w, n_groups, a, y, between);
  else
    AxpyValues<kFormat, kRows>(w, n_groups, a, y, between);
}

template <int kRows, typename Between>
inline void Axpy(Format format, const Rows& rows, const int32_t* row, const float* a, float* y,
                 Between& between) {
  if (format == Format::kBf16)
    AxpyRows<Format::kBf16, kRows>(rows, row, a, y, between);
  else if (format == Format::kF16)
    AxpyRows<Format::kF16, kRows>(rows, row, a, y, between);
  else if (format == Format::kQ8)
    AxpyRows<Format::kQ8, kRows>(rows, row, a, y, between);
  else
    AxpyRows<Format::kQ4, kRows>(rows, row, a, y, between);
}

}  // namespace
}  // namespace hybrid
