// Which neurons may fire? Scores of all neurons of a piece from a small copy of what the gate
// knows, tiles of kPredictTile neurons at a time: lanes are neurons, so that nothing is summed
// across lanes, and a tile's lines are read in rising order.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// Bits of a tile's neurons that are predicted to fire for one token.
inline uint32_t PredictLowRank(const Predictor& p, const uint8_t* tile, const uint8_t* input) {
  constexpr int kRegisters = kPredictTile / kLanes;
  float scale;
  int32_t correction;
  memcpy(&scale, input + p.size, sizeof(scale));
  memcpy(&correction, input + p.size + sizeof(scale), sizeof(correction));
  // Four sums a register: one would wait for itself.
  I32 dots[4][kRegisters];
  for (int i = 0; i < 4; ++i)
    for (int r = 0; r < kRegisters; ++r) dots[i][r] = i == 0 ? StartWords(correction) : ZeroWords();
  int32_t at = 0;
  for (; at + 16 <= p.size; at += 16) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, tile += kPredictLine) {
      const XBytes x = BroadcastX(input + at + 4 * i);
#pragma GCC unroll 2
      for (int r = 0; r < kRegisters; ++r)
        dots[i][r] = DotQ8(dots[i][r], LoadQ8Weights(tile + r * 4 * kLanes), x);
    }
  }
  for (; at < p.size; at += 4, tile += kPredictLine) {
    const XBytes x = BroadcastX(input + at);
    for (int r = 0; r < kRegisters; ++r)
      dots[0][r] = DotQ8(dots[0][r], LoadQ8Weights(tile + r * 4 * kLanes), x);
  }
  I32 dot[kRegisters];
  for (int r = 0; r < kRegisters; ++r)
    dot[r] = AddWords(AddWords(dots[0][r], dots[1][r]), AddWords(dots[2][r], dots[3][r]));
  const float* scales = reinterpret_cast<const float*>(tile);
  const float* biases = scales + kPredictTile;
  uint32_t bits = 0;
  for (int r = 0; r < kRegisters; ++r) {
    const F32 unit = Mul(Set(scale), Load(scales + r * kLanes));
    bits |= NotNegative(Fma(ToFloat(dot[r]), unit, Load(biases + r * kLanes))) << r * kLanes;
  }
  return bits;
}

inline uint32_t PredictSign(const Predictor& p, const uint8_t* tile, const uint8_t* input) {
  constexpr int kRegisters = kPredictTile / kLanes;
  I32 distance[kRegisters];
  for (int r = 0; r < kRegisters; ++r) distance[r] = ZeroWords();
  for (int32_t word = 0; word < p.size; ++word, tile += kPredictLine) {
    const I32 x = BroadcastWord(input + 4 * word);
#pragma GCC unroll 2
    for (int r = 0; r < kRegisters; ++r)
      distance[r] = AddBitsThatDiffer(distance[r], LoadWords(tile + r * 4 * kLanes), x);
  }
  uint32_t bits = 0;
  for (int r = 0; r < kRegisters; ++r)
    bits |= AtMost(distance[r], LoadWords(tile + r * 4 * kLanes)) << r * kLanes;
  return bits;
}

// Of neurons [first, last) of tile `index`; bit i is that of neuron kPredictTile * index + i.
inline uint32_t PredictTile(const SparseFfnArgs& a, int32_t index, int32_t token) {
  const Predictor& p = *a.predictor;
  const uint8_t* tile = p.tiles + index * PredictTileBytes(p);
  const uint8_t* input = a.predictor_inputs + token * a.predictor_input_stride;
  uint32_t bits = p.kind == PredictorKind::kLowRank ? PredictLowRank(p, tile, input)
                                                    : PredictSign(p, tile, input);
  const int32_t begin = index * kPredictTile;
  if (begin < a.first) bits &= ~0u << (a.first - begin);
  if (begin + kPredictTile > a.last) bits &= (1u << (a.last - begin)) - 1;
  return bits;
}

// The sign bits of a quantised vector's values, in the order in which they stand.
inline void SignBits(Format format, const uint8_t* x, int32_t n_cols, uint8_t* words) {
  const int32_t padded = PaddedCols(format, n_cols), step = format == Format::kBf16 ? 2 : 1;
  const uint8_t* high = x + step - 1;  // little-endian
  for (int32_t at = 0; at < padded; at += 8) {
    uint8_t bits = 0;
    for (int32_t i = 0; i < 8; ++i)
      bits = static_cast<uint8_t>(bits | high[(at + i) * step] >> 7 << i);
    words[at / 8] = bits;
  }
}

// See KernelTable::make_predictor_input.
void MakePredictorInput(const Predictor& p, Format format, const uint8_t* x, int32_t n_cols,
                        const float* z, uint8_t* out) {
  if (p.kind == PredictorKind::kSign) {
    SignBits(format, x, n_cols, out);
    return;
  }
  float largest = 0.0f;
  for (int32_t i = 0; i < p.size; ++i) {
    const float magnitude = fabsf(z[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  float scale = largest / 127.0f;
  int32_t sum = 0;
  for (int32_t i = 0; i < p.size; ++i) {
    if (z[i] != z[i]) scale = z[i];  // every score becomes a NaN, every neuron predicted
    const float scaled = rintf(z[i] * inverse);
    const int32_t integer =
        static_cast<int32_t>(scaled >= -127.0f && scaled <= 127.0f ? scaled : 0.0f);
    sum += integer;
    out[i] = static_cast<uint8_t>(integer);
  }
  const int32_t correction = -128 * sum;
  memcpy(out + p.size, &scale, sizeof(scale));
  memcpy(out + p.size + sizeof(scale), &correction, sizeof(correction));
}

}  // namespace
}  // namespace hybrid
