// Rounds weights to a format and lays them out as packed rows, with the same bits as
// hybrid/weights/formats.py.
//
// The code is plain loops over blocks of 32, which the compiler vectorises.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/bf16.h"
#include "kernels/kernels.h"
#include "kernels/vectors.inl.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// The largest magnitude of 32 floats. They are compared as integers, so that a NaN counts as the
// largest of all.
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

// The integers to which a q4 block may map its value of largest magnitude. Beyond -8 that value is
// clipped, and the other values gain precision.
constexpr float kQ4Extremes[] = {-8.0f, 7.0f, -7.5f, -8.5f, -9.0f};

// Rounds kGroupBlocks scales to fp16. `rounded` receives them as they are read back.
inline void RoundScales(const float* scales, uint16_t* halves, float* rounded) {
  float lanes[16] = {};
  uint16_t lane_halves[16];
  memcpy(lanes, scales, kGroupBlocks * sizeof(float));
  for (int i = 0; i < 16; i += kLanes) StoreFp16(lane_halves + i, Load(lanes + i));
  for (int i = 0; i < 16; i += kLanes) Store(lanes + i, LoadFp16(lane_halves + i));
  memcpy(halves, lane_halves, kGroupBlocks * sizeof(uint16_t));
  memcpy(rounded, lanes, kGroupBlocks * sizeof(float));
}

// The sum of 32 floats, in the same order as the oracle's sum.
inline float SumBlock(const float* x) {
  float sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = (x[i] + x[8 + i]) + (x[16 + i] + x[24 + i]);
  for (int i = 0; i < 4; ++i) sums[i] += sums[4 + i];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

inline float RoundTo(float w, float scale, float least, float most) {
  if (scale == 0.0f) return 0.0f;
  const float q = rintf(w / scale);
  return q >= least ? q > most ? most : q : least;  // a NaN in w already shows in the scale
}

// One group: `q` receives kGroup integers in natural order, `halves` kGroupBlocks scales.
inline void RoundGroupQ8(const float* w, float* q, uint16_t* halves) {
  float scales[kGroupBlocks], rounded[kGroupBlocks];
  for (int block = 0; block < kGroupBlocks; ++block) {
    scales[block] = LargestMagnitude(w + block * kBlock) / 127.0f;
  }
  RoundScales(scales, halves, rounded);
  for (int block = 0; block < kGroupBlocks; ++block)
    for (int i = block * kBlock; i < (block + 1) * kBlock; ++i)
      q[i] = RoundTo(w[i], rounded[block], -127.0f, 127.0f);
}

inline void RoundGroupQ4(const float* w, float* q, uint16_t* halves) {
  float extremes[kGroupBlocks], best_errors[kGroupBlocks];
  for (int block = 0; block < kGroupBlocks; ++block) {
    const float largest = LargestMagnitude(w + block * kBlock);
    extremes[block] = largest;  // with the sign of the first value of this magnitude
    for (int i = kBlock - 1; i >= 0; --i)
      if (fabsf(w[block * kBlock + i]) == largest) extremes[block] = w[block * kBlock + i];
    best_errors[block] = INFINITY;
  }
  for (const float level : kQ4Extremes) {
    float scales[kGroupBlocks], rounded[kGroupBlocks];
    uint16_t level_halves[kGroupBlocks];
    for (int block = 0; block < kGroupBlocks; ++block) scales[block] = extremes[block] / level;
    RoundScales(scales, level_halves, rounded);
    for (int block = 0; block < kGroupBlocks; ++block) {
      const float* block_w = w + block * kBlock;
      float candidate[kBlock], errors[kBlock];
      for (int i = 0; i < kBlock; ++i)
        candidate[i] = RoundTo(block_w[i], rounded[block], -8.0f, 7.0f);
      for (int i = 0; i < kBlock; ++i) {
        const float difference = candidate[i] * rounded[block] - block_w[i];
        errors[i] = difference * difference;
      }
      const float error = SumBlock(errors);
      if (error >= best_errors[block]) continue;
      best_errors[block] = error;
      halves[block] = level_halves[block];
      memcpy(q + block * kBlock, candidate, sizeof(candidate));
    }
  }
  // Then find the scale that fits these integers best.
  float scales[kGroupBlocks], rounded[kGroupBlocks];
  uint16_t fitted[kGroupBlocks];
  for (int block = 0; block < kGroupBlocks; ++block) {
    float products[kBlock], squares[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const float integer = q[block * kBlock + i];
      products[i] = w[block * kBlock + i] * integer;
      squares[i] = integer * integer;
    }
    const float power = SumBlock(squares);
    scales[block] = power > 0.0f ? SumBlock(products) / power : 0.0f;
  }
  RoundScales(scales, fitted, rounded);
  for (int block = 0; block < kGroupBlocks; ++block) {
    float errors[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const float difference = q[block * kBlock + i] * rounded[block] - w[block * kBlock + i];
      errors[i] = difference * difference;
    }
    if (SumBlock(errors) < best_errors[block]) halves[block] = fitted[block];
  }
}

void PackRow(Format format, const float* w, int32_t n, uint8_t* values, uint8_t* scales) {
  const int32_t padded = PaddedCols(format, n);
  if (!HasBlocks(format)) {
    uint16_t* bits = reinterpret_cast<uint16_t*>(values);
    if (format == Format::kF16)
      ToFp16(w, n, bits);
    else
      for (int32_t i = 0; i < n; ++i) bits[i] = NarrowBf16(w[i]);
    memset(values + 2 * n, 0, static_cast<size_t>(2 * (padded - n)));
    return;
  }
  for (int32_t first = 0; first < padded; first += kGroup) {
    float group[kGroup] = {}, q[kGroup];
    uint16_t halves[kGroupBlocks];
    const int32_t length = n - first < kGroup ? n - first : kGroup;
    memcpy(group, w + first, static_cast<size_t>(length) * sizeof(float));
    if (format == Format::kQ8)
      RoundGroupQ8(group, q, halves);
    else
      RoundGroupQ4(group, q, halves);
    for (int block = RoundUp(length, kBlock) / kBlock; block < kGroupBlocks; ++block)
      halves[block] = 0;
    memcpy(scales + first / kBlock * 2, halves, sizeof(halves));
    uint8_t stored[kGroup];
    const float zero = format == Format::kQ8 ? 128.0f : 8.0f;
    for (int32_t i = 0; i < kGroup; ++i)
      stored[ColumnOrder(format, i)] = static_cast<uint8_t>(q[i] + zero);
    if (format == Format::kQ8) {
      memcpy(values + first, stored, kGroup);
    } else {
      for (int32_t i = 0; i < kGroup / 2; ++i)
        values[first / 2 + i] = static_cast<uint8_t>(stored[i] | stored[kGroup / 2 + i] << 4);
    }
  }
}

}  // namespace
}  // namespace hybrid
