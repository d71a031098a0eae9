// Dot products of packed rows with quantised vectors: a register tile of kRows rows by kTokens
// tokens.
//
// Each (row, token) pair owns one vector accumulator and sums its groups in order, whatever the
// tile: so a result does not depend on how rows and tokens were tiled, and prefill equals decode to
// the last bit.
//
// One token alone is a matter of memory. Hardware prefetches a stream of addresses that rise one by
// one; a tile of neighbouring rows is none, and prefetch instructions beside it do not help
// (docs/log.md). So rows are taken in pairs, one from each half of the range: two streams, and two
// dot products at a time to hide their latency.
#pragma once

#include "kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

constexpr int32_t kRowTile = 4;
constexpr int32_t kTokenDotTile = 4;

template <int kRows, int kTokens>
inline void DotTileBf16(const Rows& rows, const int32_t* row, const uint8_t* const* x,
                        float (*out)[kTokens]) {
  const int32_t padded = PaddedCols(Format::kBf16, rows.n_cols);
  const uint8_t* w[kRows];
  F32 sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    w[r] = rows.values + row[r] * rows.values_stride;
    for (int t = 0; t < kTokens; ++t) sum[r][t] = Zero();
  }
  for (int32_t col = 0; col < padded; col += 2 * kLanes) {
    Bf16s x_line[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      x_line[t] = LoadBf16s(reinterpret_cast<const uint16_t*>(x[t]) + col);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Bf16s line = LoadBf16s(reinterpret_cast<const uint16_t*>(w[r]) + col);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) sum[r][t] = DotBf16(sum[r][t], line, x_line[t]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) out[r][t] = ReduceAdd(sum[r][t]);
}

// One line of q8 values, or two of q4: the first from the low nibbles, the second, half a group
// further, from the high ones.
template <Format kFormat>
constexpr int32_t kLinesPerLoad = kFormat == Format::kQ4 ? 2 : 1;

// q8 and q4: blocks of integers with scales.
template <Format kFormat, int kRows, int kTokens>
inline void DotTileBlocks(const Rows& rows, const int32_t* row, const uint8_t* const* x,
                          float (*out)[kTokens]) {
  constexpr int32_t kLoads = kLinesPerLoad<kFormat>;
  constexpr int32_t kGroupBytes = kGroup / kLoads;
  const int32_t padded = PaddedCols(kFormat, rows.n_cols), n_blocks = padded / kBlock;
  const uint8_t *w[kRows], *w_scales[kRows];
  F32 sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    w[r] = rows.values + row[r] * rows.values_stride;
    w_scales[r] = rows.scales + row[r] * rows.scales_stride;
    for (int t = 0; t < kTokens; ++t) sum[r][t] = Zero();
  }
  for (int32_t group = 0; group < n_blocks; group += kGroupBlocks) {
    const int32_t x_first = group * kBlock, w_first = x_first / kLoads;
    I32 dot[kRows][kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const int32_t* correction =
          reinterpret_cast<const int32_t*>(x[t] + padded + n_blocks * 4) + group;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        dot[r][t] = kFormat == Format::kQ8 ? StartQ8(correction) : StartQ4(correction);
    }
#pragma GCC unroll 8
    for (int32_t line = 0; line < kGroupBytes; line += kLine) {
      XBytes x_line[kLoads][kTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        for (int load = 0; load < kLoads; ++load)
          x_line[load][t] = LoadX(x[t] + x_first + load * kGroupBytes + line);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* p = w[r] + w_first + line;
        if constexpr (kFormat == Format::kQ8) {
          const Q8Weights weights = LoadQ8Weights(p);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) dot[r][t] = DotQ8(dot[r][t], weights, x_line[0][t]);
        } else {
          const Nibbles weights = LoadQ4Weights(p);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t)
            dot[r][t] = DotQ4(DotQ4(dot[r][t], weights.low, x_line[0][t]), weights.high,
                              x_line[kLoads - 1][t]);
        }
      }
    }
    F32 x_scale[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      x_scale[t] = LoadXScales(reinterpret_cast<const float*>(x[t] + padded) + group);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 w_scale = LoadWeightScales(reinterpret_cast<const uint16_t*>(w_scales[r]) + group);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        sum[r][t] = Fma(ToF32(dot[r][t]), Mul(w_scale, x_scale[t]), sum[r][t]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) out[r][t] = ReduceAdd(sum[r][t]);
}

template <int kRows, int kTokens>
inline void DotTile(Format format, const Rows& rows, const int32_t* row, const uint8_t* const* x,
                    float (*out)[kTokens]) {
  if (format == Format::kBf16)
    DotTileBf16<kRows, kTokens>(rows, row, x, out);
  else if (format == Format::kQ8)
    DotTileBlocks<Format::kQ8, kRows, kTokens>(rows, row, x, out);
  else
    DotTileBlocks<Format::kQ4, kRows, kTokens>(rows, row, x, out);
}

// kRows rows by any number of tokens. Token t's result for row r goes to out[t * out_stride + r].
template <int kRows>
inline void DotRows(Format format, const Rows& rows, const int32_t* row, const uint8_t* x,
                    int64_t x_stride, int32_t n_tokens, float* out, int64_t out_stride) {
  int32_t token = 0;
  for (; token + kTokenDotTile <= n_tokens; token += kTokenDotTile) {
    const uint8_t* tile[kTokenDotTile];
    float dots[kRows][kTokenDotTile];
    for (int t = 0; t < kTokenDotTile; ++t) tile[t] = x + (token + t) * x_stride;
    DotTile<kRows, kTokenDotTile>(format, rows, row, tile, dots);
    for (int t = 0; t < kTokenDotTile; ++t)
      for (int r = 0; r < kRows; ++r) out[(token + t) * out_stride + r] = dots[r][t];
  }
  for (; token < n_tokens; ++token) {
    const uint8_t* tile[1] = {x + token * x_stride};
    float dots[kRows][1];
    DotTile<kRows, 1>(format, rows, row, tile, dots);
    for (int r = 0; r < kRows; ++r) out[token * out_stride + r] = dots[r][0];
  }
}

void GemvOneToken(const GemmArgs& a) {
  const int32_t half = (a.last - a.first) / 2;
  for (int32_t i = 0; i < half; ++i) {
    const int32_t rows[2] = {a.first + i, a.first + half + i};
    float dots[2][1];
    DotTile<2, 1>(a.format, a.rows, rows, &a.x, dots);
    a.out[i] = dots[0][0];
    a.out[half + i] = dots[1][0];
  }
  if ((a.last - a.first) % 2 != 0) {
    const int32_t row = a.last - 1;
    DotRows<1>(a.format, a.rows, &row, a.x, 0, 1, a.out + (row - a.first), 0);
  }
}

void Gemm(const GemmArgs& a) {
  if (a.n_tokens == 1) return GemvOneToken(a);
  int32_t row = a.first;
  for (; row + kRowTile <= a.last; row += kRowTile) {
    int32_t rows[kRowTile];
    for (int r = 0; r < kRowTile; ++r) rows[r] = row + r;
    DotRows<kRowTile>(a.format, a.rows, rows, a.x, a.x_stride, a.n_tokens, a.out + (row - a.first),
                      a.out_stride);
  }
  for (; row < a.last; ++row)
    DotRows<1>(a.format, a.rows, &row, a.x, a.x_stride, a.n_tokens, a.out + (row - a.first),
               a.out_stride);
}

}  // namespace
}  // namespace hybrid
