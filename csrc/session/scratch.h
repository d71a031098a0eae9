// The scratch memory of a runner: what all threads share, and what each thread has for itself.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels/kernels.h"
#include "program.h"
#include "session/counters.h"
#include "session/pages.h"

namespace hybrid {

// T = kPrefillChunk tokens, n_spans = spans of the context.
struct Scratch {
  Scratch(const Program& program, int32_t n_context);

  Pages<float> x;          // (T, hidden_size) residual stream
  Pages<uint8_t> inputs;   // (T) quantised vectors: the operation's input, in prefill
  Pages<float> q;          // (T, n_heads, head_stride)
  Pages<float> attention;  // (T, n_heads * head_dim)
  Pages<float> span_max;   // (n_spans, n_heads)
  Pages<float> span_sum;   // (n_spans, n_heads)
  Pages<float> span_out;   // (n_spans, n_heads, head_stride)
  Pages<float> z;          // (T, rank) a predictor's first matrix times the input
  // (2, T) q8 vectors: other inputs of predictors than the operation's. See OtherInputs.
  Pages<uint8_t> other_inputs;
  Pages<float> partials;          // (kFfnPieces, PartialStride)
  Pages<uint8_t> preview_inputs;  // (T, PreviewInputBytes), in prefill
  Pages<float> tile_maxima;       // (T, tiles of the preview); decode uses the first row

  // How many partial sums of even places are done, how many of odd places, and how many of the two
  // halves are added up. Each count has its own cache line. All are 0 between operations.
  struct alignas(64) Arrived {
    std::atomic<int32_t> n{0};
  };
  Arrived n_arrived[3];
};

// No two threads write to the same cache line.
struct alignas(64) ThreadScratch {
  ThreadScratch(const Program& program, int32_t n_context, bool is_timed);

  Pages<float> floats;              // for one piece
  Pages<Active> active;             // pairs of the FFN's pieces
  Pages<int32_t> predicted;         // predicted neurons of the FFN's pieces
  Pages<uint8_t> predictor_inputs;  // (T, PredictorInputBytes)
  Pages<uint8_t> input;             // decode's quantised vector: the operation's input
  Pages<uint8_t> other_input;       // decode's q8 vector: another input of a predictor
  Pages<uint8_t> preview_input;     // (PreviewInputBytes,), in decode
  Pages<int32_t> shortlist;         // rows of one piece
  Pages<float> rotated;             // (head_dim,) one key, after rope
  Pages<uint16_t> key;              // (head_dim,) the same key as the cache stores it
  float scores[kHeadTile * kSpan];

  // Per token of the pass: the largest magnitude that was rounded for the KV cache.
  float largest_kv[kPrefillChunk] = {};
  float likely = 0.0f;  // the least logit on the shortlist
  // What a thread computes once per operation says for which operation of which pass it holds
  // (Pass::Serial).
  uint64_t input_serial = 0;  // of `input` and `preview_input`
  uint64_t other_serial = 0, predictor_serial = 0, likely_serial = 0;

  Counters counters;
};

}  // namespace hybrid
