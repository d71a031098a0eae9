// Gate first: all gate rows of a piece are read, and a neuron that turns out inactive stops after
// that one dot product; its up and down rows are never touched. Those that fire are listed, and
// their bundles come into L2 meanwhile. Then `down` of each is added to the token's partial sum in
// fp32.
#pragma once

#include <math.h>
#include <string.h>

#include "axpy.inl.h"
#include "dot.inl.h"
#include "kernels.h"
#include "predict.inl.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

constexpr int32_t kNeuronTile = 4;   // active neurons that are added at once
constexpr int32_t kRowsAhead = 8;    // gate rows between one's prefetch and its use
constexpr int32_t kGateBlock = 256;  // gate rows that are computed at once for many tokens

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

// Prefetches bundles (a neuron's up and down rows) of listed neurons into L2, a few lines at a time
// between gate rows: a burst would fill the queue of outstanding misses and stall those.
class BundlePrefetcher {
 public:
  explicit BundlePrefetcher(const SparseFfnArgs& a)
      : a_(a), n_bytes_(2 * RowBytes(a.up, a.format)), n_ahead_(Ahead(a)) {}

  // How many bundles to be ahead of the one in use: at least a tile, at most part of L2.
  static int32_t Ahead(const SparseFfnArgs& a) {
    const int64_t n = kBytesAhead / (2 * RowBytes(a.up, a.format));
    return n < kNeuronTile ? kNeuronTile : static_cast<int32_t>(n);
  }
  // Goes on with the bundles of active[0..n_listed), up to Ahead(), by two thirds of a bundle.
  void Advance(int32_t n_listed) {
    int64_t budget = n_bytes_ * 2 / 3;
    const int32_t end = n_listed < n_ahead_ ? n_listed : n_ahead_;
    while (budget > 0 && next_ < end) {
      const uint8_t* p = a_.up.values + a_.active[next_].neuron * a_.up.values_stride;
      for (; budget > 0 && at_ < n_bytes_; at_ += kCacheLine, budget -= kCacheLine)
        PrefetchL2(p + at_);
      if (at_ < n_bytes_) return;
      at_ = 0;
      ++next_;
    }
  }
  void Finish(int32_t n_listed) {
    while (next_ < n_listed && next_ < n_ahead_) Advance(n_listed);
  }

 private:
  static constexpr int64_t kBytesAhead = 16 << 10;
  const SparseFfnArgs& a_;
  const int64_t n_bytes_;
  const int32_t n_ahead_;
  int32_t next_ = 0;
  int64_t at_ = 0;
};

// Prefetches the bundles of some listed neurons, one after the other, one share of their lines a
// call.
class BundleShares {
 public:
  BundleShares(const SparseFfnArgs& a, int32_t n_shares)
      : a_(a), n_bytes_(2 * RowBytes(a.up, a.format)), n_shares_(n_shares) {}
  // Those of active[first..last).
  void Begin(int32_t first, int32_t last) {
    n_ = i_ = 0;
    at_ = 0;
    for (int32_t i = first; i < last; ++i)
      bundles_[n_++] = a_.up.values + a_.active[i].neuron * a_.up.values_stride;
    share_ = n_ * n_bytes_ / n_shares_;
  }
  void operator()() {
    for (int64_t left = share_; left > 0 && i_ < n_; left -= 64) {
      PrefetchL2(bundles_[i_] + at_);
      at_ += 64;
      if (at_ >= n_bytes_) {
        at_ = 0;
        ++i_;
      }
    }
  }

 private:
  const SparseFfnArgs& a_;
  const int64_t n_bytes_;
  const int32_t n_shares_;
  const uint8_t* bundles_[kNeuronTile];
  int64_t share_ = 0, at_ = 0;
  int32_t n_ = 0, i_ = 0;
};

// Appends one neuron to the list for every token that it fires for.
struct ActiveList {
  const SparseFfnArgs& a;
  int32_t n_listed = 0;
  int64_t n_active = 0;
  void Take(int32_t neuron, int32_t token, float gate) {
    const bool fires = Fires(a.activation, gate, a.threshold);
    n_active += fires;
    a.active[n_listed] = {neuron, token, fires ? gate : 0.0f};
    n_listed += fires || a.computes_all;
  }
};

// What a predicting token prefetches, a few lines at a time between computations: gate rows, some
// ahead of the one that is computed, then bundles of neurons that turned out active. The pace
// matters: prefetches beyond what the core can have outstanding are dropped, and a line that is
// then missing costs more than a hundred that are there.
class PredictedPrefetcher {
 public:
  explicit PredictedPrefetcher(const SparseFfnArgs& a)
      : a_(a),
        row_bytes_(RowBytes(a.gate, a.format)),
        bundle_bytes_(2 * RowBytes(a.up, a.format)),
        n_bundles_(BundlePrefetcher::Ahead(a)) {}
  // Rows before `end` may be prefetched now, and bundles of so many listed neurons.
  void Allow(int32_t end, int32_t n_listed) {
    row_end_ = end;
    bundle_end_ = n_listed < n_bundles_ ? n_listed : n_bundles_;
  }
  // After a row's share of a group: as many lines as that has, and a quarter more for bundles.
  void operator()() {
    credit_ += GroupValueBytes(a_.format) * 5 / 4;
    Issue(credit_ / kCacheLine);
    credit_ %= kCacheLine;
  }
  // A share of the first rows: all of them in so many calls.
  void Begin(int32_t n_calls) { Issue((kRowsAhead * row_bytes_ / kCacheLine + n_calls) / n_calls); }
  void Finish() { Issue(INT32_MAX); }

 private:
  struct Cursor {
    int32_t next = 0;
    int64_t at = 0;
  };
  void Issue(int64_t n_lines) {
    n_lines = Go(n_lines, row_end_, row_bytes_, &row_, [&](int32_t i) {
      return a_.gate.values + a_.predicted[i] * a_.gate.values_stride;
    });
    Go(n_lines, bundle_end_, bundle_bytes_, &bundle_,
       [&](int32_t i) { return a_.up.values + a_.active[i].neuron * a_.up.values_stride; });
  }
  template <typename AddressOf>
  int64_t Go(int64_t n_lines, int32_t end, int64_t n_bytes, Cursor* cursor, AddressOf address_of) {
    while (n_lines > 0 && cursor->next < end) {
      const uint8_t* start = address_of(cursor->next);
      for (; n_lines > 0 && cursor->at < n_bytes; cursor->at += kCacheLine, --n_lines)
        PrefetchL2(start + cursor->at);
      if (cursor->at < n_bytes) break;
      *cursor = {cursor->next + 1, 0};
    }
    return n_lines;
  }

  const SparseFfnArgs& a_;
  const int64_t row_bytes_, bundle_bytes_;
  const int32_t n_bundles_;
  int64_t credit_ = 0;  // bytes
  int32_t row_end_ = 0, bundle_end_ = 0;
  Cursor row_, bundle_;
};

// Lists the predicted neurons of a piece: one pass over the predictor's tiles, without a branch on
// what they say; while the last of them are read, the first gate rows are prefetched.
int32_t NamePredicted(const SparseFfnArgs& a, PredictedPrefetcher& prefetcher) {
  constexpr int64_t kAhead = 4096;  // bytes of tiles
  constexpr int32_t kLastTiles = 4;
  const int64_t tile_bytes = PredictTileBytes(*a.predictor);
  const int32_t end = (a.last + kPredictTile - 1) / kPredictTile;
  const uint8_t* end_of_tiles = a.predictor->tiles + end * tile_bytes;
  int32_t* predicted = a.predicted;
  int32_t n = 0;
  for (int32_t tile = a.first / kPredictTile; tile < end; ++tile) {
    const uint8_t* ahead = a.predictor->tiles + tile * tile_bytes + kAhead;
    for (int64_t at = 0; at < tile_bytes && ahead + at < end_of_tiles; at += kCacheLine)
      PrefetchL2(ahead + at);
    const uint32_t bits = PredictTile(a, tile, 0);
    for (int32_t i = 0; i < kPredictTile; ++i) {
      predicted[n] = tile * kPredictTile + i;
      n += static_cast<int32_t>(bits >> i & 1);
    }
    if (tile + kLastTiles < end) continue;
    prefetcher.Allow(n < kRowsAhead ? n : kRowsAhead, 0);
    prefetcher.Begin(kLastTiles);
  }
  return n;
}

// Of one token, gate rows of the predicted neurons alone. All are named first: then rows are
// prefetched at the pace at which they are computed, since a burst of prefetches stalls everything
// behind it (docs/log.md).
ActiveCounts FindPredicted(const SparseFfnArgs& a) {
  PredictedPrefetcher prefetcher(a);
  const int32_t n = NamePredicted(a, prefetcher);
  ActiveList list{a};
  const uint8_t* x[1] = {a.x};
  for (int32_t i = 0; i < n;) {
    float gates[kRowTile][1];
    const bool is_tile = i + kRowTile <= n;
    const int32_t end = is_tile ? i + kRowTile : i + 1;
    prefetcher.Allow(end + kRowsAhead < n ? end + kRowsAhead : n, list.n_listed);
    if (is_tile)
      DotTile<kRowTile, 1, false>(a.format, a.gate, a.predicted + i, x, gates, prefetcher);
    else
      DotTile<1, 1, false>(a.format, a.gate, a.predicted + i, x, gates, prefetcher);
    for (int32_t r = 0; i < end; ++i, ++r) list.Take(a.predicted[i], 0, gates[r][0]);
  }
  prefetcher.Allow(n, list.n_listed);
  prefetcher.Finish();
  return {list.n_listed, list.n_active, n};
}

ActiveCounts FindActive(const SparseFfnArgs& a);

// Gates that are there already, then those of the neurons behind them.
ActiveCounts FindGiven(const SparseFfnArgs& a) {
  const int32_t last = a.n_given < a.last ? a.n_given : a.last;
  ActiveCounts counts = {0, 0, 0};
  for (int32_t token = 0; token < a.n_tokens; ++token) {
    const float* gates = a.given_gates + token * a.given_stride;
    for (int32_t neuron = a.first; neuron < last; ++neuron) {
      const bool fires = gates[neuron] != 0.0f;  // a NaN does
      a.active[counts.n_listed] = {neuron, token, gates[neuron]};
      counts.n_listed += fires || a.computes_all;
      counts.n_active += fires;
    }
  }
  if (a.n_tokens == 1) BundlePrefetcher(a).Finish(counts.n_listed);
  if (last == a.last) return counts;
  SparseFfnArgs rest = a;
  rest.first = last;
  rest.n_given = 0;
  rest.active += counts.n_listed;
  const ActiveCounts found = FindActive(rest);
  return {counts.n_listed + found.n_listed, counts.n_active + found.n_active, found.n_predicted};
}

// Of one token, tiles of gate rows; of more, blocks, token by token: then a token's neurons stand
// together in the list. In both, a token's neurons rise.
ActiveCounts FindActive(const SparseFfnArgs& a) {
  if (a.n_given > a.first) return FindGiven(a);
  if (a.predictor != nullptr && a.n_tokens == 1) return FindPredicted(a);
  ActiveList list{a};
  BundlePrefetcher prefetcher(a);
  float gates[kTokenTile * kGateBlock];
  int64_t n_predicted = 0;
  const int32_t block = a.n_tokens == 1 ? kRowTile : kGateBlock;
  for (int32_t first = a.first; first < a.last;) {
    const int32_t end = block == kRowTile ? (first / block + 1) * block : first + block;
    const int32_t last = end < a.last ? end : a.last;
    const GemmArgs gemm = {a.format,   a.gate,     first, last,      a.x,
                           a.x_stride, a.n_tokens, gates, kGateBlock};
    Gemm(gemm);
    for (int32_t token = 0; token < a.n_tokens; ++token) {
      uint32_t bits = ~0u;
      for (int32_t neuron = first; neuron < last; ++neuron) {
        if (a.predictor != nullptr && (neuron == first || neuron % kPredictTile == 0))
          bits = PredictTile(a, neuron / kPredictTile, token);
        if ((bits >> neuron % kPredictTile & 1) == 0) continue;
        list.Take(neuron, token, gates[token * kGateBlock + neuron - first]);
        ++n_predicted;
      }
    }
    if (a.n_tokens == 1) prefetcher.Advance(list.n_listed);
    first = last;
  }
  prefetcher.Finish(list.n_listed);
  return {list.n_listed, list.n_active, n_predicted};
}

// kNeurons different neurons that are active for one token.
template <int kNeurons>
inline void AddNeurons(const SparseFfnArgs& a, const Active* active, BundleShares& next) {
  int32_t rows[kNeurons];
  const uint8_t* x[1] = {a.x + active[0].token * a.x_stride};
  float up[kNeurons][1], values[kNeurons];
  for (int r = 0; r < kNeurons; ++r) rows[r] = active[r].neuron;
  Nothing nothing;
  DotTile<kNeurons, 1, false>(a.format, a.up, rows, x, up, nothing);
  for (int r = 0; r < kNeurons; ++r) values[r] = Activate(a.activation, active[r].gate) * up[r][0];
  Axpy<kNeurons>(a.format, a.down, rows, values, a.out + active[0].token * a.out_stride, next);
}

void AddActive(const SparseFfnArgs& a, int32_t n_listed) {
  const int32_t padded = PaddedCols(a.format, a.down.n_cols);
  for (int32_t token = 0; token < a.n_tokens; ++token)
    for (int32_t col = 0; col < padded; col += kLanes)
      Store(a.out + token * a.out_stride + col, Zero());
  BundleShares next(a, ValueBytes(a.format, a.down.n_cols) / GroupValueBytes(a.format));
  // Of many tokens, bundles come again and again: prefetching each time costs more than it brings.
  const int32_t ahead = a.n_tokens == 1 ? BundlePrefetcher::Ahead(a) : n_listed;
  for (int32_t i = 0; i < n_listed;) {
    const Active* active = a.active + i;
    const auto has = [&](int32_t count) {
      return i + count <= n_listed && active[count - 1].token == active[0].token;
    };
    const int32_t n = has(kNeuronTile) ? kNeuronTile : has(2) ? 2 : 1;
    next.Begin(i + ahead < n_listed ? i + ahead : n_listed,
               i + ahead + n < n_listed ? i + ahead + n : n_listed);
    if (n == kNeuronTile)
      AddNeurons<kNeuronTile>(a, active, next);
    else if (n == 2)
      AddNeurons<2>(a, active, next);
    else
      AddNeurons<1>(a, active, next);
    i += n;
  }
}

}  // namespace
}  // namespace hybrid
