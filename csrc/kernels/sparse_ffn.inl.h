// The sparse FFN, gate first, in two steps.
//
// FindActive computes the gates: all of them, or those that a predictor selects. An inactive neuron
// costs only this one dot product; its up and down rows are never read. The neurons that fire are
// listed, and their bundles (up row and down row) are prefetched into L2 meanwhile.
//
// AddActive computes the up dot product of every listed neuron and adds its down row, in fp32, to
// the partial sum of the neuron's token and piece.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels/axpy.inl.h"
#include "kernels/dot.inl.h"
#include "kernels/kernels.h"
#include "kernels/predict.inl.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

constexpr int32_t kNeuronTile = 4;   // active neurons that are added together
constexpr int32_t kRowsAhead = 8;    // gate rows between the prefetch of a row and its use
constexpr int32_t kGateBlock = 256;  // gate rows per block, for several tokens

inline int32_t Least(int32_t a, int32_t b) { return a < b ? a : b; }

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

// Prefetches while one token is computed: gate rows that a predictor selected, some rows ahead of
// the one in use, and then the bundles of neurons that are active.
class FfnPrefetcher {
 public:
  FfnPrefetcher(const SparseFfnArgs& a, int32_t first_bundle)
      : a_(a),
        bundle_bytes_(2 * RowBytes(a.up, a.format)),
        pace_(a.format),
        rows_(RowBytes(a.gate, a.format), 0),
        bundles_(bundle_bytes_, first_bundle) {}

  // How many bundles to be ahead of the one in use: as many as fit kBytesAhead, which is a part of
  // L2, but at least a tile.
  int32_t n_ahead() const {
    const int64_t n = kBytesAhead / bundle_bytes_;
    return n < kNeuronTile ? kNeuronTile : static_cast<int32_t>(n);
  }
  int64_t bundle_bytes() const { return bundle_bytes_; }
  int32_t next_bundle() const { return bundles_.next(); }
  // From now on, predicted rows before `row_end` and bundles of the list before `bundle_end` may be
  // prefetched.
  void Allow(int32_t row_end, int32_t bundle_end) {
    row_end_ = row_end;
    bundle_end_ = bundle_end;
  }
  void operator()(int32_t n_rows) { Prefetch(pace_.Lines(n_rows)); }
  void Prefetch(int64_t n_lines) {
    n_lines = rows_.Prefetch(n_lines, row_end_, [&](int32_t i) {
      return a_.gate.values + a_.predicted[i] * a_.gate.values_stride;
    });
    bundles_.Prefetch(n_lines, bundle_end_, [&](int32_t i) {
      return a_.up.values + a_.active[i].neuron * a_.up.values_stride;
    });
  }
  void Finish() { Prefetch(INT32_MAX); }

 private:
  static constexpr int64_t kBytesAhead = 16 << 10;
  const SparseFfnArgs& a_;
  const int64_t bundle_bytes_;
  Pace pace_;
  int32_t row_end_ = 0, bundle_end_ = 0;
  RowWalk<> rows_, bundles_;
};

// The list of active (neuron, token) pairs, as it grows.
struct ActiveList {
  const SparseFfnArgs& a;
  int32_t n_listed = 0;
  int32_t n_touched = 0;
  int64_t n_active = 0;
  void Take(int32_t neuron, int32_t token, float gate) {
    const bool fires = Fires(a.activation, gate, a.threshold);
    n_active += fires;
    a.active[n_listed] = {neuron, token, fires ? gate : 0.0f};
    n_listed += fires || a.computes_all;
  }
  // Looks up the pages of new bundles: their first and their last line.
  void Touch() {
    for (; n_touched < n_listed; ++n_touched) {
      const uint8_t* bundle = a.up.values + a.active[n_touched].neuron * a.up.values_stride;
      PrefetchL2(bundle);
      PrefetchL2(bundle + a.up.values_stride - kCacheLine);
    }
  }
};

// Lists the predicted neurons in one pass over the predictor's tiles, without a branch on their
// results. While the last tiles are read, the first gate rows are prefetched. Returns how many.
int32_t NamePredicted(const SparseFfnArgs& a, FfnPrefetcher& prefetcher) {
  constexpr int64_t kAhead = 4096;  // bytes of tiles
  constexpr int32_t kLastTiles = 4;
  const int64_t tile_bytes = PredictTileBytes(*a.predictor);
  const int32_t end = (a.last + kPredictTile - 1) / kPredictTile;
  const uint8_t* end_of_tiles = a.predictor->tiles + end * tile_bytes;
  int32_t* predicted = a.predicted;
  int32_t n = 0, n_touched = 0;
  for (int32_t tile = a.first / kPredictTile; tile < end; ++tile) {
    const uint8_t* ahead = a.predictor->tiles + tile * tile_bytes + kAhead;
    for (int64_t at = 0; at < tile_bytes && ahead + at < end_of_tiles; at += kCacheLine)
      PrefetchL2(ahead + at);
    const uint32_t bits = PredictTile(a, tile, 0);
    for (int32_t i = 0; i < kPredictTile; ++i) {
      predicted[n] = tile * kPredictTile + i;
      n += static_cast<int32_t>(bits >> i & 1);
    }
    // Looks up the pages of new rows.
    for (; n_touched < n; ++n_touched)
      PrefetchL2(a.gate.values + predicted[n_touched] * a.gate.values_stride);
    if (tile + kLastTiles < end) continue;
    prefetcher.Allow(Least(n, kRowsAhead), 0);
    prefetcher.Prefetch(kRowsAhead * RowBytes(a.gate, a.format) / kLastTiles / kCacheLine + 1);
  }
  return n;
}

// For one token: computes the gates of the predicted neurons only. All predictions come first, and
// the list of rows is then prefetched while it is computed.
ActiveCounts FindPredicted(const SparseFfnArgs& a) {
  FfnPrefetcher prefetcher(a, 0);
  const int32_t n = NamePredicted(a, prefetcher);
  ActiveList list{a};
  const uint8_t* x[1] = {a.x};
  for (int32_t i = 0; i < n;) {
    float gates[kRowTile][1];
    const bool is_tile = i + kRowTile <= n;
    const int32_t end = is_tile ? i + kRowTile : i + 1;
    prefetcher.Allow(Least(end + kRowsAhead, n), Least(list.n_listed, prefetcher.n_ahead()));
    if (is_tile)
      DotTile<kRowTile, 1, Take::kAny>(a.format, a.gate, a.predicted + i, x, gates, prefetcher);
    else
      DotTile<1, 1, Take::kAny>(a.format, a.gate, a.predicted + i, x, gates, prefetcher);
    for (int32_t r = 0; i < end; ++i, ++r) list.Take(a.predicted[i], 0, gates[r][0]);
    list.Touch();
  }
  prefetcher.Allow(n, Least(list.n_listed, prefetcher.n_ahead()));
  prefetcher.Finish();
  return {list.n_listed, list.n_active, n, n, list.n_listed, prefetcher.next_bundle()};
}

ActiveCounts FindActive(const SparseFfnArgs& a);

// Lists the neurons whose gates are given, then computes the gates of the neurons behind them.
ActiveCounts FindGiven(const SparseFfnArgs& a) {
  const int32_t last = a.n_given < a.last ? a.n_given : a.last;
  ActiveCounts counts = {};
  for (int32_t token = 0; token < a.n_tokens; ++token) {
    const float* gates = a.given_gates + token * a.given_stride;
    for (int32_t neuron = a.first; neuron < last; ++neuron) {
      const bool fires = gates[neuron] != 0.0f;  // a NaN fires
      a.active[counts.n_listed] = {neuron, token, gates[neuron]};
      counts.n_listed += fires || a.computes_all;
      counts.n_active += fires;
    }
  }
  counts.n_bundles = counts.n_listed;  // for one token
  if (last == a.last) return counts;
  SparseFfnArgs rest = a;
  rest.first = last;
  rest.n_given = 0;
  rest.active += counts.n_listed;
  const ActiveCounts found = FindActive(rest);
  return {counts.n_listed + found.n_listed,
          counts.n_active + found.n_active,
          found.n_predicted,
          found.n_gate_rows,
          counts.n_bundles + found.n_bundles,
          0};
}

// Prefetches for a few tokens: the stream of gate rows or, with a predictor, the rows of a list,
// and then the bundle of each neuron that is active for any token.
class SharedPrefetcher {
 public:
  explicit SharedPrefetcher(const SparseFfnArgs& a, int32_t n_passes)
      : a_(a),
        bundle_bytes_(2 * RowBytes(a.up, a.format)),
        stream_(a.format, StartOf(a.gate, a.first), n_passes),
        bundles_(bundle_bytes_, 0) {}
  // Announces a neuron that is active. What L2 cannot hold is not prefetched.
  void Add(int32_t neuron) {
    if (n_ < kMost && n_ * bundle_bytes_ < kMostBytes) neurons_[n_++] = neuron;
  }
  void operator()(int32_t n_rows) {
    stream_(n_rows);
    Prefetch(2 * n_rows);
  }
  void Prefetch(int64_t n_lines) {
    bundles_.Prefetch(n_lines, n_,
                      [&](int32_t i) { return a_.up.values + neurons_[i] * a_.up.values_stride; });
  }

 private:
  static constexpr int32_t kMost = 512;
  static constexpr int64_t kMostBytes = 256 << 10;
  const SparseFfnArgs& a_;
  const int64_t bundle_bytes_;
  SharedStream stream_;
  RowWalk<> bundles_;
  int32_t n_ = 0;
  int32_t neurons_[kMost];
};

// A block of neurons for a few tokens. Bit i of a tile's bits belongs to its neuron i.
struct GateBlock {
  static constexpr int32_t kTiles = kGateBlock / kPredictTile;
  int32_t first, last;
  float gates[kFewTokens][kGateBlock];
  uint32_t computed[kFewTokens][kTiles];  // gates that were computed
  uint32_t active[kFewTokens][kTiles];    // and that fire
};

inline int32_t LowestBit(uint32_t bits) {
#if defined(__GNUC__)
  return __builtin_ctz(bits);
#else
  int32_t i = 0;
  while ((bits >> i & 1) == 0) ++i;
  return i;
#endif
}
inline int32_t CountBits(uint32_t bits) {
#if defined(__GNUC__)
  return __builtin_popcount(bits);
#else
  int32_t n = 0;
  for (; bits != 0; bits &= bits - 1) ++n;
  return n;
#endif
}

// Minus the least gate that fires (see Fires). The sum with a gate that fires is not negative, or
// it is NaN.
inline F32 MinusLeastActive(const SparseFfnArgs& a) {
  constexpr float kLeastPositive = 1.4e-45f;
  return Set(a.activation == Activation::kFatRelu ? -a.threshold : -kLeastPositive);
}

// Finds out which gates of a tile fire, and announces the neurons that fire for any token.
void FinishTile(const SparseFfnArgs& a, GateBlock& block, int32_t tile,
                SharedPrefetcher& prefetcher) {
  const F32 minus_least = MinusLeastActive(a);
  uint32_t any = 0;
  for (int32_t token = 0; token < a.n_tokens; ++token) {
    uint32_t bits = ~0u;
    if (a.activation != Activation::kSilu) {
      const float* gates = block.gates[token] + tile * kPredictTile;
      bits = 0;
      for (int32_t i = 0; i < kPredictTile; i += kLanes)
        bits |= NotNegative(Add(Load(gates + i), minus_least)) << i;
    }
    block.active[token][tile] = bits & block.computed[token][tile];
    any |= a.computes_all ? block.computed[token][tile] : block.active[token][tile];
  }
  for (; any != 0; any &= any - 1)
    prefetcher.Add(block.first + tile * kPredictTile + LowestBit(any));
}

// Without a predictor: all gates of the block. Returns how many rows it read.
template <int kTokens>
int32_t ComputeGates(const SparseFfnArgs& a, GateBlock& block, SharedPrefetcher& prefetcher) {
  const GemmArgs gemm = {a.format,   a.gate,     block.first,    block.last, a.x,
                         a.x_stride, a.n_tokens, block.gates[0], kGateBlock};
  int32_t tile = 0;
  GemmFew<kTokens>(gemm, prefetcher, [&](int32_t, int32_t end) {
    const int32_t n = end - block.first - tile * kPredictTile;
    if (n < kPredictTile && end < block.last) return;
    for (int32_t token = 0; token < a.n_tokens; ++token)
      block.computed[token][tile] = n < kPredictTile ? (1u << n) - 1 : 0xffffu;
    FinishTile(a, block, tile++, prefetcher);
  });
  return block.last - block.first;
}

// The gates of one neuron for kTokens of `tokens`.
template <int kTokens>
inline void ComputeGate(const SparseFfnArgs& a, int32_t neuron, const int32_t* tokens,
                        GateBlock& block) {
  const uint8_t* x[kTokens];
  float gates[1][kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = a.x + tokens[t] * a.x_stride;
  Nothing nothing;
  DotTile<1, kTokens, Take::kAny>(a.format, a.gate, &neuron, x, gates, nothing);
  for (int t = 0; t < kTokens; ++t) block.gates[tokens[t]][neuron - block.first] = gates[0][t];
}

// Asks the predictor about the block. Writes the neurons that it names for any token to `rows` and
// returns how many they are.
int32_t NameRows(const SparseFfnArgs& a, GateBlock& block, int32_t* rows) {
  int32_t n = 0;
  for (int32_t at = block.first; at < block.last; at += kPredictTile) {
    const int32_t tile = (at - block.first) / kPredictTile, index = at / kPredictTile,
                  shift = at % kPredictTile;
    uint32_t any = 0;
    for (int32_t token = 0; token < a.n_tokens; ++token) {
      // The block's tiles need not begin where the predictor's do.
      uint32_t bits = PredictTile(a, index, token) >> shift;
      if (shift > 0 && (index + 1) * kPredictTile < a.last)
        bits |= PredictTile(a, index + 1, token) << (kPredictTile - shift);
      block.computed[token][tile] = bits & 0xffffu;
      any |= block.computed[token][tile];
    }
    for (; any != 0; any &= any - 1) rows[n++] = at + LowestBit(any);
  }
  return n;
}

// With a predictor: the gates that it names. A row is read once for all tokens that need it.
int32_t ComputeNamedGates(const SparseFfnArgs& a, GateBlock& block, SharedPrefetcher& prefetcher) {
  int32_t rows[kGateBlock + kPredictTile];
  const int32_t n = NameRows(a, block, rows);
  const int64_t row_bytes = RowBytes(a.gate, a.format);
  RowWalk<> ahead(row_bytes, 0);
  for (int32_t row = 0; row < n; ++row) {
    ahead.Prefetch(2 * row_bytes / kCacheLine, Least(row + kRowsAhead, n),
                   [&](int32_t i) { return a.gate.values + rows[i] * a.gate.values_stride; });
    prefetcher.Prefetch(2 * row_bytes / kCacheLine);
    const int32_t tile = (rows[row] - block.first) / kPredictTile,
                  i = (rows[row] - block.first) % kPredictTile;
    int32_t tokens[kFewTokens + 1], n_tokens = 0, token = 0;
    for (; token < a.n_tokens; ++token) {
      tokens[n_tokens] = token;
      n_tokens += static_cast<int32_t>(block.computed[token][tile] >> i & 1);
    }
    for (token = 0; token + 4 <= n_tokens; token += 4)
      ComputeGate<4>(a, rows[row], tokens + token, block);
    for (; token + 2 <= n_tokens; token += 2) ComputeGate<2>(a, rows[row], tokens + token, block);
    for (; token < n_tokens; ++token) ComputeGate<1>(a, rows[row], tokens + token, block);
    if (row + 1 == n || (rows[row + 1] - block.first) / kPredictTile != tile)
      FinishTile(a, block, tile, prefetcher);
  }
  return n;
}

// Lists what the block found, token by token.
void ListBlock(const SparseFfnArgs& a, const GateBlock& block, ActiveCounts& counts) {
  const int32_t n_tiles = (block.last - block.first + kPredictTile - 1) / kPredictTile;
  uint32_t any[GateBlock::kTiles] = {};
  for (int32_t token = 0; token < a.n_tokens; ++token)
    for (int32_t tile = 0; tile < n_tiles; ++tile) {
      const uint32_t computed = block.computed[token][tile],
                     active = computed == 0 ? 0 : block.active[token][tile];
      uint32_t listed = a.computes_all ? computed : active;
      any[tile] |= listed;
      counts.n_predicted += CountBits(computed);
      counts.n_active += CountBits(active);
      for (; listed != 0; listed &= listed - 1) {
        const int32_t i = LowestBit(listed), at = tile * kPredictTile + i;
        const float gate = (active >> i & 1) != 0 ? block.gates[token][at] : 0.0f;
        a.active[counts.n_listed++] = {block.first + at, token, gate};
      }
    }
  for (int32_t tile = 0; tile < n_tiles; ++tile) counts.n_bundles += CountBits(any[tile]);
}

// For a few tokens. What several of them need is read from memory once, and what is found to be
// active is prefetched meanwhile.
template <int kTokens>
ActiveCounts FindFew(const SparseFfnArgs& a) {
  SharedPrefetcher prefetcher(a, CountPasses<kTokens>(a.n_tokens));
  GateBlock block;
  ActiveCounts counts = {};
  for (block.first = a.first; block.first < a.last; block.first = block.last) {
    block.last = Least(block.first + kGateBlock, a.last);
    counts.n_gate_rows += a.predictor != nullptr ? ComputeNamedGates(a, block, prefetcher)
                                                 : ComputeGates<kTokens>(a, block, prefetcher);
    ListBlock(a, block, counts);
  }
  prefetcher.Prefetch(INT32_MAX);
  return counts;
}

// For one token, gate rows are computed in tiles. For several tokens they are computed in blocks,
// and each block is listed token by token: the neurons of a token are then neighbours in the list.
// In both cases the neuron ids of a token rise.
ActiveCounts FindActive(const SparseFfnArgs& a) {
  if (a.n_given > a.first) return FindGiven(a);
  if (a.predictor != nullptr && a.n_tokens == 1) return FindPredicted(a);
  if (a.n_tokens > 1 && a.n_tokens <= kFewTokens)
    return HasBlocks(a.format) ? FindFew<TokensAtOnce(true)>(a) : FindFew<TokensAtOnce(false)>(a);
  ActiveList list{a};
  FfnPrefetcher prefetcher(a, 0);
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
    if (a.n_tokens == 1) {
      list.Touch();
      prefetcher.Allow(0, Least(list.n_listed, prefetcher.n_ahead()));
      prefetcher.Prefetch(prefetcher.bundle_bytes() * 2 / 3 / kCacheLine);
    }
    first = last;
  }
  if (a.n_tokens == 1) {
    prefetcher.Allow(0, Least(list.n_listed, prefetcher.n_ahead()));
    prefetcher.Finish();
  }
  // With many tokens, nearly every bundle is read.
  const int32_t n_rows = a.last - a.first, n_bundles = Least(list.n_listed, n_rows);
  return {list.n_listed, list.n_active, n_predicted, n_rows, n_bundles, prefetcher.next_bundle()};
}

inline int32_t PieceEnd(const SparseFfnArgs& a, int32_t piece) {
  return piece + 1 < a.n_pieces ? a.piece_ends[piece] : a.last;
}

// Adds kNeurons different neurons that are active for one token to its partial sum.
template <int kNeurons, typename Between>
inline void AddNeurons(const SparseFfnArgs& a, const Active* active, float* out, Between& between) {
  int32_t rows[kNeurons];
  const uint8_t* x[1] = {a.x + active[0].token * a.x_stride};
  float up[kNeurons][1], values[kNeurons];
  for (int r = 0; r < kNeurons; ++r) rows[r] = active[r].neuron;
  Nothing nothing;
  DotTile<kNeurons, 1, Take::kAny>(a.format, a.up, rows, x, up, nothing);
  for (int r = 0; r < kNeurons; ++r)
    values[r] = Activate(a.activation, active[r].gate) * up[r][0] * a.down.matrix_scale;
  Axpy<kNeurons>(a.format, a.down, rows, values, out, between);
}

// Adds a tile of the list, from `active` on. Returns how many pairs it added; they all belong to
// one token and one piece.
template <typename Between>
inline int32_t AddTile(const SparseFfnArgs& a, const Active* active, int32_t n_left, int32_t piece,
                       Between& between) {
  const int32_t token = active[0].token, end = PieceEnd(a, piece);
  float* out = a.out + piece * a.piece_stride + token * a.out_stride;
  // Each pair is compared: a piece lists its tokens again for every block of gates, and after given
  // gates, so pairs of other tokens may lie between two of this one.
  const auto has = [&](int32_t count) {
    if (count > n_left || active[count - 1].neuron >= end) return false;
    for (int32_t i = 1; i < count; ++i)
      if (active[i].token != token) return false;
    return true;
  };
  if (has(kNeuronTile)) {
    AddNeurons<kNeuronTile>(a, active, out, between);
    return kNeuronTile;
  }
  if (has(2)) {
    AddNeurons<2>(a, active, out, between);
    return 2;
  }
  AddNeurons<1>(a, active, out, between);
  return 1;
}

// Over several tokens, bundles are in L2 already. This brings those of the next tile into L1.
class NextTile {
 public:
  NextTile(const SparseFfnArgs& a, int32_t n_listed)
      : a_(a), n_listed_(n_listed), walk_(2 * RowBytes(a.up, a.format), 0) {}
  void Begin(int32_t first) {
    walk_ = RowWalk<PrefetchL1>(2 * RowBytes(a_.up, a_.format), first);
    last_ = Least(first + kNeuronTile, n_listed_);
  }
  void operator()(int32_t n_rows) {
    walk_.Prefetch(3 * n_rows, last_, [&](int32_t i) {
      return a_.up.values + a_.active[i].neuron * a_.up.values_stride;
    });
  }

 private:
  const SparseFfnArgs& a_;
  const int32_t n_listed_;
  int32_t last_ = 0;
  RowWalk<PrefetchL1> walk_;
};

void AddActive(const SparseFfnArgs& a, const ActiveCounts& found) {
  const int32_t padded = PaddedCols(a.format, a.down.n_cols), n = found.n_listed;
  for (int32_t piece = 0; piece < a.n_pieces; ++piece)
    for (int32_t token = 0; token < a.n_tokens; ++token)
      for (int32_t col = 0; col < padded; col += kLanes)
        Store(a.out + piece * a.piece_stride + token * a.out_stride + col, Zero());
  FfnPrefetcher prefetcher(a, found.n_prefetched);
  NextTile next(a, n);
  int32_t piece = 0;
  for (int32_t i = 0; i < n;) {
    const Active* active = a.active + i;
    if (i > 0 && active[0].token != active[-1].token) piece = 0;  // neuron ids of a token rise
    while (active[0].neuron >= PieceEnd(a, piece)) ++piece;
    if (a.n_tokens > 1) {
      next.Begin(i + kNeuronTile);
      i += AddTile(a, active, n - i, piece, next);
    } else {
      prefetcher.Allow(0, Least(i + kNeuronTile + prefetcher.n_ahead(), n));
      i += AddTile(a, active, n - i, piece, prefetcher);
    }
  }
}

}  // namespace
}  // namespace hybrid
