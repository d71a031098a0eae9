// What decode prefetches between the kernels' calls. kernels/prefetch.inl.h says why and how the
// kernels themselves prefetch.
#pragma once

#include <cstdint>

#include "session/pass.h"
#include "thread_pool.h"

namespace hybrid {

// What a thread reads first after phase number `index` of the pass: the beginning of its share of
// the next phase that streams weights. It is empty in prefill, which computes more than it reads.
Ahead NextWeights(const Pass& pass, int32_t index, int32_t thread, int32_t n_threads);

// The norm of the operation behind a phase's, if it has one. Every thread reads the norm as soon as
// the next phase begins, and without the prefetch it would begin at the pace of single misses.
void PrefetchNextNorm(const Pass& pass, const Phase& phase);

// The place where a key will be written, before the key is computed: each of its elements would be
// a cache miss. `head` counts the heads of q, k and v; those of q and v have no such place.
void PrefetchKey(const Pass& pass, const Qkv& op, int32_t head);

}  // namespace hybrid
