// A pass takes tokens, up to kPrefillChunk, through the program: one token in decode, several in
// prefill. Several tokens may belong to several sequences. Pass holds what all pieces of all phases
// see.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "program.h"
#include "session/kv_cache.h"
#include "session/scratch.h"

namespace hybrid {

// The memory through which a session and another device exchange data. Both see it. Each array has
// rows for T = kPrefillChunk tokens.
struct Exchange {
  float* x;      // (T, hidden) the residual stream, in both directions
  float* h;      // (T, hidden) the normed input of a split FFN, from the device
  float* gates;  // (T, n_neurons) gates that the device computed; 0 if a neuron does not fire
  float* y;      // (T, hidden) the session's part of a split FFN, to the device
  int32_t n_neurons;
};

// What a prefill call writes for the profiler: `n_tokens` tokens of all layers.
struct Observation {
  int64_t n_tokens;
  // (n_layers, n_tokens, CeilDiv(n_neurons, 8)): bit i % 8 of byte i / 8 is set if neuron i fired.
  // The caller provides zeros.
  uint8_t* masks;
  uint16_t* inputs;  // fp16 (n_layers, n_tokens, hidden_size), the FFN's normed input; or null
};

// A token: where it stands in its sequence, and where its logits go (null: they are not wanted).
struct Token {
  int32_t id = 0, position = 0;
  const KvCache* kv = nullptr;
  float* logits = nullptr;
};

struct Pass {
  // Of the runner.
  const Program& program;
  Scratch& scratch;
  const bool is_dense;                  // no neuron is skipped, no preview used
  const std::vector<int32_t> ffn_runs;  // see FfnRuns
  Exchange exchange{};

  // Of this pass.
  const KernelTable* kernels = nullptr;
  const std::vector<Phase>* phases = nullptr;  // the program's, for decode or for prefill
  int32_t n_tokens = 0;
  Token tokens[kPrefillChunk] = {};
  // The tokens whose logits are wanted.
  int32_t n_wanted = 0;
  int32_t wanted[kPrefillChunk] = {};
  // Group i is tokens [groups[i], groups[i + 1]), of one sequence: what they attend to is read once
  // for all of them.
  int32_t n_groups = 0;
  int32_t groups[kPrefillChunk + 1] = {};
  bool counts_bytes = false;
  const Observation* observation = nullptr;
  int32_t first_observed = 0;  // the pass's first token within the observation
  uint64_t first_serial = 0;

  const ProgramShape& shape() const { return program.shape(); }
  int32_t HeadsPerKvHead() const { return shape().n_heads / shape().n_kv_heads; }
  float* QueryOf(int32_t token, int32_t head) const {
    return scratch.q + (int64_t{token} * shape().n_heads + head) * program.head_stride();
  }
  float* AttentionOf(int32_t token) const {
    return scratch.attention + int64_t{token} * shape().n_heads * shape().head_dim;
  }
  void Clear() { n_tokens = n_wanted = n_groups = 0; }
  void Append(const Token& token) {
    constexpr int32_t kLargestGroup = 8;
    const int32_t begin = groups[n_groups > 0 ? n_groups - 1 : 0];
    if (n_tokens == 0 || token.kv != tokens[n_tokens - 1].kv || n_tokens - begin == kLargestGroup)
      groups[n_groups++] = n_tokens;
    if (token.logits != nullptr) wanted[n_wanted++] = n_tokens;
    tokens[n_tokens++] = token;
    groups[n_groups] = n_tokens;
  }
  bool is_decode() const { return phases == &program.decode_phases(); }
  // Every operation of every pass has a number of its own.
  uint64_t Serial(const Phase& phase) const {
    return first_serial + static_cast<uint64_t>(phase.op);
  }
};

}  // namespace hybrid
