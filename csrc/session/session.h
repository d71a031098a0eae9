// A session is one sequence with a runner of its own (runner.h). Sessions share the recorded
// program and the thread pool.
//
// Prefill appends many tokens, up to kPrefillChunk in one pass, and Decode appends one. A Batch
// appends tokens to several sessions in one pass.
//
// Neither class is thread-safe. Different sessions of one program may run at once.
#pragma once

#include <cstdint>
#include <vector>

#include "session/runner.h"
#include "session/sequence.h"

namespace hybrid {

class Session {
 public:
  // Reserves a KV cache for `n_context` positions; the system provides its memory as it is used.
  // `kv` is what keys and values are rounded to. The rest is as in Runner.
  Session(const Program& program, ThreadPool& pool, int32_t n_context, KvFormat kv, bool is_dense,
          bool is_timed);

  int32_t position() const { return sequence_.position; }  // of the next token
  int32_t n_context() const { return sequence_.kv.n_context(); }
  KvFormat kv() const { return sequence_.kv.format(); }
  float largest_kv() const { return sequence_.largest_kv; }
  const float* logits() const { return sequence_.logits.get(); }
  const KvCache& kv_cache() const { return sequence_.kv; }
  Sequence& sequence() { return sequence_; }
  Runner& runner() { return runner_; }
  const Runner& runner() const { return runner_; }

  // Forgets all tokens from `position` on. A position beyond the session's says that the KV cache
  // has been filled up to there.
  void Truncate(int32_t position);

  // Append tokens. The caller guarantees position() + n <= n_context() and 0 <= token < vocab_size.
  // `all_logits`, if not null, receives (n, vocab_size) logits. logits() always holds those of the
  // last token. `observation`, if not null, has rows for these n tokens.
  void Prefill(const int32_t* tokens, int32_t n, float* all_logits,
               const Observation* observation = nullptr);
  void Decode(int32_t token);

  // Run a program of several segments, with work of another device between them: Begin up to
  // kPrefillChunk tokens, run every segment in order, End. `all_logits` as above. The memory of the
  // runner's exchange must outlive its use.
  void Begin(const int32_t* tokens, int32_t n, bool is_decode, float* all_logits);
  void RunSegment(int32_t segment) { runner_.RunSegment(segment); }
  void End() { runner_.End(); }

 private:
  Sequence sequence_;
  Runner runner_;
};

// Runs passes over tokens of several sessions.
class Batch {
 public:
  Batch(const Program& program, ThreadPool& pool, int32_t n_context, bool is_timed)
      : runner_(program, pool, n_context, false, is_timed) {}

  // The caller guarantees what Session::Prefill and Runner::Begin ask for.
  void Run(const std::vector<Part>& parts);
  Runner& runner() { return runner_; }
  const Runner& runner() const { return runner_; }

 private:
  Runner runner_;
};

}  // namespace hybrid
