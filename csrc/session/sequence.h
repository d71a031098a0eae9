// A sequence: how many tokens it has, their keys and values, and the logits of the next token.
#pragma once

#include <cstdint>

#include "session/kv_cache.h"
#include "session/pages.h"

namespace hybrid {

struct Sequence {
  const KvCache kv;
  Pages<float> logits;   // (vocab_size,)
  int32_t position = 0;  // of the next token
  // The largest magnitude of the keys and values that were stored since the last truncation.
  float largest_kv = 0.0f;
};

}  // namespace hybrid
