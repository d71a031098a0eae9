// Kernels that work on one vector: norm, quantisation, dequantisation, sums of partials, fp16.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/bf16.h"
#include "kernels/kernels.h"
#include "kernels/sparse_ffn.inl.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// The position of natural column `col` in a packed row.
inline int32_t ColumnOrder(Format format, int32_t col) {
  if (!HasBlocks(format)) return col;
  const int32_t in_group = col % kGroup, block = in_group / kBlock, element = in_group % kBlock;
  return col - in_group + element / 4 * kBlock + block * 4 + element % 4;
}

// For each natural column of a group: its position among the partial sums, and the unit of that
// sum.
struct PartialColumns {
  int32_t index[kGroup];
  float unit[kGroup];
};
constexpr PartialColumns MakePartialColumns(Format format) {
  PartialColumns columns = {};
  for (int32_t col = 0; col < kGroup; ++col) {
    const PartialColumn column = PartialColumnOf(format, col);
    columns.index[col] = column.index;
    columns.unit[col] = column.unit;
  }
  return columns;
}
template <Format kFormat>
constexpr PartialColumns kPartialColumns = MakePartialColumns(kFormat);

// Quantises one group. In `values`, four elements of a block stay together (see ColumnOrder).
inline void QuantizeGroup(const float* x, uint8_t* values, float* scales, int32_t* corrections) {
  F32x8 largest[kGroupBlocks];
#pragma GCC unroll 8
  for (int32_t block = 0; block < kGroupBlocks; ++block) {
    const float* b = x + block * kBlock;
    largest[block] = LargerMagnitude(LargerMagnitude(Load8(b), Load8(b + 8)),
                                     LargerMagnitude(Load8(b + 16), Load8(b + 24)));
  }
  Transpose(largest);  // lanes are blocks
#pragma GCC unroll 8
  for (int32_t half = kGroupBlocks / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int32_t i = 0; i < half; ++i) largest[i] = LargerMagnitude(largest[i], largest[i + half]);
  float magnitudes[kGroupBlocks];
  Store8(magnitudes, largest[0]);
  // A NaN or an infinity in x shows in the block's scale. The integers of that block become 0.
  float factors[kGroupBlocks];
#pragma GCC unroll 8
  for (int32_t block = 0; block < kGroupBlocks; ++block) {
    factors[block] = 127.0f / magnitudes[block];
    factors[block] = magnitudes[block] > 0.0f ? factors[block] : 0.0f;
    scales[block] = magnitudes[block] / 127.0f;
  }
  I32x8 words[kGroupBlocks], sums[kGroupBlocks];
#pragma GCC unroll 8
  for (int32_t block = 0; block < kGroupBlocks; ++block)
    words[block] = RoundBlock(x + block * kBlock, factors[block], &sums[block]);
  Transpose(words);
#pragma GCC unroll 8
  for (int32_t lane = 0; lane < 8; ++lane) Store8(values + kWordOfLane[lane] * kBlock, words[lane]);
  Transpose(sums);
#pragma GCC unroll 8
  for (int32_t half = kGroupBlocks / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int32_t i = 0; i < half; ++i) sums[i] = Add8(sums[i], sums[i + half]);
  Store8(corrections, sums[0]);
#pragma GCC unroll 8
  for (int32_t block = 0; block < kGroupBlocks; ++block) corrections[block] *= -128;
}

void Quantize(Format format, const float* x, int32_t n, uint8_t* out) {
  const int32_t padded = PaddedCols(format, n);
  if (format == Format::kBf16) {
    uint16_t* values = reinterpret_cast<uint16_t*>(out);
    for (int32_t i = 0; i < n; ++i) values[i] = NarrowBf16(x[i]);
    for (int32_t i = n; i < padded; ++i) values[i] = 0;
    return;
  }
  if (format == Format::kF16) {
    memcpy(out, x, sizeof(float) * static_cast<size_t>(n));
    memset(out + sizeof(float) * static_cast<size_t>(n), 0,
           sizeof(float) * static_cast<size_t>(padded - n));
    return;
  }
  const int32_t n_blocks = padded / kBlock;
  float* scales = reinterpret_cast<float*>(out + padded);
  int32_t* corrections = reinterpret_cast<int32_t*>(out + padded + 4 * n_blocks);
  for (int32_t first = 0; first < padded; first += kGroup) {
    float last_values[kGroup] = {};
    const bool is_whole = first + kGroup <= n;
    if (!is_whole) memcpy(last_values, x + first, sizeof(float) * static_cast<size_t>(n - first));
    QuantizeGroup(is_whole ? x + first : last_values, out + first, scales + first / kBlock,
                  corrections + first / kBlock);
  }
}

template <Format kFormat>
inline void DequantizeBlocks(const Rows& rows, int32_t row, float scale, float* out) {
  // The row is added to zero, as in the FFN, and then brought into natural order.
  float packed[kGroup];
  const float one = 1.0f;
  RowAt w = At<kFormat>(rows, row);
  const Nothing nothing;
  const PartialColumns& columns = kPartialColumns<kFormat>;
  for (int32_t first = 0; first < rows.n_cols; first += kGroup) {
    for (int32_t col = 0; col < kGroup; col += kLanes) Store(packed + col, Zero());
    AxpyBlocks<kFormat, 1>(&w, 1, &one, packed, nothing);
    for (int32_t i = 0; i < kGroup && first + i < rows.n_cols; ++i)
      out[first + i] = packed[columns.index[i]] * columns.unit[i] * scale;
  }
}

template <Format kFormat>
inline void DequantizeValues(const Rows& rows, int32_t row, float scale, float* out) {
  const RowAt w = At<kFormat>(rows, row);
  for (int32_t first = 0; first < rows.n_cols; first += kBlock) {
    const uint16_t* values =
        reinterpret_cast<const uint16_t*>(w.values + first / kBlock * w.values_step);
    float block[kBlock];
    for (int32_t col = 0; col < kBlock; col += kLanes)
      Store(block + col, Mul(LoadValues<kFormat>(values + col), Set(scale)));
    const int32_t n = rows.n_cols - first < kBlock ? rows.n_cols - first : kBlock;
    memcpy(out + first, block, sizeof(float) * static_cast<size_t>(n));
  }
}

void Dequantize(Format format, const Rows& rows, int32_t row, float scale, float* out) {
  scale *= rows.matrix_scale;
  if (format == Format::kQ8) return DequantizeBlocks<Format::kQ8>(rows, row, scale, out);
  if (format == Format::kQ4) return DequantizeBlocks<Format::kQ4>(rows, row, scale, out);
  if (format == Format::kF16) return DequantizeValues<Format::kF16>(rows, row, scale, out);
  DequantizeValues<Format::kBf16>(rows, row, scale, out);
}

// x[c] += scale * the sum that belongs to natural column c, for one group.
template <Format kFormat>
inline void AddNatural(const float* sums, int32_t n, float scale, float* x) {
  const PartialColumns& columns = kPartialColumns<kFormat>;
  if (!HasBlocks(kFormat) || n < kGroup) {
    for (int32_t i = 0; i < n; ++i) x[i] += scale * (sums[columns.index[i]] * columns.unit[i]);
    return;
  }
  // The same element of all eight blocks is contiguous: take eight elements of eight blocks at
  // once.
  for (int32_t first = 0; first < kBlock; first += 8) {
    F32x8 rows[kGroupBlocks];
    for (int32_t i = 0; i < 8; ++i)
      rows[i] = Mul8(Load8(sums + columns.index[first + i]), columns.unit[first + i]);
    Transpose(rows);
    for (int32_t block = 0; block < kGroupBlocks; ++block) {
      float* out = x + block * kBlock + first;
      Store8(out, Add8(Load8(out), Mul8(rows[block], scale)));
    }
  }
}

template <int kPieces>
inline void SumPieces(const float* partials, int64_t stride, int32_t n, float* out) {
  for (int32_t col = 0; col < n; col += kLanes) {
    F32 parts[kPieces];
#pragma GCC unroll 16
    for (int piece = 0; piece < kPieces; ++piece)
      parts[piece] = Load(partials + piece * stride + col);
#pragma GCC unroll 4
    for (int half = kPieces / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int piece = 0; piece < half; ++piece)
        parts[piece] = Add(parts[piece], parts[piece + half]);
    Store(out + col, parts[0]);
  }
}

void SumPartials(const float* partials, int64_t stride, int32_t n_pieces, int32_t n, float* out) {
  static_assert(kMaxPieces == 16, "every power of two up to it has a case");
  switch (n_pieces) {
    case 1:
      return SumPieces<1>(partials, stride, n, out);
    case 2:
      return SumPieces<2>(partials, stride, n, out);
    case 4:
      return SumPieces<4>(partials, stride, n, out);
    case 8:
      return SumPieces<8>(partials, stride, n, out);
    default:
      return SumPieces<16>(partials, stride, n, out);
  }
}

void AddPartials(Format format, const float* partials, int64_t stride, int32_t n_pieces, int32_t n,
                 float scale, float* x) {
  for (int32_t group = 0; group < n; group += kGroup) {
    const int32_t n_cols = n - group < kGroup ? n - group : kGroup;
    const int32_t n_packed = HasBlocks(format) ? kGroup : RoundUp(n_cols, kBlock);
    float sums[kGroup];
    SumPartials(partials + group, stride, n_pieces, n_packed, sums);
    if (format == Format::kQ4)
      AddNatural<Format::kQ4>(sums, n_cols, scale, x + group);
    else if (format == Format::kQ8)
      AddNatural<Format::kQ8>(sums, n_cols, scale, x + group);
    else  // f16 has the same order of partial sums
      AddNatural<Format::kBf16>(sums, n_cols, scale, x + group);
  }
}

void RmsNorm(const float* x, const float* weight, int32_t n, float eps, float scale, float* out) {
  F32 lanes = Zero();
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32 v = Load(x + i);
    lanes = Fma(v, v, lanes);
  }
  float sum = ReduceAdd(lanes);
  for (; i < n; ++i) sum += x[i] * x[i];
  const float inverse = 1.0f / sqrtf(sum / static_cast<float>(n) + eps);
  for (i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * inverse) * scale;
}

void ToFp16(const float* x, int32_t n, uint16_t* out) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreFp16(out + i, Load(x + i));
  if (i < n) {
    float lanes[kLanes] = {};
    uint16_t halves[kLanes];
    for (int32_t j = i; j < n; ++j) lanes[j - i] = x[j];
    StoreFp16(halves, Load(lanes));
    for (int32_t j = i; j < n; ++j) out[j] = halves[j - i];
  }
}

float ToKv(KvFormat kv, const float* x, int32_t n, uint16_t* out) {
  uint32_t largest = 0;  // compared as integers, so that a NaN counts as the largest of all
  for (int32_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  if (kv == KvFormat::kFp16)
    ToFp16(x, n, out);
  else
    for (int32_t i = 0; i < n; ++i) out[i] = NarrowBf16(x[i]);
  float magnitude;
  memcpy(&magnitude, &largest, sizeof(magnitude));
  return magnitude;
}

float Read(const float* x, int64_t n) {
  constexpr int kSums = 8;  // so many that the latency of additions does not limit the speed
  F32 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Zero();
  for (int64_t at = 0; at < n; at += kSums * kLanes)
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) sums[i] = Add(sums[i], Load(x + at + i * kLanes));
  for (int i = 1; i < kSums; ++i) sums[0] = Add(sums[0], sums[i]);
  return ReduceAdd(sums[0]);
}

}  // namespace
}  // namespace hybrid
