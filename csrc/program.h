// A program is a transformer, recorded once as a flat list of fused operations. Sessions
// (session.h) replay it for each token. It is immutable after recording and holds pointers to
// weights only, so all sessions share it.
//
// Each operation expands into phases of a thread-pool job (thread_pool.h). There are two lists of
// phases: one for decode (one token) and one for prefill (up to kPrefillChunk tokens). The number
// of pieces of a phase never depends on the number of threads. Both lists compute each token with
// the same sums in the same order. Prefill, decode and any number of threads therefore give equal
// bits.
//
// If another device computes parts of the model, the program holds the rest, cut into segments. A
// segment is what can run without a break between two hand-offs (device_link.h).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <variant>
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

// The fused operations. Rows and norms belong to the caller.

// x = embedding[token] * scale.
struct Embed {
  Rows embedding;  // (vocab_size, hidden_size)
  float scale;
};

// Norm, projections and rope; writes keys and values to the KV cache.
struct Qkv {
  const float* norm;  // (hidden_size,)
  Rows rows;          // ((n_heads + 2 * n_kv_heads) * head_dim, hidden_size): q, k, v
  int32_t layer;
  std::array<float, 3> matrix_scales;  // of q, k and v, in place of the one of `rows`
};

// Attention over the KV cache. x += scale * o(attention).
struct Attend {
  Rows o;  // (hidden_size, n_heads * head_dim)
  float scale;
  int32_t layer;
};

// What a predictor's first matrix is multiplied with. Each file of other engines was trained for
// one of the last two.
enum class PredictorInput : int32_t {
  kNormed,    // the FFN's input h
  kResidual,  // the residual stream before the norm
  kPrevious,  // h of the layer before; in the first layer, its own h
};

// Names the neurons whose gates are computed.
struct FfnPredictor {
  Rows first;        // (rank, hidden_size)
  Format format;     // of `first`
  Predictor second;  // scores every neuron from first(input)
  PredictorInput input = PredictorInput::kNormed;
  const float* biases = nullptr;  // (rank,) of `first`; null: zeros
};

// Another device computes neurons [0, first_neuron). It also computes the norm, and the gates of
// neurons [0, n_given). It receives the sum of the other neurons' outputs.
struct FfnSplit {
  int32_t first_neuron, n_given;
};

// Norm, gated FFN. x += scale * y.
struct Ffn {
  const float* norm;    // (hidden_size,); null if the FFN is split
  Rows gate, up, down;  // (n_neurons, hidden_size)
  Activation activation;
  float threshold;
  float scale;
  int32_t layer;
  std::optional<FfnPredictor> predictor;
  std::optional<FfnSplit> split;

  int32_t n_neurons() const { return gate.n_rows; }
  int32_t first_neuron() const { return split ? split->first_neuron : 0; }
  int32_t n_given() const { return split ? split->n_given : 0; }
};

// logits = rows(norm(x) * scale). With a preview, all logits are estimated first.
struct Head {
  const float* norm;  // (hidden_size,)
  Rows rows;          // (vocab_size, hidden_size)
  float scale;
  std::optional<Preview> preview;
};

using Op = std::variant<Embed, Qkv, Attend, Ffn, Head>;

// The format of a predictor's first matrix, which is multiplied with the same vectors as the gate.
inline Format PredictorFormat(Format format) { return HasBlocks(format) ? Format::kQ4 : format; }

enum class PhaseKind : int32_t {
  // decode
  kEmbed,
  kQkv,
  kAttend,
  kOutput,
  kPredict,
  kFfn,
  kHead,
  kShortlist,  // with a preview: the likeliest rows in full
  // prefill
  kEmbedTokens,
  kQkvNormTokens,
  kQkvTokens,
  kAttendTokens,
  kQuantizeTokens,
  kOutputTokens,
  kFfnNormTokens,
  kPredictTokens,
  kFfnTokens,
  kFfnSumTokens,
  kHeadNormTokens,
  kHeadTokens,
  kShortlistTokens,
};
struct Phase {
  PhaseKind kind;
  int32_t op;
};

// Phases [end of the segment before, end), in decode's list and in prefill's. At the beginning of a
// segment the session may receive the residual stream from the other device, and at its end it may
// send the stream there.
struct Segment {
  int32_t decode_end, prefill_end;
  bool receives_x, sends_x;
};

class Program {
 public:
  // Throws std::invalid_argument for sizes that the kernels do not support.
  explicit Program(const ProgramShape& shape);

  // Each records one operation. They throw std::invalid_argument if its sizes do not fit the shape,
  // or if the program is sealed.
  void Add(const Embed& op);
  void Add(const Qkv& op);
  void Add(const Attend& op);
  void Add(const Ffn& op);
  void Add(const Head& op);

  // EndSegment ends the segment that is being recorded. ReceiveX lets the segment that is being
  // recorded begin with the residual stream from the other device.
  void EndSegment(bool sends_x);
  void ReceiveX() { receives_x_ = true; }

  // Ends recording: a session relies on a program that no longer changes. Throws
  // std::invalid_argument for a program without an embedding. A program of one segment must also
  // have a layer and a head.
  void Seal();

  const ProgramShape& shape() const { return shape_; }
  int32_t head_stride() const { return RoundUp(shape_.head_dim, kHeadAlign); }
  int32_t n_layers() const { return n_layers_; }
  int32_t n_neurons() const { return n_neurons_; }  // of the widest FFN
  int32_t vocab_size() const { return vocab_size_; }
  int32_t largest_rank() const { return largest_rank_; }  // of all low-rank predictors
  int64_t predictor_input_bytes() const { return predictor_input_bytes_; }  // the largest
  // Whether any predictor takes another input than the FFN's.
  bool has_other_inputs() const { return has_other_inputs_; }
  bool has_preview() const { return has_preview_; }
  // The operation of a phase. T is the type that the phase's kind belongs to.
  template <typename T>
  const T& op(const Phase& phase) const {
    return std::get<T>(ops_[static_cast<size_t>(phase.op)]);
  }
  // The norm with which an operation begins. Null if it has none, or if there is no such operation.
  const float* norm(int32_t op) const;
  const std::vector<Phase>& decode_phases() const { return decode_; }
  const std::vector<Phase>& prefill_phases() const { return prefill_; }
  // At least one, once the program is sealed.
  const std::vector<Segment>& segments() const { return segments_; }

 private:
  void Record(const Op& op, std::initializer_list<PhaseKind> decode,
              std::initializer_list<PhaseKind> prefill);
  void CheckPredictor(const Ffn& op) const;

  ProgramShape shape_;
  std::vector<Op> ops_;
  std::vector<Phase> decode_, prefill_;
  std::vector<Segment> segments_;
  bool receives_x_ = false;  // of the segment that is being recorded
  int32_t n_layers_ = 0, n_neurons_ = 0, vocab_size_ = 0, largest_rank_ = 0;
  int64_t predictor_input_bytes_ = 0;
  bool has_head_ = false, has_preview_ = false, has_other_inputs_ = false, is_sealed_ = false;
};

}  // namespace hybrid
