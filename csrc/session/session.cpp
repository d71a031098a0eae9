#include "session/session.h"

#include <algorithm>

namespace hybrid {

Session::Session(const Program& program, ThreadPool& pool, int32_t n_context, KvFormat kv,
                 bool is_dense, bool is_timed)
    : sequence_{{kv, n_context, program.n_layers(), program.shape().n_kv_heads,
                 program.head_stride()},
                Pages<float>(program.vocab_size())},
      runner_(program, pool, n_context, is_dense, is_timed) {}

void Session::Truncate(int32_t position) {
  sequence_.position = position;
  sequence_.largest_kv = 0.0f;
}

void Session::Decode(int32_t token) {
  Begin(&token, 1, true, nullptr);
  runner_.RunSegments();
  End();
}

void Session::Prefill(const int32_t* tokens, int32_t n, float* all_logits,
                      const Observation* observation) {
  for (int32_t first = 0; first < n; first += kPrefillChunk) {
    const int32_t n_tokens = std::min(kPrefillChunk, n - first);
    float* logits = all_logits;
    if (logits != nullptr) logits += int64_t{first} * runner_.program().vocab_size();
    Runner::Options options;
    options.observation = observation;
    options.first_observed = first;
    const Part part = {&sequence_, tokens + first, n_tokens, logits, first + n_tokens == n};
    runner_.Begin(&part, 1, options);
    runner_.RunSegments();
    runner_.End();
  }
}

void Session::Begin(const int32_t* tokens, int32_t n, bool is_decode, float* all_logits) {
  Runner::Options options;
  options.is_decode = options.counts_bytes = is_decode;
  const Part part = {&sequence_, tokens, n, all_logits, true};
  runner_.Begin(&part, 1, options);
}

void Batch::Run(const std::vector<Part>& parts) {
  Runner::Options options;
  options.is_decode = parts.size() == 1 && parts[0].n == 1 && parts[0].wants_logits &&
                      parts[0].all_logits == nullptr;
  options.counts_bytes = true;
  runner_.Begin(parts.data(), parts.size(), options);
  runner_.RunSegments();
  runner_.End();
}

}  // namespace hybrid
