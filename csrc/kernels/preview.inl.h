// Estimated logits of all rows of the head, from a copy of the head in 2 bits (layout: kernels.h),
// and exact logits of chosen rows. As in predict.inl.h, the lanes of a register are rows, and the
// lines of a tile are read in rising order.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/dot.inl.h"
#include "kernels/kernels.h"
#include "kernels/predict.inl.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// See KernelTable::make_preview_input.
void MakePreviewInput(const float* x, int32_t n, uint8_t* out) {
  const float scale = RoundToInt8(x, n, out);
  int32_t sum = 0;
  int64_t squares = 0;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t integer = static_cast<int8_t>(out[i]);
    sum += integer;
    squares += int64_t{integer} * integer;
  }
  const int32_t padded = RoundUp(n, kPreviewCols);
  const float tail[3] = {scale, -1.5f * static_cast<float>(sum),
                         -0.5f * kPreviewVariance * static_cast<float>(squares)};
  memset(out + n, 0, static_cast<size_t>(padded - n));
  memcpy(out + padded, tail, sizeof(tail));
}

// Writes one tile's logits to `logits` (kPredictTile,). Returns the largest. It is NaN if the input
// holds a NaN: then all logits are NaN. A single logit alone can never be NaN.
inline float PreviewTile(const Preview& p, const uint8_t* tile, const uint8_t* input,
                         const float (&tail)[3], float* logits) {
  constexpr int kRegisters = kPredictTile / kLanes;
  // One sum per 2-bit field: with a single sum, each addition would wait for the one before.
  I32 dots[kRegisters][4];
#pragma GCC unroll 2
  for (int r = 0; r < kRegisters; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) dots[r][i] = ZeroWords();
  for (int32_t col = 0; col < p.n_cols; col += kPreviewCols, tile += kPredictLine) {
    PrefetchL2(tile + kStreamAhead);
#pragma GCC unroll 2
    for (int r = 0; r < kRegisters; ++r) {
      const TwoBits w = LoadTwoBits(tile + r * 4 * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        dots[r][i] = DotQ4(dots[r][i], w.fields[i], BroadcastX(input + col + 4 * i));
      InOrder();
    }
  }
  const float* scales = reinterpret_cast<const float*>(tile);
  F32 largest = Set(-INFINITY);
  for (int r = 0; r < kRegisters; ++r) {
    const I32 dot = SumOfFields(dots[r]);
    const F32 unit = Mul(Load(scales + r * kLanes), Set(tail[0])),
              logit = Mul(Fma(unit, Set(tail[2]), Add(ToFloat(dot), Set(tail[1]))), unit);
    Store(logits + r * kLanes, logit);
    largest = Max(largest, logit);
  }
  return ReduceMax(largest);
}

// See KernelTable::preview.
void PreviewTiles(const Preview& p, int32_t first, int32_t last, const uint8_t* input,
                  float* logits, float* tile_maxima) {
  float tail[3];
  memcpy(tail, input + RoundUp(p.n_cols, kPreviewCols), sizeof(tail));
  const int64_t tile_bytes = PreviewTileBytes(p);
  for (int32_t index = first; index < last; ++index, logits += kPredictTile) {
    const uint8_t* tile = p.tiles + index * tile_bytes;
    const int32_t n = p.n_rows - index * kPredictTile;
    float largest;
    if (n >= kPredictTile) {
      largest = PreviewTile(p, tile, input, tail, logits);
    } else {
      float last_logits[kPredictTile];
      PreviewTile(p, tile, input, tail, last_logits);
      largest = last_logits[0];
      for (int32_t i = 1; i < n; ++i) largest = largest < last_logits[i] ? last_logits[i] : largest;
      memcpy(logits, last_logits, static_cast<size_t>(n) * sizeof(float));
    }
    tile_maxima[index - first] = largest == largest ? largest : INFINITY;
  }
}

// Prefetches the rows of a list while other rows of it are computed.
class ListPrefetcher {
 public:
  ListPrefetcher(Format format, const Rows& matrix, const int32_t* rows, int32_t n)
      : matrix_(matrix), rows_(rows), n_(n), pace_(format), walk_(RowBytes(matrix, format), 0) {}
  void operator()(int32_t n_rows) { Prefetch(pace_.Lines(n_rows)); }
  void Prefetch(int64_t n_lines) {
    walk_.Prefetch(n_lines, n_, [&](int32_t i) { return StartOf(matrix_, rows_[i]); });
  }

 private:
  const Rows& matrix_;
  const int32_t* rows_;
  const int32_t n_;
  Pace pace_;
  RowWalk<> walk_;
};

// See KernelTable::gather_dots.
void GatherDots(Format format, const Rows& matrix, const int32_t* rows, int32_t n, const uint8_t* x,
                float* out) {
  constexpr int64_t kFirstRows = 8;
  ListPrefetcher ahead(format, matrix, rows, n);
  ahead.Prefetch(kFirstRows * RowBytes(matrix, format) / kCacheLine);
  const uint8_t* one_x[1] = {x};
  for (int32_t i = 0; i < n;) {
    float dots[kRowTile][1];
    const bool is_tile = i + kRowTile <= n;
    if (is_tile)
      DotTile<kRowTile, 1, Take::kAny>(format, matrix, rows + i, one_x, dots, ahead);
    else
      DotTile<1, 1, Take::kAny>(format, matrix, rows + i, one_x, dots, ahead);
    for (int32_t r = 0; r < (is_tile ? kRowTile : 1); ++r, ++i) out[rows[i]] = dots[r][0];
  }
}

}  // namespace
}  // namespace hybrid
