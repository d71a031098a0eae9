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

constexpr int32_t kNeuronTile = 4;  // active neurons that are added at once

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

// Adds several rows at once: y[col] = (... (y[col] + a0 w0[col]) + a1 w1[col]) ... Every row is one
// fused multiply-add in turn, so how rows are grouped changes no bit, only how often y is loaded.
template <int kRows>
inline void AxpyBf16(const Rows& rows, const int32_t* row, const float* a, float* y) {
  const int32_t padded = PaddedCols(Format::kBf16, rows.n_cols);
  const uint16_t* w[kRows];
  F32 factor[kRows];
  for (int r = 0; r < kRows; ++r) {
    w[r] = reinterpret_cast<const uint16_t*>(rows.values + row[r] * rows.values_stride);
    factor[r] = Set(a[r]);
  }
  for (int32_t col = 0; col < padded; col += kLanes) {
    F32 sum = Load(y + col);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum = Fma(factor[r], LoadBf16(w[r] + col), sum);
    Store(y + col, sum);
  }
}

// q8 and q4: a register of weights times its blocks' scales, which every step of a group shares.
template <Format kFormat, int kRows>
inline void AxpyBlocks(const Rows& rows, const int32_t* row, const float* a, float* y) {
  constexpr int kParts = kBlock / kLanes;  // registers that cover one 32-byte step
  constexpr int32_t kGroupBytes = kGroup / kLinesPerLoad<kFormat>;
  const int32_t padded = PaddedCols(kFormat, rows.n_cols);
  const uint8_t* w[kRows];
  const uint16_t* scales[kRows];
  for (int r = 0; r < kRows; ++r) {
    w[r] = rows.values + row[r] * rows.values_stride;
    scales[r] = reinterpret_cast<const uint16_t*>(rows.scales + row[r] * rows.scales_stride);
  }
  for (int32_t first = 0; first < padded; first += kGroup) {
    F32 factor[kRows][kParts];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part)
        factor[r][part] = Mul(Set(a[r]), SpreadScales(scales[r] + first / kBlock, part * kLanes));
    for (int32_t step = 0; step < kGroupBytes; step += kBlock) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const int32_t at = step + part * kLanes;
        float* y_low = y + first + at;
        F32 low = Load(y_low);
        if constexpr (kFormat == Format::kQ8) {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
            low = Fma(factor[r][part], LoadQ8(w[r] + first + at), low);
        } else {
          F32 high = Load(y_low + kGroupBytes);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const F32Pair weights = LoadQ4(w[r] + first / 2 + at);
            low = Fma(factor[r][part], weights.low, low);
            high = Fma(factor[r][part], weights.high, high);
          }
          Store(y_low + kGroupBytes, high);
        }
        Store(y_low, low);
      }
    }
  }
}

template <int kRows>
inline void Axpy(Format format, const Rows& rows, const int32_t* row, const float* a, float* y) {
  if (format == Format::kBf16)
    AxpyBf16<kRows>(rows, row, a, y);
  else if (format == Format::kQ8)
    AxpyBlocks<Format::kQ8, kRows>(rows, row, a, y);
  else
    AxpyBlocks<Format::kQ4, kRows>(rows, row, a, y);
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

// act(gate x) * (up x)
inline float NeuronValue(const SparseFfnArgs& a, const Active& active) {
  const uint8_t* x[1] = {a.x + active.token * a.x_stride};
  float up[1][1];
  DotTile<1, 1>(a.format, a.up, active.neuron, x, up);
  return Activate(a.activation, active.gate) * up[0][0];
}

template <int kRows>
inline void AddNeurons(const SparseFfnArgs& a, const Active* active) {
  int32_t rows[kRows];
  float values[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = active[r].neuron;
    values[r] = NeuronValue(a, active[r]);
  }
  Axpy<kRows>(a.format, a.down, rows, values, a.out + active[0].token * a.out_stride);
}

// One token: a matter of memory. Gate rows come as one stream; the bundles of neurons found active
// are prefetched and wait until enough others were found after them.
int64_t SparseFfnOneToken(const SparseFfnArgs& a) {
  Active waiting[2 * kNeuronTile];
  int32_t n_waiting = 0;
  int64_t n_active = 0;
  for (int32_t neuron = a.first; neuron < a.last; ++neuron) {
    float gate[1][1];
    DotTile<1, 1>(a.format, a.gate, neuron, &a.x, gate);
    const bool fires = Fires(a.activation, gate[0][0], a.threshold);
    n_active += fires;
    if (!fires && !a.computes_all) continue;
    if (n_waiting == 2 * kNeuronTile) {
      AddNeurons<kNeuronTile>(a, waiting);
      n_waiting = kNeuronTile;
      for (int i = 0; i < kNeuronTile; ++i) waiting[i] = waiting[kNeuronTile + i];
    }
    waiting[n_waiting++] = {neuron, 0, fires ? gate[0][0] : 0.0f};
    PrefetchRow(a.up, neuron, a.format);
    PrefetchRow(a.down, neuron, a.format);
  }
  int32_t i = 0;
  for (; i + kNeuronTile <= n_waiting; i += kNeuronTile) AddNeurons<kNeuronTile>(a, waiting + i);
  for (; i < n_waiting; ++i) AddNeurons<1>(a, waiting + i);
  return n_active;
}

int64_t SparseFfn(const SparseFfnArgs& a) {
  const int32_t padded = PaddedCols(a.format, a.down.n_cols);
  for (int32_t token = 0; token < a.n_tokens; ++token)
    for (int32_t col = 0; col < padded; col += kLanes)
      Store(a.out + token * a.out_stride + col, Zero());
  if (a.n_tokens == 1) return SparseFfnOneToken(a);
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
    for (int32_t i = 0; i < n_waiting; ++i) AddNeurons<1>(a, &waiting[turn][i]);
    n_waiting = n_found;
    neuron += n_rows;
  }
  for (int32_t i = 0; i < n_waiting; ++i) AddNeurons<1>(a, &waiting[turn ^ 1][i]);
  return n_active;
}

}  // namespace
}  // namespace hybrid
