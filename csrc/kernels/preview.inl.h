// Logits of all rows of the head from a copy of it in 2 bits, and of some rows in full. As in
// predict.inl.h lanes are rows, and a tile's lines are read in rising order.
#pragma once

#include <math.h>
#include <string.h>

#include "dot.inl.h"
#include "kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// See KernelTable::make_preview_input.
void MakePreviewInput(const float* x, int32_t n, uint8_t* out) {
  float largest = 0.0f;
  bool has_nan = false;
  for (int32_t i = 0; i < n; ++i) {
    const float magnitude = fabsf(x[i]);
    largest = magnitude > largest ? magnitude : largest;
    has_nan |= x[i] != x[i];
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  int32_t sum = 0;
  for (int32_t i = 0; i < n; ++i) {
    const float scaled = rintf(x[i] * inverse);
    const int32_t integer =
        static_cast<int32_t>(scaled >= -127.0f && scaled <= 127.0f ? scaled : 0.0f);
    sum += integer;
    out[i] = static_cast<uint8_t>(integer);
  }
  // Every logit becomes a NaN.
  const float tail[2] = {has_nan ? NAN : largest / 127.0f, -1.5f * static_cast<float>(sum)};
  memcpy(out + n, tail, sizeof(tail));
}

// One tile's logits to `logits` (kPredictTile,).
inline void PreviewTile(const Preview& p, const uint8_t* tile, const uint8_t* input, float scale,
                        float correction, float* logits) {
  constexpr int kRegisters = kPredictTile / kLanes;
  constexpr int64_t kBytesAhead = 6 << 10;
  I32 dots[4][kRegisters];  // four sums a register: one would wait for itself
  for (auto& sums : dots)
    for (I32& sum : sums) sum = ZeroWords();
  for (int32_t col = 0; col < p.n_cols; col += kPreviewCols, tile += kPredictLine) {
    PrefetchL2(tile + kBytesAhead);
    XBytes x[4];
    for (int i = 0; i < 4; ++i) x[i] = BroadcastX(input + col + 4 * i);
#pragma GCC unroll 2
    for (int r = 0; r < kRegisters; ++r) {
      const Crumbs w = LoadCrumbs(tile + r * 4 * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) dots[i][r] = DotQ4(dots[i][r], w.fields[i], x[i]);
      InOrder();
    }
  }
  const float* scales = reinterpret_cast<const float*>(tile);
  for (int r = 0; r < kRegisters; ++r) {
    const I32 dot = AddWords(AddWords(dots[0][r], dots[1][r]), AddWords(dots[2][r], dots[3][r]));
    Store(logits + r * kLanes,
          Mul(Add(ToFloat(dot), Set(correction)), Mul(Load(scales + r * kLanes), Set(scale))));
  }
}

// See KernelTable::preview.
void PreviewTiles(const Preview& p, int32_t first, int32_t last, const uint8_t* input,
                  float* logits, float* tile_maxima) {
  float tail[2];
  memcpy(tail, input + p.n_cols, sizeof(tail));
  const int64_t tile_bytes = PreviewTileBytes(p);
  for (int32_t index = first; index < last; ++index, logits += kPredictTile) {
    float tile[kPredictTile];
    PreviewTile(p, p.tiles + index * tile_bytes, input, tail[0], tail[1], tile);
    const int32_t left = p.n_rows - index * kPredictTile,
                  n = left < kPredictTile ? left : kPredictTile;
    float largest = -INFINITY;
    for (int32_t i = 0; i < n; ++i) {
      largest = tile[i] > largest ? tile[i] : largest;
      if (tile[i] != tile[i]) largest = INFINITY;
    }
    tile_maxima[index - first] = largest;
    memcpy(logits, tile, static_cast<size_t>(n) * sizeof(float));
  }
}

// See KernelTable::gather_dots. Whole rows are brought into L2 a few rows ahead: one after the
// other each would wait for memory.
void GatherDots(Format format, const Rows& matrix, const int32_t* rows, int32_t n, const uint8_t* x,
                float* out) {
  constexpr int32_t kAhead = 8;
  const int64_t group_bytes = GroupValueBytes(format), scale_bytes = GroupScaleBytes(format);
  const auto bring = [&](int32_t i) {
    if (i >= n) return;
    const uint8_t* tile = StartOf(matrix, rows[i]);
    const int64_t in_tile = rows[i] % kRowTile;
    for (int64_t at = 0; at < matrix.values_stride; at += TileGroupBytes(format)) {
      const uint8_t* values = tile + at + kRowTile * scale_bytes + in_tile * group_bytes;
      if (scale_bytes > 0) PrefetchL2(tile + at + in_tile * scale_bytes);
      for (int64_t byte = 0; byte < group_bytes; byte += kCacheLine) PrefetchL2(values + byte);
      PrefetchL2(values + group_bytes - 1);
    }
  };
  for (int32_t i = 0; i < kAhead; ++i) bring(i);
  Nothing nothing;
  const uint8_t* one_x[1] = {x};
  for (int32_t i = 0; i < n; ++i) {
    bring(i + kAhead);
    float dot[1][1];
    DotTile<1, 1, Take::kAny>(format, matrix, rows + i, one_x, dot, nothing);
    out[rows[i]] = dot[0][0];
  }
}

}  // namespace
}  // namespace hybrid
