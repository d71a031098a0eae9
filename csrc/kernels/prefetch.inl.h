// Software prefetch: what the kernels do to read memory at full speed. PrefetchL2 requests one
// cache line for L2, and the CPU does not wait for it.
//
// Streams. A core's own prefetchers follow a reader that first touches lines at rising addresses,
// and little else. Rows that every token reads are therefore interleaved in tiles, and a kernel
// touches a tile's lines strictly in order. On some CPUs the hardware still stays too close to a
// reader that computes. Each stream is therefore also prefetched kStreamAhead bytes ahead. Up to
// 2 KB ahead the lines come too late; from 3 to 16 KB every distance is equally good.
//
// Scattered rows. Predicted gate rows, bundles of active neurons and the shortlist's rows form no
// stream. They are listed before they are computed, and RowWalk prefetches the list some rows
// ahead. If a row is then read in order, the hardware goes on beyond its end. Predicted gate rows
// are bit-reversed for this reason (kernels.h).
//
// Pace. A core can have only so many misses outstanding. It drops prefetches beyond them, and a
// line that is missing later costs 100 to 200 ns. A burst also stalls everything behind it. A
// kernel therefore calls `between(n)` when it has computed one group of each of n rows, and Pace
// allows as many lines as those groups have, and a quarter more. Without the quarter, what was
// dropped is never made up for.
//
// Pages. As soon as a row is known, its first line is prefetched, of a bundle also the last one.
// The pages are then looked up long before the row is prefetched line by line.
//
// Several tokens. For few tokens, the passes over a tile share the prefetching of what follows.
// With more, prefill computes more than it reads. Only the next block of rows is prefetched, in
// equal shares between the computations of this block.
//
// docs/experiments has the measurements (memory-bandwidth.md, scattered-row-reads.md). Take new
// ones from memory: from the cache nothing of this shows.
#pragma once

#include "kernels/kernels.h"
#include HYBRID_SIMD

namespace hybrid {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kStreamAhead = 6 << 10;  // bytes between a stream's prefetch and its use
constexpr int64_t kSoonAhead = 2 << 10;    // the same into L1, where it is also prefetched

// A `between` that prefetches nothing.
struct Nothing {
  void operator()(int32_t) const {}
};

// A `between` for rows that are part of a stream. What lies behind them is nearly always what the
// thread needs next. At the end of a matrix it is not, and a prefetch of an invalid address is no
// fault. Each tile makes its own object, so that the compiler keeps it in registers.
template <Format kFormat>
class StreamPrefetcher {
 public:
  explicit StreamPrefetcher(const uint8_t* rows) : at_(rows + kStreamAhead) {}
  void operator()(int32_t n_rows) {
    credit_ += n_rows * static_cast<int32_t>(TileGroupBytes(kFormat) / kRowTile);
    for (; credit_ > 0; credit_ -= kCacheLine, at_ += kCacheLine) PrefetchL2(at_);
  }

 private:
  const uint8_t* at_;
  int32_t credit_ = 0;  // bytes
};

// A `between` for a stream that several passes over each tile share: each pass prefetches its part
// of what follows. A tile's lines are then not touched in order, so that nobody else brings them
// from L2 into L1.
class SharedStream {
 public:
  SharedStream(Format format, const uint8_t* rows, int32_t n_passes)
      : at_(rows + kStreamAhead),
        row_bytes_(static_cast<int32_t>(TileGroupBytes(format) / kRowTile)),
        line_credit_(static_cast<int32_t>(kCacheLine) * n_passes) {}
  void operator()(int32_t n_rows) {
    credit_ += n_rows * row_bytes_;
    for (; credit_ > 0; credit_ -= line_credit_, at_ += kCacheLine) {
      PrefetchL2(at_);
      PrefetchL1(at_ - kStreamAhead + kSoonAhead);
    }
  }

 private:
  const uint8_t* at_;
  const int32_t row_bytes_, line_credit_;
  int32_t credit_ = 0;  // bytes times passes
};

// How many lines may be prefetched after the parts of a group of some rows were computed.
class Pace {
 public:
  explicit Pace(Format format) : group_bytes_(GroupValueBytes(format)) {}
  int64_t Lines(int32_t n_rows) {
    credit_ += n_rows * group_bytes_ * 5 / 4;
    const int64_t n_lines = credit_ / kCacheLine;
    credit_ %= kCacheLine;
    return n_lines;
  }

 private:
  const int64_t group_bytes_;
  int64_t credit_ = 0;  // bytes
};

// Walks a list of rows, line by line, and brings them into the cache that kPrefetch names.
template <void (*kPrefetch)(const void*) = PrefetchL2>
class RowWalk {
 public:
  RowWalk(int64_t row_bytes, int32_t first) : row_bytes_(row_bytes), next_(first) {}
  // The first row that is not wholly prefetched.
  int32_t next() const { return next_; }
  // Prefetches up to `n_lines` lines of the rows before `end`. start(i) is the address of row i of
  // the list. Returns how many of the lines are left.
  template <typename Start>
  int64_t Prefetch(int64_t n_lines, int32_t end, const Start& start) {
    while (n_lines > 0 && next_ < end) {
      const uint8_t* row = start(next_);
      for (; n_lines > 0 && at_ < row_bytes_; at_ += kCacheLine, --n_lines) kPrefetch(row + at_);
      if (at_ < row_bytes_) break;
      ++next_;
      at_ = 0;
    }
    return n_lines;
  }

 private:
  int64_t row_bytes_;
  int32_t next_;
  int64_t at_ = 0;  // bytes of that row
};

// A block of rows that all tokens of a pass need, in equal shares.
class BlockPrefetcher {
 public:
  BlockPrefetcher(const Rows& rows, int32_t first, int32_t last, int32_t n_shares) {
    if (n_shares < 2) return;
    at_ = StartOf(rows, first);
    end_ = StartOf(rows, last < rows.n_rows ? last : rows.n_rows);
    share_ = (end_ - at_ + n_shares - 1) / n_shares;
  }
  void operator()() {
    for (int64_t left = share_; left > 0 && at_ < end_; left -= kCacheLine, at_ += kCacheLine)
      PrefetchL2(at_);
  }

 private:
  const uint8_t *at_ = nullptr, *end_ = nullptr;
  int64_t share_ = 0;
};

}  // namespace
}  // namespace hybrid
