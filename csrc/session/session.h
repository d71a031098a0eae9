// A session is one sequence with its position, KV cache and scratch memory. It runs a recorded
// program (program.h), which it shares with other sessions, on a thread pool.
//
// Prefill appends many tokens, up to kPrefillChunk in one pass (pass.h), and Decode appends one.
//
//   segments    [ embed, qkv, attend ] hand-off [ ffn, qkv, attend ] hand-off ... [ ffn, head ]
//                         |
//                         | (1)
//                         v
//   phases      [ embed ] [ qkv ] [ attend ] [ output ]
//                            |
//                            | (2)
//                            v
//   pieces      [ 0 ] [ 1 ] [ 2 ] [ 3 ] [ 4 ] [ 5 ] [ 6 ] [ 7 ]
//                            |
//                            | (3)
//                            v
//   threads     thread 0: 0 1 2 3 7        thread 1: 4 5 6
//
// (1) RunSegment runs the phases of a segment's operations in order; each begins when all pieces of
//     the one before are done.
// (2) CountPieces cuts a phase into pieces of constant sizes (pieces.h), so results do not depend
//     on the number of threads, and prefill and decode give equal bits.
// (3) A thread claims the next piece of its share, or helps another thread (thread_pool.h), and
//     runs the phase's code on it (RunPiece, stages.h).
//
// A session is not thread-safe. Different sessions of one program may run at once.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"
#include "session/counters.h"
#include "session/kv_cache.h"
#include "session/pass.h"
#include "session/scratch.h"
#include "thread_pool.h"

namespace hybrid {

class Session {
 public:
  // Reserves a KV cache for `n_context` positions; the system provides its memory as it is used.
  // `kv` is what keys and values are rounded to.
  // `is_dense`: no neuron is skipped, for comparisons. `is_timed`: calls measure their stages.
  // `program` and `pool` must outlive the session. Throws std::bad_alloc.
  Session(const Program& program, ThreadPool& pool, int32_t n_context, KvFormat kv, bool is_dense,
          bool is_timed);

  int32_t position() const { return pass_.position; }  // of the next token
  int32_t n_context() const { return kv_.n_context(); }
  // Forgets all tokens from `position` on. A position beyond the session's says that the KV cache
  // has been filled up to there.
  void Truncate(int32_t position);
  KvFormat kv() const { return kv_.format(); }
  const KvCache& kv_cache() const { return kv_; }
  // The largest magnitude of the keys and values that were stored since the last Truncate.
  float LargestKv() const;

  // Append tokens. The caller guarantees position() + n <= n_context() and 0 <= token < vocab_size.
  // `all_logits`, if not null, receives (n, vocab_size) logits. logits() always holds those of the
  // last token. `observation`, if not null, has rows for these n tokens.
  void Prefill(const int32_t* tokens, int32_t n, float* all_logits,
               const Observation* observation = nullptr);
  void Decode(int32_t token);

  // Run a program of several segments, with work of another device between them: Begin up to
  // kPrefillChunk tokens, run every segment in order, End. `all_logits` as above. `wants_logits`
  // says whether logits() must hold the last token's logits. The memory of `exchange` must outlive
  // its use.
  void SetExchange(const Exchange& exchange) { pass_.exchange = exchange; }
  void Begin(const int32_t* tokens, int32_t n, bool is_decode, float* all_logits,
             bool wants_logits);
  void RunSegment(int32_t segment);
  void End() { pass_.position += pass_.n_tokens; }
  const Exchange& exchange() const { return pass_.exchange; }
  const Program& program() const { return pass_.program; }
  ThreadPool& pool() const { return pool_; }

  const float* logits() const { return scratch_.logits.get(); }
  // What all threads together counted since the last reset. It must not be read during a call.
  Counters Count() const;
  // For a timed session: the nanoseconds that the threads waited for one another.
  int64_t waiting_nanoseconds() const;
  void ResetCounts();

 private:
  void RunSegments();
  void RunPhases(int32_t first, int32_t last);
  const Phase& PhaseAt(int32_t index) const {  // within the segment that runs
    return (*pass_.phases)[static_cast<size_t>(first_phase_ + index)];
  }

  ThreadPool& pool_;
  const bool is_timed_;
  const KvCache kv_;
  Scratch scratch_;
  std::vector<std::unique_ptr<ThreadScratch>> threads_;
  Pass pass_;                     // the position, and what the current pass works on
  int32_t first_phase_ = 0;       // of the segment that runs
  uint64_t next_serial_ = 1;      // of the next pass's first operation
  int64_t wall_nanoseconds_ = 0;  // of a timed session's phases
};

}  // namespace hybrid
