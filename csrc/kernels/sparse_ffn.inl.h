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
  DotTile<1, 1>(a.format, a.up, &active.neuron, x, up);
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

// The order in which a piece's neurons are computed and added: in pairs, one of each half, so that
// their gate rows make two streams (see dot.inl.h).
inline int32_t NeuronAt(const SparseFfnArgs& a, int32_t i) {
  const int32_t half = (a.last - a.first) / 2;
  return i < 2 * half ? a.first + i % 2 * half + i / 2 : a.last - 1;
}

// The bundles of neurons found active are prefetched, and wait until enough others were found.
class Waiting {
 public:
  explicit Waiting(const SparseFfnArgs& a) : a_(a) {}
  void Push(const Active& active) {
    if (n_ == 2 * kNeuronTile) {
      AddNeurons<kNeuronTile>(a_, active_);
      n_ = kNeuronTile;
      for (int i = 0; i < kNeuronTile; ++i) active_[i] = active_[kNeuronTile + i];
    }
    active_[n_++] = active;
    PrefetchRow(a_.up, active.neuron, a_.format);
    PrefetchRow(a_.down, active.neuron, a_.format);
  }
  void Flush() {
    int32_t i = 0;
    for (; i + kNeuronTile <= n_; i += kNeuronTile) AddNeurons<kNeuronTile>(a_, active_ + i);
    for (; i < n_; ++i) AddNeurons<1>(a_, active_ + i);
  }

 private:
  const SparseFfnArgs& a_;
  Active active_[2 * kNeuronTile];
  int32_t n_ = 0;
};

int64_t SparseFfnOneToken(const SparseFfnArgs& a) {
  Waiting waiting(a);
  int64_t n_active = 0;
  const auto take = [&](int32_t neuron, float gate) {
    const bool fires = Fires(a.activation, gate, a.threshold);
    n_active += fires;
    if (fires || a.computes_all) waiting.Push({neuron, 0, fires ? gate : 0.0f});
  };
  const int32_t n = a.last - a.first;
  for (int32_t i = 0; i + 2 <= n; i += 2) {
    const int32_t neurons[2] = {NeuronAt(a, i), NeuronAt(a, i + 1)};
    float gates[2][1];
    DotTile<2, 1>(a.format, a.gate, neurons, &a.x, gates);
    for (int r = 0; r < 2; ++r) take(neurons[r], gates[r][0]);
  }
  if (n % 2 != 0) {
    const int32_t neuron = a.last - 1;
    float gate[1][1];
    DotTile<1, 1>(a.format, a.gate, &neuron, &a.x, gate);
    take(neuron, gate[0][0]);
  }
  waiting.Flush();
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
  const int32_t n_neurons = a.last - a.first;
  for (int32_t i = 0; i < n_neurons;) {
    const int32_t n_rows = i + kRowTile <= n_neurons ? kRowTile : 1;
    int32_t neurons[kRowTile];
    for (int32_t r = 0; r < n_rows; ++r) neurons[r] = NeuronAt(a, i + r);
    if (n_rows == kRowTile)
      DotRows<kRowTile>(a.format, a.gate, neurons, a.x, a.x_stride, a.n_tokens, gates, kRowTile);
    else
      DotRows<1>(a.format, a.gate, neurons, a.x, a.x_stride, a.n_tokens, gates, kRowTile);
    // Neuron by neuron, so that a row serves all tokens for which it is active while it is cached.
    Active* found = waiting[turn];
    int32_t n_found = 0;
    for (int32_t r = 0; r < n_rows; ++r) {
      const int32_t n_before = n_found;
      for (int32_t token = 0; token < a.n_tokens; ++token) {
        const float gate = gates[token * kRowTile + r];
        const bool fires = Fires(a.activation, gate, a.threshold);
        n_active += fires;
        if (fires || a.computes_all) found[n_found++] = {neurons[r], token, fires ? gate : 0.0f};
      }
      if (n_found > n_before) {
        PrefetchRow(a.up, neurons[r], a.format);
        PrefetchRow(a.down, neurons[r], a.format);
      }
    }
    turn ^= 1;
    for (int32_t i = 0; i < n_waiting; ++i) AddNeurons<1>(a, &waiting[turn][i]);
    n_waiting = n_found;
    i += n_rows;
  }
  for (int32_t i = 0; i < n_waiting; ++i) AddNeurons<1>(a, &waiting[turn ^ 1][i]);
  return n_active;
}

}  // namespace
}  // namespace hybrid
