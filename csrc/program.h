// A transformer, recorded once as a flat list of fused operations, replayed for each token by
// sessions (session.h). Immutable after recording, and shared by all of them: it points to weights
// only.
//
// Each operation expands into phases of a thread-pool job (see thread_pool.h), one list for decode
// (one token) and one for prefill (up to kPrefillChunk tokens). The number of pieces of a phase
// never depends on the threads, and both lists compute each token with the same sums in the same
// order: prefill, decode and any number of threads give equal bits.
//
// Where another device computes parts of the model, the program is what is left, in segments: what
// can run in one go between two hand-offs (device_link.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace hybrid {

constexpr int32_t kPrefillChunk = kTokenTile;

struct ProgramShape {
  Format format;
  int32_t hidden_size;
  int32_t n_heads, n_kv_heads, head_dim;
  int32_t max_context;  // rows of the rope tables
  float rms_norm_eps;
  const float* rope_cos;  // (max_context, head_dim / 2)
  const float* rope_sin;
};

// The fused operations, and the rows that each takes.
enum class OpKind : int32_t {
  kEmbed,   // a: embedding. x = embedding[token] * scale
  kQkv,     // a: q, k, v. Norm, projections, rope, KV-cache write
  kAttend,  // a: o. Attention over the cache; x += scale * o(attention)
  kFfn,     // a: gate, b: up, c: down; d: a low-rank predictor's first matrix. Norm, gated FFN;
            // x += scale * y
  kHead,    // a: head. logits = head(norm(x) * scale); of a preview first, where there is one
};
struct Op {
  OpKind kind;
  Rows a{}, b{}, c{}, d{};
  const float* norm = nullptr;  // (hidden_size,)
  float scale = 1.0f;
  Activation activation = Activation::kRelu;
  float threshold = 0.0f;
  int32_t layer = 0;
  bool has_predictor = false;
  Predictor predictor{};
  bool has_preview = false;  // kHead
  Preview preview{};
  // kFfn whose neurons [0, first_neuron) belong to another device: it computed the norm (null here)
  // and the gates of neurons [0, n_given), and takes the sum of the others' outputs.
  bool is_split = false;
  int32_t first_neuron = 0, n_given = 0;

  bool has_low_rank() const { return has_predictor && predictor.kind == PredictorKind::kLowRank; }
};

// The format of a predictor's first matrix, which meets the same vectors as the gate.
inline Format PredictorFormat(Format format) {
  return format == Format::kBf16 ? Format::kBf16 : Format::kQ4;
}

enum class PhaseKind : int32_t {
  // decode
  kEmbed,
  kQkv,
  kAttend,
  kOutput,
  kPredict,
  kFfn,
  kHead,
  kShortlist,  // of a previewed head: the likeliest rows in full
  // prefill
  kEmbedTokens,
  kNormTokens,
  kQkvTokens,
  kAttendTokens,
  kQuantizeTokens,
  kOutputTokens,
  kPredictTokens,
  kFfnTokens,
  kFfnSumTokens,
  kHeadTokens,
  kShortlistTokens,
};
struct Phase {
  PhaseKind kind;
  int32_t op;
};

// Phases [end of the segment before, end), decode's and prefill's. It may begin with the residual
// stream coming from the other device, and end with it going there.
struct Segment {
  int32_t decode_end, prefill_end;
  bool receives_x, sends_x;
};

class Program {
 public:
  // Throws std::invalid_argument for sizes that the kernels do not take.
  explicit Program(const ProgramShape& shape);

  // Records one operation. Throws std::invalid_argument where its sizes do not fit the shape, or
  // where the program is sealed.
  void Add(const Op& op);

  // Ends the segment that is being recorded; the next begins with the residual stream of the other
  // device where `receives_x`.
  void EndSegment(bool sends_x);
  void ReceiveX() { receives_x_ = true; }

  // Ends recording: sessions rely on what they were opened with. Throws std::invalid_argument for a
  // program that has no embedding, or, where there is one segment, no layer or no head.
  void Seal();

  const ProgramShape& shape() const { return shape_; }
  int32_t head_stride() const { return RoundUp(shape_.head_dim, kHeadAlign); }
  int32_t n_layers() const { return n_layers_; }
  int32_t n_neurons() const { return n_neurons_; }  // of the widest FFN
  int32_t vocab_size() const { return vocab_size_; }
  int32_t largest_rank() const { return largest_rank_; }  // of low-rank predictors
  int64_t predictor_input_bytes() const { return predictor_input_bytes_; }  // the most of any
  bool has_preview() const { return has_preview_; }
  int32_t n_ops() const { return static_cast<int32_t>(ops_.size()); }
  const Op& op(int32_t index) const { return ops_[static_cast<size_t>(index)]; }
  const std::vector<Phase>& decode_phases() const { return decode_; }
  const std::vector<Phase>& prefill_phases() const { return prefill_; }
  // Once sealed: one at least.
  const std::vector<Segment>& segments() const { return segments_; }

 private:
  void AddPredictor(const Op& op);

  ProgramShape shape_;
  std::vector<Op> ops_;
  std::vector<Phase> decode_, prefill_;
  std::vector<Segment> segments_;
  bool receives_x_ = false;  // the segment that is being recorded
  int32_t n_layers_ = 0, n_neurons_ = 0, vocab_size_ = 0, largest_rank_ = 0;
  int64_t predictor_input_bytes_ = 0;
  bool has_head_ = false, has_preview_ = false, is_sealed_ = false;
};

}  // namespace hybrid
