// Gate first: all gate rows are read, and a neuron that turns out inactive stops after that one dot
// product; its up and down rows are never touched. Of an active one, `down` is added to the token's
// partial sum in fp32.
#pragma once

#include <math.h>
#include <string.h>

#include "dot.inl.h"
#include "kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

inline bool Fires(Activation activation, float gate, float threshold) {
  switch (activation) {
    case Activation::kRelu:
      return gate > 0.0f || gate != gate;  // a NaN must be seen, not skipped
    case Activation::kFatRelu:
      return !(gate < threshold);
    default:
      return true;
  }
}

inline float Activate(Activation activation, float gate) {
  return activation == Activation::kSilu ? gate / (1.0f + expf(-gate)) : gate;
}

// y += a * row, in packed column order.
inline void AxpyBf16(const Rows& rows, int32_t row, float a, float* y) {
  const uint16_t* w = reinterpret_cast<const uint16_t*>(rows.values + row * rows.values_stride);
  const int32_t padded = PaddedCols(Format::kBf16, rows.n_cols);
  const F32 factor = Set(a);
  for (int32_t col = 0; col < padded; col += kLanes)
    Store(y + col, Fma(factor, LoadBf16(w + col), Load(y + col)));
}

// q8 and q4: a register of weights times its blocks' scales, which every step of a group shares.
template <Format kFormat>
inline void AxpyBlocks(const Rows& rows, int32_t row, float a, float* y) {
  constexpr int kParts = kBlock / kLanes;  // registers that cover one 32-byte step
  constexpr int32_t kGroupBytes = kGroup / kLinesPerLoad<kFormat>;
  const uint8_t* w = rows.values + row * rows.values_stride;
  const uint16_t* scales =
      reinterpret_cast<const uint16_t*>(rows.scales + row * rows.scales_stride);
  const int32_t padded = PaddedCols(kFormat, rows.n_cols);
  for (int32_t first = 0; first < padded; first += kGroup) {
    F32 factor[kParts];
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part)
      factor[part] = Mul(Set(a), SpreadScales(scales + first / kBlock, part * kLanes));
    for (int32_t step = 0; step < kGroupBytes; step += kBlock) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const int32_t at = step + part * kLanes;
        const uint8_t* p = w + first / kLinesPerLoad<kFormat> + at;
        float* low = y + first + at;
        if constexpr (kFormat == Format::kQ8) {
          Store(low, Fma(factor[part], LoadQ8(p), Load(low)));
        } else {
          const F32Pair weights = LoadQ4(p);
          float* high = low + kGroupBytes;
          Store(low, Fma(factor[part], weights.low, Load(low)));
          Store(high, Fma(factor[part], weights.high, Load(high)));
        }
      }
    }
  }
}

inline void Axpy(Format format, const Rows& rows, int32_t row, float a, float* y) {
  if (format == Format::kBf16)
    AxpyBf16(rows, row, a, y);
  else if (format == Format::kQ8)
    AxpyBlocks<Format::kQ8>(rows, row, a, y);
  else
    AxpyBlocks<Format::kQ4>(rows, row, a, y);
}

inline void PrefetchRow(const Rows& rows, int32_t row, Format format) {
  const uint8_t* p = rows.values + row * rows.values_stride;
  for (int64_t i = 0; i < ValueBytes(format, rows.n_cols); i += 64) Prefetch(p + i);
}

// One active (neuron, token) pair.
struct Active {
  int32_t neuron, token;
  float gate;
};

inline void AddNeuron(const SparseFfnArgs& a, const Active& active) {
  const uint8_t* x[1] = {a.x + active.token * a.x_stride};
  float up[1][1];
  DotTile<1, 1>(a.format, a.up, active.neuron, x, up);
  const float activation = Activate(a.activation, active.gate) * up[0][0];
  Axpy(a.format, a.down, active.neuron, activation, a.out + active.token * a.out_stride);
}

int64_t SparseFfn(const SparseFfnArgs& a) {
  const int32_t padded = PaddedCols(a.format, a.down.n_cols);
  for (int32_t token = 0; token < a.n_tokens; ++token)
    for (int32_t col = 0; col < padded; col += kLanes)
      Store(a.out + token * a.out_stride + col, Zero());
  float gates[kTokenTile * kRowTile];
  // Neurons found active wait here for one tile of gate rows, while their bundles come from memory.
  Active waiting[2][kTokenTile * kRowTile];
  int32_t n_waiting = 0, turn = 0;
  int64_t n_active = 0;
  for (int32_t neuron = a.first; neuron < a.last;) {
    const int32_t n_rows = neuron + kRowTile <= a.last ? kRowTile : 1;
    if (n_rows == kRowTile)
      DotRows<kRowTile>(a.format, a.gate, neuron, a.x, a.x_stride, a.n_tokens, gates, kRowTile);
    else
      DotRows<1>(a.format, a.gate, neuron, a.x, a.x_stride, a.n_tokens, gates, kRowTile);
    // Neuron by neuron, so that a row serves all tokens for which it is active while it is cached.
    Active* found = waiting[turn];
    int32_t n_found = 0;
    for (int32_t r = 0; r < n_rows; ++r) {
      const int32_t n_before = n_found;
      for (int32_t token = 0; token < a.n_tokens; ++token) {
        const float gate = gates[token * kRowTile + r];
        const bool fires = Fires(a.activation, gate, a.threshold);
        n_active += fires;
        if (fires || a.computes_all) found[n_found++] = {neuron + r, token, fires ? gate : 0.0f};
      }
      if (n_found > n_before) {
        PrefetchRow(a.up, neuron + r, a.format);
        PrefetchRow(a.down, neuron + r, a.format);
      }
    }
    turn ^= 1;
    for (int32_t i = 0; i < n_waiting; ++i) AddNeuron(a, waiting[turn][i]);
    n_waiting = n_found;
    neuron += n_rows;
  }
  for (int32_t i = 0; i < n_waiting; ++i) AddNeuron(a, waiting[turn ^ 1][i]);
  return n_active;
}

}  // namespace
}  // namespace hybrid
