// Dot products of packed rows with quantised vectors, in register tiles of kRows rows by kTokens
// tokens.
//
// Each (row, token) pair has its own vector accumulator, which sums the groups of the row in order.
// A result therefore does not depend on how rows and tokens were tiled, and prefill equals decode
// to the last bit.
//
// With a single token, memory bandwidth is the limit. A tile of interleaved rows is then read
// strictly at rising addresses (prefetch.inl.h), and InOrder() keeps the compiler from reordering
// its loads.
#pragma once

#include "kernels/kernels.h"
#include "kernels/prefetch.inl.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

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

// Where the groups of one row lie, for layouts with a fixed step from group to group.
struct RowAt {
  const uint8_t *values, *scales;    // of the first group
  int64_t values_step, scales_step;  // bytes to the next group
};

template <Format kFormat>
inline RowAt At(const Rows& rows, int32_t row) {
  constexpr int32_t kValues = GroupValueBytes(kFormat), kScales = GroupScaleBytes(kFormat);
  if (rows.layout != RowLayout::kInterleaved)
    return {rows.values + row * rows.values_stride, rows.scales + row * rows.scales_stride, kValues,
            kScales};
  constexpr int64_t kStep = TileGroupBytes(kFormat);
  const int64_t tile = row / kRowTile, in_tile = row % kRowTile;
  return {rows.values + tile * rows.values_stride + in_tile * kValues,
          rows.scales + tile * rows.scales_stride + in_tile * kScales, kStep, kStep};
}

// The rows of one computation, which step from group to group. AnyRows takes any rows.
template <Format kFormat, int kRows>
class AnyRows {
 public:
  AnyRows(const Rows& rows, const int32_t* row)
      : n_groups_(rows.layout == RowLayout::kBitReversed ? CountGroups(kFormat, rows.n_cols) : 0) {
    for (int r = 0; r < kRows; ++r) at_[r] = At<kFormat>(rows, row[r]);
  }
  const uint8_t* values(int r) const { return at_[r].values + values_offset_; }
  const uint8_t* scales(int r) const { return at_[r].scales + scales_offset_; }
  void Next() {
    if (n_groups_ == 0) {
      values_offset_ += at_[0].values_step;
      scales_offset_ += at_[0].scales_step;
    } else {
      place_ = NextPlace(place_, n_groups_);
      values_offset_ = place_ * at_[0].values_step;
      scales_offset_ = place_ * at_[0].scales_step;
    }
  }

 private:
  RowAt at_[kRows];
  int64_t values_offset_ = 0, scales_offset_ = 0;
  const int32_t n_groups_;  // of bit-reversed rows; 0 for the other layouts
  int32_t place_ = 0;
};

// OneTile takes the rows of one tile, with a single pointer: with four pointers, the same loads run
// at half the speed.
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

// bf16 and f16: one step takes a register of bf16 pairs, or a register of widened fp16 values.
template <Format kFormat>
constexpr int32_t kStepCols = kFormat == Format::kBf16 ? 2 * kLanes : kLanes;

template <Format kFormat>
inline auto LoadStep(const uint8_t* w, int32_t col) {
  const uint16_t* values = reinterpret_cast<const uint16_t*>(w) + col;
  if constexpr (kFormat == Format::kBf16)
    return LoadBf16s(values);
  else
    return LoadFp16(values);
}

template <Format kFormat, typename Weights>
inline F32 DotStep(F32 sum, const Weights& w, const uint8_t* x, int32_t col) {
  if constexpr (kFormat == Format::kBf16)
    return DotBf16(sum, w, LoadBf16s(reinterpret_cast<const uint16_t*>(x) + col));
  else
    return Fma(w, Load(reinterpret_cast<const float*>(x) + col), sum);
}

// bf16 and f16. `between` is called after each row's part of a group or, with several tokens, after
// a group, with the number of rows (prefetch.inl.h).
template <Format kFormat, int kRows, int kTokens, typename Source, typename Between>
inline void DotTileValues(Source w, int32_t n_cols, const uint8_t* const* x, float (*out)[kTokens],
                          Between& between) {
  const int32_t n_groups = PaddedCols(kFormat, n_cols) / kBlock;
  F32 sum[kRows][kTokens];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) sum[r][t] = Zero();
  for (int32_t group = 0; group < n_groups; ++group) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int32_t col = 0; col < kBlock; col += kStepCols<kFormat>) {
        const auto step = LoadStep<kFormat>(w.values(r), col);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
          sum[r][t] = DotStep<kFormat>(sum[r][t], step, x[t], group * kBlock + col);
        if constexpr (kTokens == 1) InOrder();
      }
      if constexpr (kTokens == 1) between(1);
    }
    if constexpr (kTokens > 1) between(kRows);
    w.Next();
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) out[r][t] = ReduceAdd(sum[r][t]);
}

template <Format kFormat>
inline I32 Start(const int32_t* correction) {
  return kFormat == Format::kQ8 ? StartQ8(correction) : StartQ4(correction);
}

template <Format kFormat>
inline auto Unpack(XBytes bytes) {
  if constexpr (kFormat == Format::kQ8)
    return UnpackQ8(bytes);
  else
    return UnpackQ4(bytes);
}

// Adds the dot products of one register of values. A q4 register meets two of x: the first one
// belongs to the low nibbles, the second one, half a group further, to the high nibbles.
template <Format kFormat, typename Weights>
inline I32 DotLine(I32 dot, const Weights& w, const uint8_t* x, XBytes (*load)(const uint8_t*)) {
  if constexpr (kFormat == Format::kQ8)
    return DotQ8(dot, w, load(x));
  else
    return DotQ4(DotQ4(dot, w.low, load(x)), w.high, load(x + GroupValueBytes(kFormat)));
}

// q8 and q4: blocks of integers with scales. One token: memory is read strictly in order.
template <Format kFormat, int kRows, typename Source, typename Between>
inline void DotTileBlock(Source w, int32_t n_cols, const uint8_t* x, float (*out)[1],
                         Between& between) {
  constexpr int32_t kLines = GroupValueBytes(kFormat) / kLine;
  const int32_t padded = PaddedCols(kFormat, n_cols), n_blocks = padded / kBlock;
  const int32_t* corrections = reinterpret_cast<const int32_t*>(x + padded + n_blocks * 4);
  Blocks sum[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = ZeroBlocks();
  for (int32_t group = 0; group < n_blocks; group += kGroupBlocks) {
    Blocks w_scale[kRows];
    I32 dot[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      w_scale[r] = LoadBlockScales(reinterpret_cast<const uint16_t*>(w.scales(r)));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) dot[r] = Start<kFormat>(corrections + group);
    // x is loaded anew for every row. Loads of weights alone, back to back, reach the cache out of
    // order, and q8 then runs at two thirds of the speed.
    InOrder();
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int line = 0; line < kLines; ++line) {
        const auto w_line = Unpack<kFormat>(LoadX(w.values(r) + line * kLine));
        dot[r] = DotLine<kFormat>(dot[r], w_line, x + group * kBlock + line * kLine, LoadX);
        InOrder();
      }
      between(1);
    }
    w.Next();
    const Blocks x_scale = LoadXScales(reinterpret_cast<const float*>(x + padded) + group);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      sum[r] = FmaBlocks(BlockSums(dot[r]), w_scale[r], x_scale, sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) out[r][0] = AddBlocks(sum[r]);
}

// The same for several tokens, with the same sums. Arithmetic now counts as much as memory: weights
// are unpacked once for all tokens, and kSumRows rows share a register.
template <Format kFormat, int kRows, int kTokens, typename Source, typename Between>
inline void DotTileBlocks(Source w, int32_t n_cols, const uint8_t* const* x, float (*out)[kTokens],
                          Between& between) {
  constexpr int32_t kLines = GroupValueBytes(kFormat) / kLine;
  constexpr int kSums = (kRows + kSumRows - 1) / kSumRows;
  // The rows of sum s. A last row that is alone is summed with itself.
  const auto first = [](int s) { return s * kSumRows; };
  const auto last = [](int s) {
    return s * kSumRows + kSumRows <= kRows ? s * kSumRows + kSumRows - 1 : kRows - 1;
  };
  const int32_t padded = PaddedCols(kFormat, n_cols), n_blocks = padded / kBlock;
  RowBlocks sum[kSums][kTokens];
#pragma GCC unroll 8
  for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) sum[s][t] = ZeroRowBlocks();
  for (int32_t group = 0; group < n_blocks; group += kGroupBlocks) {
    I32 dot[kSums][kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const int32_t* corrections =
          reinterpret_cast<const int32_t*>(x[t] + padded + n_blocks * 4) + group;
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s) dot[s][t] = ForAllRows(Start<kFormat>(corrections));
    }
    between(kRows);
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line) {
      RowSteps bytes[kSums];
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s)
        bytes[s] =
            LoadRowSteps(w.values(first(s)) + line * kLine, w.values(last(s)) + line * kLine);
#pragma GCC unroll 8
      for (int step = 0; step < kSumRows; ++step) {
        decltype(Unpack<kFormat>(XBytes{})) w_step[kSums];
#pragma GCC unroll 8
        for (int s = 0; s < kSums; ++s) w_step[s] = Unpack<kFormat>(bytes[s].step[step]);
        const int32_t at = group * kBlock + line * kLine + step * kLine / kSumRows;
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
          for (int s = 0; s < kSums; ++s)
            dot[s][t] = DotLine<kFormat>(dot[s][t], w_step[s], x[t] + at, LoadRowX);
        InOrder();  // x does not stay in registers, which the sums need
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) {
      const RowBlocks w_scale =
          LoadRowBlockScales(reinterpret_cast<const uint16_t*>(w.scales(first(s))),
                             reinterpret_cast<const uint16_t*>(w.scales(last(s))));
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        sum[s][t] = FmaBlocks(RowBlockSums(dot[s][t]), w_scale,
                              LoadRowXScales(reinterpret_cast<const float*>(x[t] + padded) + group),
                              sum[s][t]);
    }
    w.Next();
  }
#pragma GCC unroll 8
  for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) AddRowBlocks(sum[s][t], &out[first(s)][t], &out[last(s)][t]);
}

// Which rows a computation takes: any, or those of one tile.
enum class Take { kAny, kTile };

// A `between` that prefetches the memory behind the rows.
struct Behind {};
template <typename Between>
constexpr bool kIsBehind = false;
template <>
constexpr bool kIsBehind<Behind> = true;

// Dot products of kRows rows with kTokens tokens.
template <int kRows, int kTokens, Take kTake, typename Between>
inline void DotTile(Format format, const Rows& rows, const int32_t* row, const uint8_t* const* x,
                    float (*out)[kTokens], Between& between) {
  const auto dot = [&](auto constant) {
    constexpr Format kFormat = decltype(constant)::kValue;
    using Source = Select<kTake == Take::kTile, OneTile<kFormat>, AnyRows<kFormat, kRows>>;
    const auto sum = [&](auto& meanwhile) {
      if constexpr (HasBlocks(kFormat) && kTokens == 1)
        DotTileBlock<kFormat, kRows>(Source(rows, row), rows.n_cols, x[0], out, meanwhile);
      else if constexpr (HasBlocks(kFormat))
        DotTileBlocks<kFormat, kRows, kTokens>(Source(rows, row), rows.n_cols, x, out, meanwhile);
      else
        DotTileValues<kFormat, kRows, kTokens>(Source(rows, row), rows.n_cols, x, out, meanwhile);
    };
    if constexpr (kIsBehind<Between>) {
      StreamPrefetcher<kFormat> ahead(StartOf(rows, row[0]));
      sum(ahead);
    } else {
      sum(between);
    }
  };
  if (format == Format::kBf16)
    dot(FormatConstant<Format::kBf16>{});
  else if (format == Format::kF16)
    dot(FormatConstant<Format::kF16>{});
  else if (format == Format::kQ8)
    dot(FormatConstant<Format::kQ8>{});
  else
    dot(FormatConstant<Format::kQ4>{});
  if (rows.matrix_scale == 1.0f) return;
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) out[r][t] *= rows.matrix_scale;
}

// Dot products of kRows rows with kTokens tokens from `token` on, stored in a.out.
template <int kRows, int kTokens, Take kTake, typename Between>
inline void DotTokens(const GemmArgs& a, int32_t first, int32_t token, Between& between) {
  const uint8_t* x[kTokens];
  float dots[kRows][kTokens];
  int32_t row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = first + r;
  for (int t = 0; t < kTokens; ++t) x[t] = a.x + (token + t) * a.x_stride;
  DotTile<kRows, kTokens, kTake>(a.format, a.rows, row, x, dots, between);
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r)
      a.out[(token + t) * a.out_stride + first - a.first + r] = dots[r][t];
}

// Rows [row, last) with kTokens tokens from `token` on.
template <int kTokens, typename Between>
inline void DotBlock(const GemmArgs& a, int32_t row, int32_t last, int32_t token,
                     Between& between) {
  const bool is_interleaved = a.rows.layout == RowLayout::kInterleaved;
  while (row < last) {
    const bool is_whole = row + kRowTile <= last && (!is_interleaved || row % kRowTile == 0);
    if (is_whole && is_interleaved)
      DotTokens<kRowTile, kTokens, Take::kTile>(a, row, token, between);
    else if (is_whole)
      DotTokens<kRowTile, kTokens, Take::kAny>(a, row, token, between);
    else
      DotTokens<1, kTokens, Take::kAny>(a, row, token, between);
    row += is_whole ? kRowTile : 1;
  }
}

// Tokens that are computed at once: the integers, scales and sums of a tile then fit the registers.
inline constexpr int TokensAtOnce(bool has_blocks) { return has_blocks && kLanes < 16 ? 2 : 4; }
// How often the rows are computed until all tokens have passed.
template <int kTokens>
inline int32_t CountPasses(int32_t n_tokens) {
  return (n_tokens + kTokens - 1) / kTokens;
}

// Rows [row, last) with all tokens, kTokens at once. `before` is called before each computation.
template <int kTokens, typename Between, typename Before>
inline void DotAllTokens(const GemmArgs& a, int32_t row, int32_t last, Between& between,
                         Before& before) {
  int32_t token = 0;
  for (; token + kTokens <= a.n_tokens; token += kTokens) {
    before();
    DotBlock<kTokens>(a, row, last, token, between);
  }
  if constexpr (kTokens > 2) {
    if (a.n_tokens - token == 3) return DotBlock<3>(a, row, last, token, between);
    if (a.n_tokens - token == 2) return DotBlock<2>(a, row, last, token, between);
  }
  if (token < a.n_tokens) DotBlock<1>(a, row, last, token, between);
}

// Many tokens: blocks of rows stay in L1 while all tokens pass.
template <int kTokens>
inline void GemmBlocks(const GemmArgs& a) {
  const int32_t block = a.format == Format::kQ4 ? 16 : 8;
  Nothing nothing;
  for (int32_t row = a.first; row < a.last;) {
    const int32_t end = (row / block + 1) * block, last = end < a.last ? end : a.last;
    BlockPrefetcher next(a.rows, end, end + block, a.n_tokens / kTokens);
    DotAllTokens<kTokens>(a, row, last, nothing, next);
    row = last;
  }
}

// Few tokens: memory still matters most. Each tile of rows passes all tokens, while `between`
// prefetches. After a tile, `done(first, last)` is called with its rows.
template <int kTokens, typename Between, typename Done>
inline void GemmFew(const GemmArgs& a, Between& between, const Done& done) {
  const auto nothing = [] {};
  for (int32_t row = a.first; row < a.last;) {
    const int32_t end = (row / kRowTile + 1) * kRowTile, last = end < a.last ? end : a.last;
    DotAllTokens<kTokens>(a, row, last, between, nothing);
    done(row, last);
    row = last;
  }
}

template <int kTokens>
inline void GemmAs(const GemmArgs& a) {
  if (a.n_tokens == 1) {
    Behind behind;
    DotBlock<1>(a, a.first, a.last, 0, behind);
  } else if (a.n_tokens <= kFewTokens) {
    SharedStream stream(a.format, StartOf(a.rows, a.first), CountPasses<kTokens>(a.n_tokens));
    GemmFew<kTokens>(a, stream, [](int32_t, int32_t) {});
  } else {
    GemmBlocks<kTokens>(a);
  }
}

void Gemm(const GemmArgs& a) {
  if (HasBlocks(a.format))
    GemmAs<TokensAtOnce(true)>(a);
  else
    GemmAs<TokensAtOnce(false)>(a);
}

}  // namespace
}  // namespace hybrid
