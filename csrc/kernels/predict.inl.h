// Which neurons may fire? A predictor computes a score for every neuron of a piece from a small
// copy of what the gate knows, one tile of kPredictTile neurons at a time (layout: kernels.h). The
// lanes of a register are neurons, so nothing is summed across lanes. The lines of a tile are read
// in rising order.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/dot.inl.h"
#include "kernels/kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

// Bit i: neuron i of the tile is predicted to fire for one token.
inline uint32_t PredictWholeTile(const Predictor& p, const uint8_t* tile, const uint8_t* input) {
  constexpr int kRegisters = kPredictTile / kLanes;
  const int32_t n_lines = PredictLines(p) - 1;
  const uint8_t* tail = input + PaddedRank(p);
  float scale;
  int32_t wide_correction;
  memcpy(&scale, tail, sizeof(scale));
  memcpy(&wide_correction, tail + sizeof(scale), sizeof(wide_correction));
  // Four sums per register: with a single sum, each addition would wait for the one before.
  I32 wide[kRegisters], dots[4][kRegisters];
  for (int r = 0; r < kRegisters; ++r) {
    wide[r] = DotQ8(StartWords(wide_correction), UnpackQ8(LoadX(tile + r * 4 * kLanes)),
                    BroadcastX(input));
    dots[0][r] = BroadcastWord(tail + sizeof(scale) + sizeof(wide_correction));
    for (int i = 1; i < 4; ++i) dots[i][r] = ZeroWords();
    InOrder();
  }
  tile += kPredictLine;
  input += kWideRank;
  const auto add_line = [&](I32* low, I32* high) {
    const XBytes x_low = BroadcastX(input), x_high = BroadcastX(input + 4);
#pragma GCC unroll 2
    for (int r = 0; r < kRegisters; ++r) {
      const Nibbles w = UnpackQ4(LoadX(tile + r * 4 * kLanes));
      low[r] = DotQ4(low[r], w.low, x_low);
      high[r] = DotQ4(high[r], w.high, x_high);
      InOrder();
    }
    tile += kPredictLine;
    input += 8;
  };
  for (int32_t line = 0; line + 2 <= n_lines; line += 2) {
    add_line(dots[0], dots[1]);
    add_line(dots[2], dots[3]);
  }
  if (n_lines % 2 != 0) add_line(dots[0], dots[1]);
  const float* scales = reinterpret_cast<const float*>(tile);
  uint32_t bits = 0;
  for (int r = 0; r < kRegisters; ++r, scales += kLanes) {
    const F32 wide_unit = Mul(Set(scale), Load(scales)),
              narrow_unit = Mul(Set(scale), Load(scales + kPredictTile)),
              bias = Load(scales + 2 * kPredictTile);
    const I32 narrow = AddWords(AddWords(dots[0][r], dots[1][r]), AddWords(dots[2][r], dots[3][r]));
    const F32 score = Fma(ToFloat(narrow), narrow_unit, Fma(ToFloat(wide[r]), wide_unit, bias));
    bits |= NotNegative(score) << r * kLanes;
  }
  return bits;
}

// The same for a predictor with a nonlinearity: whether b z + bias reaches the threshold. A NaN
// counts as predicted, so that it is seen.
inline uint32_t PredictMlpTile(const Predictor& p, int32_t index, const uint8_t* input) {
  const int32_t first = index * kPredictTile, last = first + kPredictTile < p.second.n_rows
                                                         ? first + kPredictTile
                                                         : p.second.n_rows;
  float scores[kPredictTile];
  Behind behind;
  DotBlock<1>({Format::kQ8, p.second, first, last, input, 0, 1, scores, 0}, first, last, 0, behind);
  uint32_t bits = 0;
  for (int32_t i = 0; i < last - first; ++i) {
    const float score = p.biases == nullptr ? scores[i] : scores[i] + p.biases[first + i];
    bits |= static_cast<uint32_t>(!(score < p.threshold)) << i;
  }
  return bits;
}

// Bit i: neuron kPredictTile * index + i is predicted to fire. Only neurons in [first, last) have
// bits.
inline uint32_t PredictTile(const SparseFfnArgs& a, int32_t index, int32_t token) {
  const Predictor& p = *a.predictor;
  const uint8_t* input = a.predictor_inputs + token * a.predictor_input_stride;
  uint32_t bits = IsMlp(p) ? PredictMlpTile(p, index, input)
                           : PredictWholeTile(p, p.tiles + index * PredictTileBytes(p), input);
  const int32_t begin = index * kPredictTile;
  if (begin < a.first) bits &= ~0u << (a.first - begin);
  if (begin + kPredictTile > a.last) bits &= (1u << (a.last - begin)) - 1;
  return bits;
}

// (n,) floats -> int8 with one scale, which is returned. The scale is NaN if any float is NaN, so
// that everything computed from it becomes NaN.
inline float RoundToInt8(const float* x, int32_t n, uint8_t* out) {
  float largest = 0.0f;
  bool has_nan = false;
  for (int32_t i = 0; i < n; ++i) {
    const float magnitude = fabsf(x[i]);
    largest = magnitude > largest ? magnitude : largest;
    has_nan |= x[i] != x[i];
  }
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int32_t i = 0; i < n; ++i) {
    const float scaled = rintf(x[i] * inverse);
    out[i] = static_cast<uint8_t>(
        static_cast<int32_t>(scaled >= -127.0f && scaled <= 127.0f ? scaled : 0.0f));
  }
  return has_nan ? NAN : largest / 127.0f;
}

// See KernelTable::make_predictor_input.
void MakePredictorInput(const Predictor& p, const float* z, uint8_t* out) {
  const float scale = RoundToInt8(z, p.rank, out);
  int32_t wide_sum = 0, narrow_sum = 0;
  for (int32_t i = 0; i < p.rank; ++i)
    (i < kWideRank ? wide_sum : narrow_sum) += static_cast<int8_t>(out[i]);
  const int32_t padded = PaddedRank(p), corrections[2] = {-128 * wide_sum, -8 * narrow_sum};
  memset(out + p.rank, 0, static_cast<size_t>(padded - p.rank));
  memcpy(out + padded, &scale, sizeof(scale));
  memcpy(out + padded + sizeof(scale), corrections, sizeof(corrections));
}

}  // namespace
}  // namespace hybrid
