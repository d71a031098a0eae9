#include "program.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

namespace hybrid {

namespace {

constexpr int32_t kMaxLayers = 4096;

void Check(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

void CheckLayer(int32_t layer) {
  Check(layer >= 0 && layer < kMaxLayers, "layer must be in [0, 4096)");
}

void CheckSplit(const FfnSplit& split, int32_t n_neurons) {
  const int32_t first = split.first_neuron, n_given = split.n_given;
  Check(first % 8 == 0 || first == n_neurons,
        "first_neuron must be a multiple of 8, or the number of neurons");
  Check(0 <= first && first <= n_given && n_given <= n_neurons,
        "0 <= first_neuron <= n_given <= the number of neurons must hold");
  Check(n_given % kPredictTile == 0 || n_given == n_neurons,
        "n_given must be a multiple of 16, or the number of neurons");
}

}  // namespace

Program::Program(const ProgramShape& shape) : shape_(shape) {
  Check(shape.hidden_size > 0, "hidden_size must be positive");
  Check(shape.n_kv_heads > 0 && shape.n_heads % shape.n_kv_heads == 0,
        "n_heads must be a multiple of n_kv_heads");
  Check(shape.head_dim > 0 && shape.head_dim % 2 == 0, "head_dim must be even");
  Check(shape.max_context > 0, "max_context must be positive");
}

void Program::Add(const Embed& op) {
  Check(op.embedding.n_cols == shape_.hidden_size, "the embedding must have hidden_size columns");
  Record(op, {PhaseKind::kEmbed}, {PhaseKind::kEmbedTokens});
  vocab_size_ = op.embedding.n_rows;
}

void Program::Add(const Qkv& op) {
  Check(op.rows.n_cols == shape_.hidden_size, "qkv must have hidden_size columns");
  Check(op.rows.n_rows == (shape_.n_heads + 2 * shape_.n_kv_heads) * shape_.head_dim,
        "qkv must have (n_heads + 2 * n_kv_heads) * head_dim rows");
  CheckLayer(op.layer);
  Record(op, {PhaseKind::kQkv}, {PhaseKind::kQkvNormTokens, PhaseKind::kQkvTokens});
  n_layers_ = std::max(n_layers_, op.layer + 1);
}

void Program::Add(const Attend& op) {
  Check(op.o.n_cols == shape_.n_heads * shape_.head_dim && op.o.n_rows == shape_.hidden_size,
        "o must be (hidden_size, n_heads * head_dim)");
  CheckLayer(op.layer);
  Record(op, {PhaseKind::kAttend, PhaseKind::kOutput},
         {PhaseKind::kAttendTokens, PhaseKind::kQuantizeTokens, PhaseKind::kOutputTokens});
  n_layers_ = std::max(n_layers_, op.layer + 1);
}

void Program::Add(const Ffn& op) {
  const int32_t hidden = shape_.hidden_size, n_neurons = op.n_neurons();
  Check(op.gate.n_cols == hidden && op.up.n_cols == hidden && op.down.n_cols == hidden,
        "gate, up and down must have hidden_size columns");
  Check(op.up.n_rows == n_neurons && op.down.n_rows == n_neurons,
        "gate, up and down must have the same number of rows");
  Check(op.up.layout == RowLayout::kRowMajor && op.down.layout == RowLayout::kRowMajor,
        "up and down rows must be row-major");
  Check((op.norm == nullptr) == op.split.has_value(),
        "an FFN needs a norm unless another device computes it");
  if (op.split) CheckSplit(*op.split, n_neurons);
  if (op.predictor) CheckPredictor(op);
  CheckLayer(op.layer);
  if (op.predictor)
    Record(op, {PhaseKind::kPredict, PhaseKind::kFfn},
           {PhaseKind::kFfnNormTokens, PhaseKind::kPredictTokens, PhaseKind::kFfnTokens,
            PhaseKind::kFfnSumTokens});
  else
    Record(op, {PhaseKind::kFfn},
           {PhaseKind::kFfnNormTokens, PhaseKind::kFfnTokens, PhaseKind::kFfnSumTokens});
  n_layers_ = std::max(n_layers_, op.layer + 1);
  n_neurons_ = std::max(n_neurons_, n_neurons);
  if (!op.predictor) return;
  const Predictor& second = op.predictor->second;
  predictor_input_bytes_ = std::max(predictor_input_bytes_, PredictorInputBytes(second));
  largest_rank_ = std::max(largest_rank_, second.rank);
  has_other_inputs_ |= op.predictor->input != PredictorInput::kNormed;
}

void Program::CheckPredictor(const Ffn& op) const {
  const FfnPredictor& predictor = *op.predictor;
  const int32_t rank = predictor.second.rank;
  Check(op.gate.layout == RowLayout::kBitReversed,
        "gate rows that a predictor selects must be bit-reversed");
  Check(op.activation != Activation::kSilu,
        "a predictor needs an activation that can be zero: relu or fatrelu");
  Check(rank > 0 && (IsMlp(predictor.second) || rank % kRowTile == 0),
        "the predictor's rank must be a positive multiple of 4");
  Check(predictor.input == PredictorInput::kNormed || !op.split,
        "a predictor of another input needs the whole FFN on the CPU");
  Check(predictor.first.n_rows == rank && predictor.first.n_cols == shape_.hidden_size,
        "the predictor's first matrix must be (rank, hidden_size)");
}

void Program::Add(const Head& op) {
  const int32_t hidden = shape_.hidden_size;
  Check(op.rows.n_cols == hidden && op.rows.n_rows == vocab_size_,
        "the head must be (vocab_size, hidden_size)");
  if (op.preview) {
    Check(op.preview->n_cols == hidden && op.preview->n_rows == vocab_size_,
          "the preview must be (vocab_size, hidden_size)");
    Check(op.rows.layout == RowLayout::kRowMajor,
          "the rows of a head with a preview must be row-major");
    Record(op, {PhaseKind::kHead, PhaseKind::kShortlist},
           {PhaseKind::kHeadNormTokens, PhaseKind::kHeadTokens, PhaseKind::kShortlistTokens});
  } else {
    Record(op, {PhaseKind::kHead}, {PhaseKind::kHeadNormTokens, PhaseKind::kHeadTokens});
  }
  has_head_ = true;
  has_preview_ |= op.preview.has_value();
}

void Program::Record(const Op& op, std::initializer_list<PhaseKind> decode,
                     std::initializer_list<PhaseKind> prefill) {
  Check(!is_sealed_, "the program is sealed: a session was opened on it");
  const int32_t index = static_cast<int32_t>(ops_.size());
  for (PhaseKind kind : decode) decode_.push_back({kind, index});
  for (PhaseKind kind : prefill) prefill_.push_back({kind, index});
  ops_.push_back(op);
}

const float* Program::norm(int32_t op) const {
  if (op >= static_cast<int32_t>(ops_.size())) return nullptr;
  return std::visit(
      [](const auto& of) -> const float* {
        using T = std::decay_t<decltype(of)>;
        if constexpr (std::is_same_v<T, Embed> || std::is_same_v<T, Attend>)
          return nullptr;
        else
          return of.norm;
      },
      ops_[static_cast<size_t>(op)]);
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
