// Dot products of packed rows with quantised vectors: a register tile of kRows rows by kTokens
// tokens.
//
// Each (row, token) pair owns one vector accumulator and sums its groups in order, whatever the
// tile: so a result does not depend on how rows and tokens were tiled, and prefill equals decode to
// the last bit.
//
// One token alone is a matter of memory. Hardware prefetches only what is first touched in rising
// order (docs/log.md): so a tile of interleaved rows is read strictly so, and InOrder() keeps the
// compiler from moving its loads.
#pragma once

#include "kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

constexpr int32_t kTokenDotTile = 4;

inline void InOrder() {
#if defined(__GNUC__)
  asm volatile("" ::: "memory");
#endif
}

template <Format kFormat>
struct FormatConstant {
  static constexpr Format kValue = kFormat;
};
template <bool kCondition, typename Yes, typename No>
struct SelectType {
  using Type = Yes;
};
template <typename Yes, typename No>
struct SelectType<false, Yes, No> {
  using Type = No;
};
template <bool kCondition, typename Yes, typename No>
using Select = typename SelectType<kCondition, Yes, No>::Type;

// Where one row's groups lie.
struct RowAt {
  const uint8_t *values, *scales;    // of the first group
  int64_t values_step, scales_step;  // bytes to the next
};

template <Format kFormat>
inline RowAt At(const Rows& rows, int32_t row) {
  constexpr int32_t kValues = GroupValueBytes(kFormat), kScales = GroupScaleBytes(kFormat);
  if (!rows.is_interleaved)
    return {rows.values + row * rows.values_stride, rows.scales + row * rows.scales_stride, kValues,
            kScales};
  constexpr int64_t kStep = TileGroupBytes(kFormat);
  const int64_t tile = row / kRowTile, in_tile = row % kRowTile;
  return {rows.values + tile * rows.values_stride + in_tile * kValues,
          rows.scales + tile * rows.scales_stride + in_tile * kScales, kStep, kStep};
}

// Rows of one computation, stepping from group to group: any rows,
template <Format kFormat, int kRows>
class AnyRows {
 public:
  AnyRows(const Rows& rows, const int32_t* row) {
    for (int r = 0; r < kRows; ++r) at_[r] = At<kFormat>(rows, row[r]);
  }
  const uint8_t* values(int r) const { return at_[r].values; }
  const uint8_t* scales(int r) const { return at_[r].scales; }
  void Next() {
    for (int r = 0; r < kRows; ++r) {
      at_[r].values += at_[r].values_step;
      at_[r].scales += at_[r].scales_step;
    }
  }

 private:
  RowAt at_[kRows];
};

// or one tile, with a single pointer: with four, the same loads come at half the speed.
template <Format kFormat>
class OneTile {
 public:
  OneTile(const Rows& rows, const int32_t* row)
      : at_(rows.values + row[0] / kRowTile * rows.values_stride) {}
  const uint8_t* values(int r) const { return at_ + r * GroupValueBytes(kFormat); }
  const uint8_t* scales(int r) const { return at_ + (r - kRowTile) * GroupScaleBytes(kFormat); }
  void Next() { at_ += TileGroupBytes(kFormat); }

 private:
  const uint8_t* at_;
};

template <int kRows, int kTokens, typename Source>
inline void DotTileBf16(Source w, int32_t n_cols, const uint8_t* const* x, float (*out)[kTokens]) {
  const int32_t n_groups = PaddedCols(Format::kBf16, n_cols) / kBlock;
  F32 sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sum[r][t] = Zero();
  for (int32_t group = 0; group < n_groups; ++group) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int32_t col = 0; col < kBlock; col += 2 * kLanes) {
        const Bf16s line = LoadBf16s(reinterpret_cast<const uint16_t*>(w.values(r)) + col);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
          sum[r][t] =
              DotBf16(sum[r][t], line,
                      LoadBf16s(reinterpret_cast<const uint16_t*>(x[t]) + group * kBlock + col));
        if constexpr (kTokens == 1) InOrder();
      }
    }
    w.Next();
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) out[r][t] = ReduceAdd(sum[r][t]);
}

// One line of q8 values, or two of q4: the first from the low nibbles, the second, half a group
// further, from the high ones.
template <Format kFormat>
constexpr int32_t kLinesPerLoad = kFormat == Format::kQ4 ? 2 : 1;

template <Format kFormat>
inline I32 Start(const int32_t* correction) {
  return kFormat == Format::kQ8 ? StartQ8(correction) : StartQ4(correction);
}

// A line of one row against the line, or two, of each token.
template <Format kFormat, int kTokens>
inline void DotLine(const uint8_t* w, const XBytes (*x)[kTokens], I32* dot) {
  if constexpr (kFormat == Format::kQ8) {
    const Q8Weights weights = LoadQ8Weights(w);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) dot[t] = DotQ8(dot[t], weights, x[0][t]);
  } else {
    const Nibbles weights = LoadQ4Weights(w);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      dot[t] = DotQ4(DotQ4(dot[t], weights.low, x[0][t]), weights.high, x[1][t]);
  }
}

// q8 and q4: blocks of integers with scales.
template <Format kFormat, int kRows, int kTokens, typename Source>
inline void DotTileBlocks(Source w, int32_t n_cols, const uint8_t* const* x,
                          float (*out)[kTokens]) {
  constexpr int32_t kLoads = kLinesPerLoad<kFormat>, kGroupBytes = GroupValueBytes(kFormat),
                    kLines = kGroupBytes / kLine;
  const int32_t padded = PaddedCols(kFormat, n_cols), n_blocks = padded / kBlock;
  F32 sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sum[r][t] = Zero();
  for (int32_t group = 0; group < n_blocks; group += kGroupBlocks) {
    F32 w_scale[kRows];
    I32 dot[kRows][kTokens];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      w_scale[r] = LoadWeightScales(reinterpret_cast<const uint16_t*>(w.scales(r)));
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const int32_t* correction =
          reinterpret_cast<const int32_t*>(x[t] + padded + n_blocks * 4) + group;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) dot[r][t] = Start<kFormat>(correction);
    }
    const auto load_x = [&](int line, XBytes(*x_line)[kTokens]) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
        for (int load = 0; load < kLoads; ++load)
          x_line[load][t] = LoadX(x[t] + group * kBlock + load * kGroupBytes + line * kLine);
    };
    if constexpr (kTokens == 1) {
      // x is loaded for every row anew: loads of weights alone, back to back, reach the cache out
      // of order, and q8 then comes at two thirds of the speed.
      InOrder();
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int line = 0; line < kLines; ++line) {
          XBytes x_line[kLoads][1];
          load_x(line, x_line);
          DotLine<kFormat, 1>(w.values(r) + line * kLine, x_line, dot[r]);
          InOrder();
        }
    } else {
#pragma GCC unroll 8
      for (int line = 0; line < kLines; ++line) {
        XBytes x_line[kLoads][kTokens];
        load_x(line, x_line);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          DotLine<kFormat, kTokens>(w.values(r) + line * kLine, x_line, dot[r]);
      }
    }
    w.Next();
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const F32 x_scale = LoadXScales(reinterpret_cast<const float*>(x[t] + padded) + group);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        sum[r][t] = Fma(ToF32(dot[r][t]), Mul(w_scale[r], x_scale), sum[r][t]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) out[r][t] = ReduceAdd(sum[r][t]);
}

// kRows rows with kTokens tokens: row[0] to row[0] + 3 where kIsTile.
template <int kRows, int kTokens, bool kIsTile = false>
inline void DotTile(Format format, const Rows& rows, const int32_t* row, const uint8_t* const* x,
                    float (*out)[kTokens]) {
  const auto dot = [&](auto constant) {
    constexpr Format kFormat = decltype(constant)::kValue;
    using Source = Select<kIsTile, OneTile<kFormat>, AnyRows<kFormat, kRows>>;
    if constexpr (kFormat == Format::kBf16)
      DotTileBf16<kRows, kTokens>(Source(rows, row), rows.n_cols, x, out);
    else
      DotTileBlocks<kFormat, kRows, kTokens>(Source(rows, row), rows.n_cols, x, out);
  };
  if (format == Format::kBf16)
    dot(FormatConstant<Format::kBf16>{});
  else if (format == Format::kQ8)
    dot(FormatConstant<Format::kQ8>{});
  else
    dot(FormatConstant<Format::kQ4>{});
}

// kRows rows with kTokens tokens from `token` on, to a.out.
template <int kRows, int kTokens>
inline void DotTokens(const GemmArgs& a, int32_t row, int32_t token) {
  const uint8_t* x[kTokens];
  float dots[kRows][kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = a.x + (token + t) * a.x_stride;
  DotTile<kRows, kTokens, kRows == kRowTile>(a.format, a.rows, &row, x, dots);
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r)
      a.out[(token + t) * a.out_stride + row - a.first + r] = dots[r][t];
}

template <int kTokens>
inline void DotBlock(const GemmArgs& a, int32_t row, int32_t last, int32_t token) {
  while (row < last) {
    if (a.rows.is_interleaved && row % kRowTile == 0 && row + kRowTile <= last) {
      DotTokens<kRowTile, kTokens>(a, row, token);
      row += kRowTile;
    } else {
      DotTokens<1, kTokens>(a, row++, token);
    }
  }
}

// Blocks of rows that stay in L1 while all tokens pass.
void Gemm(const GemmArgs& a) {
  const int32_t block = a.format == Format::kQ4 ? 16 : 8;
  for (int32_t row = a.first; row < a.last;) {
    const int32_t end = (row / block + 1) * block, last = end < a.last ? end : a.last;
    int32_t token = 0;
    for (; token + kTokenDotTile <= a.n_tokens; token += kTokenDotTile)
      DotBlock<kTokenDotTile>(a, row, last, token);
    for (; token < a.n_tokens; ++token) DotBlock<1>(a, row, last, token);
    row = last;
  }
}

}  // namespace
}  // namespace hybrid
