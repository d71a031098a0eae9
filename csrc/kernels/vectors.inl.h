// Everything that works on one vector: norm, quantisation, dequantisation, sums of partials, fp16.
#pragma once

#include <math.h>
#include <string.h>

#include "bf16.h"
#include "kernels.h"
#include "sparse_ffn.inl.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// Where natural column `col` stands in a packed row.
inline int32_t ColumnOrder(Format format, int32_t col) {
  if (format == Format::kBf16) return col;
  const int32_t in_group = col % kGroup, block = in_group / kBlock, element = in_group % kBlock;
  return col - in_group + element / 4 * kBlock + block * 4 + element % 4;
}

// Where the natural columns of a group of partial sums stand.
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

// Of 32 floats; compared as integers, so that a NaN is the largest of all.
inline float LargestMagnitude(const float* x) {
  uint32_t largest = 0;
  for (int i = 0; i < kBlock; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  memcpy(&magnitude, &largest, sizeof(magnitude));
  return magnitude;
}

void Quantize(Format format, const float* x, int32_t n, uint8_t* out) {
  const int32_t padded = PaddedCols(format, n);
  if (format == Format::kBf16) {
    uint16_t* values = reinterpret_cast<uint16_t*>(out);
    for (int32_t i = 0; i < n; ++i) values[i] = NarrowBf16(x[i]);
    for (int32_t i = n; i < padded; ++i) values[i] = 0;
    return;
  }
  const int32_t n_blocks = padded / kBlock;
  float* scales = reinterpret_cast<float*>(out + padded);
  int32_t* corrections = reinterpret_cast<int32_t*>(out + padded + 4 * n_blocks);
  for (int32_t block = 0; block < n_blocks; ++block) {
    const int32_t first = block * kBlock;
    float values[kBlock] = {};
    if (first < n)
      memcpy(values, x + first, sizeof(float) * (n - first < kBlock ? n - first : kBlock));
    const float largest = LargestMagnitude(values);
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    scales[block] = largest / 127.0f;
    // Plain loops, which the compiler makes vectors of.
    int32_t integers[kBlock], sum = 0;
    int8_t bytes[kBlock];
    for (int32_t i = 0; i < kBlock; ++i) {
      const float scaled = rintf(values[i] * inverse);
      // A NaN or an infinity in x shows in the block's scale; here it only must not be undefined.
      integers[i] = static_cast<int32_t>(scaled >= -127.0f && scaled <= 127.0f ? scaled : 0.0f);
    }
    for (int32_t i = 0; i < kBlock; ++i) sum += integers[i];
    for (int32_t i = 0; i < kBlock; ++i) bytes[i] = static_cast<int8_t>(integers[i]);
    corrections[block] = -128 * sum;
    // Four elements of a block stay together (see ColumnOrder).
    uint8_t* group = out + block / kGroupBlocks * kGroup + block % kGroupBlocks * 4;
    for (int32_t k = 0; k < kBlock / 4; ++k) memcpy(group + k * kBlock, bytes + 4 * k, 4);
  }
}

template <Format kFormat>
inline void DequantizeBlocks(const Rows& rows, int32_t row, float scale, float* out) {
  // As a row that is added to zero, then put into natural order.
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

void Dequantize(Format format, const Rows& rows, int32_t row, float scale, float* out) {
  if (format == Format::kQ8) return DequantizeBlocks<Format::kQ8>(rows, row, scale, out);
  if (format == Format::kQ4) return DequantizeBlocks<Format::kQ4>(rows, row, scale, out);
  const RowAt w = At<Format::kBf16>(rows, row);
  for (int32_t i = 0; i < rows.n_cols; ++i) {
    const uint8_t* group = w.values + i / kBlock * w.values_step;
    out[i] = WidenBf16(reinterpret_cast<const uint16_t*>(group)[i % kBlock]) * scale;
  }
}

template <Format kFormat>
inline void AddNatural(const float* sums, int32_t n, float scale, float* x) {
  const PartialColumns& columns = kPartialColumns<kFormat>;
  for (int32_t i = 0; i < n; ++i) x[i] += scale * (sums[columns.index[i]] * columns.unit[i]);
}

void SumPartials(const float* partials, int64_t stride, int32_t n_pieces, int32_t n, float* out) {
  for (int32_t col = 0; col < n; col += kLanes) {
    F32 parts[kMaxPieces];
    for (int32_t piece = 0; piece < n_pieces; ++piece)
      parts[piece] = Load(partials + piece * stride + col);
    for (int32_t half = n_pieces / 2; half > 0; half /= 2)
      for (int32_t piece = 0; piece < half; ++piece)
        parts[piece] = Add(parts[piece], parts[piece + half]);
    Store(out + col, parts[0]);
  }
}

void AddPartials(Format format, const float* partials, int64_t stride, int32_t n_pieces, int32_t n,
                 float scale, float* x) {
  for (int32_t group = 0; group < n; group += kGroup) {
    const int32_t n_cols = n - group < kGroup ? n - group : kGroup;
    const int32_t n_packed = format == Format::kBf16 ? RoundUp(n_cols, kBlock) : kGroup;
    float sums[kGroup];
    SumPartials(partials + group, stride, n_pieces, n_packed, sums);
    if (format == Format::kQ4)
      AddNatural<Format::kQ4>(sums, n_cols, scale, x + group);
    else if (format == Format::kQ8)
      AddNatural<Format::kQ8>(sums, n_cols, scale, x + group);
    else
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

float Read(const float* x, int64_t n) {
  constexpr int kSums = 8;  // enough for additions in flight not to limit
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
