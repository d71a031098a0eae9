// Session: its calls, segments and phases.

#include "session/session.h"

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

Session::Session(const Program& program, ThreadPool& pool, int32_t n_context, KvFormat kv,
                 bool is_dense, bool is_timed)
    : pool_(pool),
      is_timed_(is_timed),
      kv_(kv, n_context, program.n_layers(), program.shape().n_kv_heads, program.head_stride()),
      scratch_(program, n_context),
      pass_{program, kv_, scratch_, is_dense, FfnRuns(pool.n_threads())} {
  for (int32_t thread = 0; thread < pool.n_threads(); ++thread)
    threads_.push_back(std::make_unique<ThreadScratch>(program, n_context, is_timed));
}

void Session::Truncate(int32_t position) {
  pass_.position = position;
  for (const auto& thread : threads_) thread->largest_kv = 0.0f;
}

float Session::LargestKv() const {
  float largest = 0.0f;
  for (const auto& thread : threads_) largest = std::max(largest, thread->largest_kv);
  return largest;
}

Counters Session::Count() const {
  Counters sum(program().n_layers(), false);
  for (const auto& thread : threads_) sum.Add(thread->counters);
  return sum;
}

int64_t Session::waiting_nanoseconds() const {
  const Counters sum = Count();
  return std::accumulate(sum.nanoseconds, sum.nanoseconds + kStages,
                         wall_nanoseconds_ * pool_.n_threads(), std::minus<int64_t>());
}

void Session::ResetCounts() {
  for (const auto& thread : threads_) thread->counters.Reset();
  wall_nanoseconds_ = 0;
}

void Session::Decode(int32_t token) {
  Begin(&token, 1, true, nullptr, true);
  RunSegments();
  End();
}

void Session::Prefill(const int32_t* tokens, int32_t n, float* all_logits,
                      const Observation* observation) {
  pass_.observation = observation;
  for (int32_t first = 0; first < n; first += kPrefillChunk) {
    const int32_t n_tokens = std::min(kPrefillChunk, n - first);
    float* logits =
        all_logits == nullptr ? nullptr : all_logits + int64_t{first} * program().vocab_size();
    pass_.first_observed = first;
    Begin(tokens + first, n_tokens, false, logits, first + n_tokens == n);
    RunSegments();
    End();
  }
  pass_.observation = nullptr;
}

void Session::Begin(const int32_t* tokens, int32_t n, bool is_decode, float* all_logits,
                    bool wants_logits) {
  pass_.kernels = &ActiveKernels();
  pass_.phases = is_decode ? &program().decode_phases() : &program().prefill_phases();
  std::copy(tokens, tokens + n, pass_.tokens);
  pass_.n_tokens = n;
  pass_.all_logits = all_logits;
  pass_.wants_logits = wants_logits;
  pass_.first_serial = next_serial_;
  next_serial_ += pass_.phases->size();
}

void Session::RunSegments() {
  for (size_t i = 0; i < program().segments().size(); ++i) RunSegment(static_cast<int32_t>(i));
}

void Session::RunSegment(int32_t index) {
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

void Session::RunPhases(int32_t first, int32_t last) {
  first_phase_ = first;
  Job job;
  job.context = this;
  job.n_phases = last - first;
  job.n_pieces = [](void* context, int32_t phase) {
    const Session& session = *static_cast<Session*>(context);
    return CountPieces(session.pass_, session.PhaseAt(phase));
  };
  // Neurons may be sorted by falling frequency: later pieces of an FFN are then lighter.
  job.is_dealt = [](void* context, int32_t phase) {
    return static_cast<Session*>(context)->PhaseAt(phase).kind == PhaseKind::kFfn;
  };
  job.ahead = [](void* context, int32_t phase, int32_t thread, int32_t n_threads) {
    const Session& session = *static_cast<Session*>(context);
    return NextWeights(session.pass_, session.first_phase_ + phase, thread, n_threads);
  };
  job.run_piece = [](void* context, int32_t phase, int32_t piece, int32_t thread) {
    const Session& session = *static_cast<Session*>(context);
    RunPiece(session.pass_, session.PhaseAt(phase), piece,
             *session.threads_[static_cast<size_t>(thread)]);
  };
  const int64_t started = is_timed_ ? platform::Nanoseconds() : 0;
  pool_.Run(job);
  if (is_timed_) wall_nanoseconds_ += platform::Nanoseconds() - started;
}

}  // namespace hybrid
