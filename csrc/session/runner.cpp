// Runner: its passes, segments and phases.

#include "session/runner.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

#include "kernels/dispatch.h"
#include "platform.h"
#include "session/pieces.h"
#include "session/prefetch.h"
#include "session/stages.h"

namespace hybrid {

Runner::Runner(const Program& program, ThreadPool& pool, int32_t n_context, bool is_dense,
               bool is_timed)
    : pool_(pool),
      is_timed_(is_timed),
      scratch_(program, n_context),
      pass_{program, scratch_, is_dense, FfnRuns(pool.n_threads())} {
  for (int32_t thread = 0; thread < pool.n_threads(); ++thread)
    threads_.push_back(std::make_unique<ThreadScratch>(program, n_context, is_timed));
  parts_.reserve(kPrefillChunk);
}

Counters Runner::Count() const {
  Counters sum(program().n_layers(), false);
  for (const auto& thread : threads_) sum.Add(thread->counters);
  return sum;
}

int64_t Runner::waiting_nanoseconds() const {
  const Counters sum = Count();
  return std::accumulate(sum.nanoseconds, sum.nanoseconds + kStages,
                         wall_nanoseconds_ * pool_.n_threads(), std::minus<int64_t>());
}

void Runner::ResetCounts() {
  for (const auto& thread : threads_) thread->counters.Reset();
  wall_nanoseconds_ = 0;
}

void Runner::Begin(const Part* parts, size_t n_parts, const Options& options) {
  pass_.kernels = &ActiveKernels();
  pass_.phases = options.is_decode ? &program().decode_phases() : &program().prefill_phases();
  pass_.counts_bytes = options.counts_bytes;
  pass_.observation = options.observation;
  pass_.first_observed = options.first_observed;
  pass_.first_serial = next_serial_;
  next_serial_ += pass_.phases->size();
  parts_.assign(parts, parts + n_parts);
  pass_.Clear();
  for (const Part& part : parts_)
    for (int32_t i = 0; i < part.n; ++i) {
      float* logits = nullptr;
      if (part.all_logits != nullptr)
        logits = part.all_logits + int64_t{i} * program().vocab_size();
      else if (part.wants_logits && i + 1 == part.n)
        logits = part.sequence->logits.get();
      pass_.Append({part.tokens[i], part.sequence->position + i, &part.sequence->kv, logits});
    }
}

void Runner::RunSegments() {
  for (size_t i = 0; i < program().segments().size(); ++i) RunSegment(static_cast<int32_t>(i));
}

void Runner::RunSegment(int32_t index) {
  const Segment& segment = program().segments()[static_cast<size_t>(index)];
  const Segment none{0, 0, false, false};
  const Segment& before = index == 0 ? none : program().segments()[static_cast<size_t>(index) - 1];
  const size_t x_bytes = sizeof(float) * static_cast<size_t>(pass_.n_tokens) *
                         static_cast<size_t>(program().shape().hidden_size);
  if (segment.receives_x) std::memcpy(scratch_.x.get(), pass_.exchange.x, x_bytes);
  if (pass_.is_decode())
    RunPhases(before.decode_end, segment.decode_end);
  else
    RunPhases(before.prefill_end, segment.prefill_end);
  if (segment.sends_x) std::memcpy(pass_.exchange.x, scratch_.x.get(), x_bytes);
}

void Runner::End() {
  int32_t token = 0;
  for (const Part& part : parts_) {
    Sequence& sequence = *part.sequence;
    for (int32_t i = 0; i < part.n; ++i, ++token)
      for (const auto& thread : threads_) {
        float& largest = thread->largest_kv[token];
        sequence.largest_kv = std::max(sequence.largest_kv, largest);
        largest = 0.0f;
      }
    sequence.position += part.n;
    if (part.all_logits == nullptr || !part.wants_logits) continue;
    const int64_t n_vocab = program().vocab_size();
    std::copy_n(part.all_logits + (part.n - 1) * n_vocab, n_vocab, sequence.logits.get());
  }
}

void Runner::RunPhases(int32_t first, int32_t last) {
  first_phase_ = first;
  Job job;
  job.context = this;
  job.n_phases = last - first;
  job.n_pieces = [](void* context, int32_t phase) {
    const Runner& runner = *static_cast<Runner*>(context);
    return CountPieces(runner.pass_, runner.PhaseAt(phase));
  };
  // Neurons may be sorted by falling frequency: later pieces of an FFN are then lighter.
  job.is_dealt = [](void* context, int32_t phase) {
    const PhaseKind kind = static_cast<Runner*>(context)->PhaseAt(phase).kind;
    return kind == PhaseKind::kFfn || kind == PhaseKind::kFfnTokens;
  };
  job.ahead = [](void* context, int32_t phase, int32_t thread, int32_t n_threads) {
    const Runner& runner = *static_cast<Runner*>(context);
    return NextWeights(runner.pass_, runner.first_phase_ + phase, thread, n_threads);
  };
  job.run_piece = [](void* context, int32_t phase, int32_t piece, int32_t thread) {
    const Runner& runner = *static_cast<Runner*>(context);
    RunPiece(runner.pass_, runner.PhaseAt(phase), piece,
             *runner.threads_[static_cast<size_t>(thread)]);
  };
  const int64_t started = is_timed_ ? platform::Nanoseconds() : 0;
  pool_.Run(job);
  if (is_timed_) wall_nanoseconds_ += platform::Nanoseconds() - started;
}

}  // namespace hybrid
