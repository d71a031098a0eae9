// The KV cache of one sequence: the keys and values of all its positions, in fp16 or bf16.
//
// Layout: (n_spans, n_layers, n_kv_heads, keys and values of a span). A span is kSpan positions.
// What one piece of attention reads is therefore contiguous, and huge pages fill up as the context
// grows. The system provides memory as it is used.
//
// The keys of a span form tiles of kKeyTile keys: element d of all keys of a tile, then element
// d + 1. The values of the span follow them, one row of head_stride elements per position.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "session/pages.h"
#include "session/pieces.h"

namespace hybrid {

class KvCache {
 public:
  // Throws std::bad_alloc.
  KvCache(KvFormat format, int32_t n_context, int32_t n_layers, int32_t n_kv_heads,
          int32_t head_stride)
      : format_(format),
        n_context_(n_context),
        n_layers_(n_layers),
        n_kv_heads_(n_kv_heads),
        head_stride_(head_stride),
        kv_(int64_t{CeilDiv(n_context, kSpan)} * n_layers * n_kv_heads * 2 * kSpan * head_stride,
            true) {}

  KvFormat format() const { return format_; }
  int32_t n_context() const { return n_context_; }

  // A span of one head: its keys, and its values behind them.
  uint16_t* KvSpan(int32_t layer, int32_t kv_head, int32_t span) const {
    const int64_t index = (int64_t{span} * n_layers_ + layer) * n_kv_heads_ + kv_head;
    return kv_ + index * 2 * kSpan * head_stride_;
  }
  const uint16_t* ValuesOf(const uint16_t* span) const {
    return span + int64_t{kSpan} * head_stride_;
  }

  // The first element of a key. The stride to the next element is kKeyTile.
  uint16_t* KeyAt(int32_t layer, int32_t kv_head, int32_t position) const {
    const int32_t at = position % kSpan;
    return KvSpan(layer, kv_head, position / kSpan) + at / kKeyTile * kKeyTile * head_stride_ +
           at % kKeyTile;
  }
  // A value: contiguous.
  uint16_t* ValueAt(int32_t layer, int32_t kv_head, int32_t position) const {
    return KvSpan(layer, kv_head, position / kSpan) +
           int64_t{kSpan + position % kSpan} * head_stride_;
  }

  // Bytes of the keys and values of `n` positions of one head.
  int64_t Bytes(int32_t n) const { return 2 * int64_t{sizeof(uint16_t)} * head_stride_ * n; }

 private:
  const KvFormat format_;
  const int32_t n_context_, n_layers_, n_kv_heads_, head_stride_;
  Pages<uint16_t> kv_;
};

}  // namespace hybrid
