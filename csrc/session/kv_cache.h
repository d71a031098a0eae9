// The KV cache of one sequence: the keys and values of all its positions, in fp16 or bf16.
//
// Layout: (n_spans, n_layers, n_kv_heads, keys and values of a span). A span is kSpan positions.
// What one piece of attention reads is therefore contiguous, and huge pages fill up as the context
// grows. The system provides memory as it is used.
//
// The keys of a span form tiles of kKeyTile keys: element d of all keys of a tile, then element
// d + 1. The values of the span follow them, one row of head_stride elements per position.
#pragma once

#include <algorithm>
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

  // Takes over the first `n` positions of a cache of the same shape. Both have as many.
  void CopyPrefix(const KvCache& from, int32_t n) const {
    const int32_t n_whole = n / kSpan, n_rest = n % kSpan;
    std::copy_n(from.KvSpan(0, 0, 0), KvSpan(0, 0, n_whole) - KvSpan(0, 0, 0), KvSpan(0, 0, 0));
    if (n_rest == 0) return;  // there may be no further span
    const int64_t n_keys = int64_t{CeilDiv(n_rest, kKeyTile)} * kKeyTile * head_stride_;
    for (int32_t layer = 0; layer < n_layers_; ++layer)
      for (int32_t head = 0; head < n_kv_heads_; ++head) {
        const uint16_t* span = from.KvSpan(layer, head, n_whole);
        uint16_t* to = KvSpan(layer, head, n_whole);
        std::copy_n(span, n_keys, to);
        std::copy_n(ValuesOf(span), int64_t{n_rest} * head_stride_, to + (ValuesOf(span) - span));
      }
  }

  // Copies positions [first, last) to or from an array (positions, n_layers, n_kv_heads, 2,
  // head_dim): a key, and its value behind it.
  void Read(int32_t first, int32_t last, int32_t head_dim, uint16_t* out) const {
    VisitPositions(first, last, [&](int64_t index, const uint16_t* key, const uint16_t* value) {
      uint16_t* to = out + index * 2 * head_dim;
      for (int32_t i = 0; i < head_dim; ++i) to[i] = key[i * kKeyTile];
      std::copy_n(value, head_dim, to + head_dim);
    });
  }
  void Write(int32_t first, int32_t last, int32_t head_dim, const uint16_t* in) const {
    VisitPositions(first, last, [&](int64_t index, uint16_t* key, uint16_t* value) {
      const uint16_t* from = in + index * 2 * head_dim;
      for (int32_t i = 0; i < head_dim; ++i) key[i * kKeyTile] = from[i];
      std::copy_n(from + head_dim, head_dim, value);
    });
  }

  // Bytes of the keys and values of `n` positions of one head.
  int64_t Bytes(int32_t n) const { return 2 * int64_t{sizeof(uint16_t)} * head_stride_ * n; }

 private:
  // Positions come last, because neighbouring keys share cache lines.
  template <typename Visit>
  void VisitPositions(int32_t first, int32_t last, const Visit& visit) const {
    for (int32_t layer = 0; layer < n_layers_; ++layer)
      for (int32_t head = 0; head < n_kv_heads_; ++head)
        for (int32_t position = first; position < last; ++position)
          visit((int64_t{position - first} * n_layers_ + layer) * n_kv_heads_ + head,
                KeyAt(layer, head, position), ValueAt(layer, head, position));
  }

  const KvFormat format_;
  const int32_t n_context_, n_layers_, n_kv_heads_, head_stride_;
  Pages<uint16_t> kv_;
};

}  // namespace hybrid
