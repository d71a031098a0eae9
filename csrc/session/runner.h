// A runner takes tokens through a recorded program (program.h), a pass at a time, on a thread pool.
// A pass holds up to kPrefillChunk tokens, of one sequence or of several. Every token gets the bits
// that it gets alone.
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
// (2) CountPieces cuts a phase into pieces (pieces.h). Where a sum crosses them, their sizes are
//     constants, so results do not depend on the number of threads, and prefill and decode give
//     equal bits.
// (3) A thread claims the next piece of its share, or helps another thread (thread_pool.h), and
//     runs the phase's code on it (RunPiece, stages.h).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"
#include "session/counters.h"
#include "session/pass.h"
#include "session/scratch.h"
#include "session/sequence.h"
#include "thread_pool.h"

namespace hybrid {

// The next tokens of a sequence.
struct Part {
  Sequence* sequence;
  const int32_t* tokens;
  int32_t n;
  float* all_logits;  // receives (n, vocab_size) logits, or null
  bool wants_logits;  // whether sequence->logits must become those of the last token
};

class Runner {
 public:
  // `n_context`: positions of the longest sequence. `is_dense`: no neuron is skipped, for
  // comparisons. `is_timed`: passes measure their stages. `program` and `pool` must outlive the
  // runner. Throws std::bad_alloc.
  Runner(const Program& program, ThreadPool& pool, int32_t n_context, bool is_dense, bool is_timed);

  // One pass, which allocates nothing. Begin receives up to kPrefillChunk tokens; no sequence
  // occurs twice. Every segment then runs, in order. End moves the sequences' positions on.
  // `is_decode` is for a single token whose logits are wanted, and reads memory faster.
  // `counts_bytes`: see Counters. `observation`, if not null, is for a single part; its row
  // `first_observed` belongs to the first token.
  struct Options {
    bool is_decode = false, counts_bytes = false;
    const Observation* observation = nullptr;
    int32_t first_observed = 0;
  };
  void Begin(const Part* parts, size_t n_parts, const Options& options);
  void RunSegment(int32_t segment);
  void RunSegments();
  void End();

  void SetExchange(const Exchange& exchange) { pass_.exchange = exchange; }
  const Exchange& exchange() const { return pass_.exchange; }
  const Program& program() const { return pass_.program; }
  ThreadPool& pool() const { return pool_; }

  // What all threads together counted since the last reset. It must not be read during a pass.
  Counters Count() const;
  // For a timed runner: the nanoseconds that the threads waited for one another.
  int64_t waiting_nanoseconds() const;
  void ResetCounts();

 private:
  void RunPhases(int32_t first, int32_t last);
  const Phase& PhaseAt(int32_t index) const {  // within the segment that runs
    return (*pass_.phases)[static_cast<size_t>(first_phase_ + index)];
  }

  ThreadPool& pool_;
  const bool is_timed_;
  Scratch scratch_;
  std::vector<std::unique_ptr<ThreadScratch>> threads_;
  Pass pass_;
  std::vector<Part> parts_;       // of the pass
  int32_t first_phase_ = 0;       // of the segment that runs
  uint64_t next_serial_ = 1;      // of the next pass's first operation
  int64_t wall_nanoseconds_ = 0;  // of a timed runner's phases
};

}  // namespace hybrid
