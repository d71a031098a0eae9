// What one thread of a runner counts and times. A runner adds up its threads' counters.
#pragma once

#include <cstdint>
#include <vector>

#include "platform.h"

namespace hybrid {

// The parts of a token for which bytes and times are counted.
enum Stage : int32_t {
  kStageQkv,
  kStageAttend,
  kStageOutput,
  kStagePredict,  // a low-rank predictor's first matrix; its other work belongs to kStageGate
  kStageGate,
  kStageUpDown,
  kStageHead
};
constexpr int32_t kStages = 7;
constexpr const char* kStageNames[kStages] = {"qkv",  "attend",  "output", "predict",
                                              "gate", "up_down", "head"};

struct Counters {
  Counters(int32_t n_layers, bool is_timed)
      : n_active(static_cast<size_t>(n_layers)),
        n_predicted(static_cast<size_t>(n_layers)),
        is_timed(is_timed) {}

  // (neuron, token) pairs of each layer, in decode and prefill: those that fire, and those whose
  // gate was computed because a predictor selected them, or all without one.
  std::vector<int64_t> n_active, n_predicted;
  // Rows of the head that were computed in full because they were on a preview's shortlist.
  int64_t n_shortlisted = 0;
  // Bytes of packed rows and of KV caches that passes have read, if they count them. What several
  // tokens need counts once. The head's bytes include the embedding rows.
  int64_t bytes[kStages] = {};
  int64_t nanoseconds[kStages] = {};  // of a timed runner

  // Start begins to measure. Tick adds the time since Start, or since the last Tick, to a stage.
  void Start() {
    if (is_timed) last_tick = platform::Nanoseconds();
  }
  void Tick(Stage stage) {
    if (!is_timed) return;
    const int64_t now = platform::Nanoseconds();
    nanoseconds[stage] += now - last_tick;
    last_tick = now;
  }

  void Reset() { *this = Counters(static_cast<int32_t>(n_active.size()), is_timed); }
  void Add(const Counters& other) {
    for (size_t layer = 0; layer < n_active.size(); ++layer) {
      n_active[layer] += other.n_active[layer];
      n_predicted[layer] += other.n_predicted[layer];
    }
    n_shortlisted += other.n_shortlisted;
    for (int32_t stage = 0; stage < kStages; ++stage) {
      bytes[stage] += other.bytes[stage];
      nanoseconds[stage] += other.nanoseconds[stage];
    }
  }

  // For Start and Tick.
  bool is_timed;
  int64_t last_tick = 0;
};

}  // namespace hybrid
