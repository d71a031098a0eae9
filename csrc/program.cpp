#include "program.h"

#include <algorithm>
#include <stdexcept>

namespace hybrid {

namespace {

constexpr int32_t kMaxLayers = 4096;

void Check(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

}  // namespace

Program::Program(const ProgramShape& shape) : shape_(shape) {
  Check(shape.hidden_size > 0 && shape.hidden_size % kBlock == 0,
        "hidden_size must be a multiple of 32");
  Check(shape.n_kv_heads > 0 && shape.n_heads % shape.n_kv_heads == 0,
        "n_heads must be a multiple of n_kv_heads");
  Check(shape.head_dim > 0 && shape.head_dim % 2 == 0, "head_dim must be even");
  Check(shape.n_heads * shape.head_dim % kBlock == 0,
        "n_heads * head_dim must be a multiple of 32");
  Check(shape.max_context > 0, "max_context must be positive");
}

void Program::Add(const Op& op) {
  const int32_t hidden = shape_.hidden_size, attention = shape_.n_heads * shape_.head_dim;
  const int32_t index = static_cast<int32_t>(ops_.size());
  Check(!is_sealed_, "the program is sealed: a session was opened on it");
  Check(op.layer >= 0 && op.layer < kMaxLayers, "layer must be in [0, 4096)");
  switch (op.kind) {
    case OpKind::kEmbed:
      Check(op.a.n_cols == hidden, "the embedding must have hidden_size columns");
      vocab_size_ = op.a.n_rows;
      decode_.push_back({PhaseKind::kEmbed, index});
      prefill_.push_back({PhaseKind::kEmbedTokens, index});
      break;
    case OpKind::kQkv:
      Check(op.a.n_cols == hidden, "qkv must have hidden_size columns");
      Check(op.a.n_rows == attention + 2 * shape_.n_kv_heads * shape_.head_dim,
            "qkv must have (n_heads + 2 * n_kv_heads) * head_dim rows");
      decode_.push_back({PhaseKind::kQkv, index});
      for (PhaseKind kind : {PhaseKind::kNormTokens, PhaseKind::kQkvTokens})
        prefill_.push_back({kind, index});
      break;
    case OpKind::kAttend:
      Check(op.a.n_cols == attention && op.a.n_rows == hidden,
            "o must be (hidden_size, n_heads * head_dim)");
      for (PhaseKind kind : {PhaseKind::kAttend, PhaseKind::kOutput})
        decode_.push_back({kind, index});
      for (PhaseKind kind :
           {PhaseKind::kAttendTokens, PhaseKind::kQuantizeTokens, PhaseKind::kOutputTokens})
        prefill_.push_back({kind, index});
      break;
    case OpKind::kFfn:
      Check(op.a.n_cols == hidden && op.b.n_cols == hidden && op.c.n_cols == hidden,
            "gate, up and down must have hidden_size columns");
      Check(op.a.n_rows == op.b.n_rows && op.a.n_rows == op.c.n_rows,
            "gate, up and down must have the same number of rows");
      Check(op.is_split || op.norm != nullptr,
            "an FFN needs a norm unless another device computes it");
      Check(op.b.layout == RowLayout::kRowMajor && op.c.layout == RowLayout::kRowMajor,
            "up and down rows must be row-major");
      Check(op.first_neuron % 8 == 0 || op.first_neuron == op.a.n_rows,
            "first_neuron must be a multiple of 8, or the number of neurons");
      Check(0 <= op.first_neuron && op.first_neuron <= op.n_given && op.n_given <= op.a.n_rows,
            "0 <= first_neuron <= n_given <= the number of neurons must hold");
      Check(op.n_given % kPredictTile == 0 || op.n_given == op.a.n_rows,
            "n_given must be a multiple of 16, or the number of neurons");
      if (op.has_predictor) {
        AddPredictor(op);
        decode_.push_back({PhaseKind::kPredict, index});
      }
      decode_.push_back({PhaseKind::kFfn, index});
      prefill_.push_back({PhaseKind::kNormTokens, index});
      if (op.has_predictor) prefill_.push_back({PhaseKind::kPredictTokens, index});
      for (PhaseKind kind : {PhaseKind::kFfnTokens, PhaseKind::kFfnSumTokens})
        prefill_.push_back({kind, index});
      break;
    case OpKind::kHead:
      Check(op.a.n_cols == hidden && op.a.n_rows == vocab_size_,
            "the head must be (vocab_size, hidden_size)");
      decode_.push_back({PhaseKind::kHead, index});
      for (PhaseKind kind : {PhaseKind::kNormTokens, PhaseKind::kHeadTokens})
        prefill_.push_back({kind, index});
      if (!op.has_preview) break;
      Check(op.preview.n_cols == hidden && op.preview.n_rows == op.a.n_rows,
            "the preview must be (vocab_size, hidden_size)");
      Check(op.a.layout == RowLayout::kRowMajor,
            "the rows of a head with a preview must be row-major");
      decode_.push_back({PhaseKind::kShortlist, index});
      prefill_.push_back({PhaseKind::kShortlistTokens, index});
      has_preview_ = true;
      break;
  }
  has_head_ |= op.kind == OpKind::kHead;
  if (op.kind == OpKind::kQkv || op.kind == OpKind::kAttend || op.kind == OpKind::kFfn)
    n_layers_ = std::max(n_layers_, op.layer + 1);
  if (op.kind == OpKind::kFfn) n_neurons_ = std::max(n_neurons_, op.a.n_rows);
  ops_.push_back(op);
}

void Program::AddPredictor(const Op& op) {
  const Predictor& predictor = op.predictor;
  Check(op.a.layout == RowLayout::kBitReversed,
        "gate rows that a predictor selects must be bit-reversed");
  Check(op.activation != Activation::kSilu,
        "a predictor needs an activation that can be zero: relu or fatrelu");
  Check(predictor.rank > 0 && predictor.rank % kRowTile == 0,
        "the predictor's rank must be a positive multiple of 4");
  Check(op.d.n_rows == predictor.rank && op.d.n_cols == shape_.hidden_size,
        "the predictor's first matrix must be (rank, hidden_size)");
  largest_rank_ = std::max(largest_rank_, predictor.rank);
  predictor_input_bytes_ = std::max(predictor_input_bytes_, PredictorInputBytes(predictor));
}

void Program::EndSegment(bool sends_x) {
  Check(!is_sealed_, "the program is sealed: a session was opened on it");
  segments_.push_back({static_cast<int32_t>(decode_.size()), static_cast<int32_t>(prefill_.size()),
                       receives_x_, sends_x});
  receives_x_ = false;
}

void Program::Seal() {
  if (is_sealed_) return;
  // If a hand-off follows the last operation, there is no further segment.
  const int32_t end = segments_.empty() ? 0 : segments_.back().decode_end;
  if (segments_.empty() || end < static_cast<int32_t>(decode_.size())) EndSegment(false);
  Check(vocab_size_ > 0, "a program needs an embedding");
  Check(segments_.size() > 1 || segments_[0].sends_x || (n_layers_ > 0 && has_head_),
        "a program of one segment needs an embedding, a layer and a head");
  is_sealed_ = true;
}

}  // namespace hybrid
