// Session: its memory, its calls, and how many pieces each phase has.

#include "session/session.h"

#include <algorithm>
#include <cstring>

#include "kernels/dispatch.h"

namespace hybrid {

namespace {
// Every run of pieces begins and ends with a wait for memory, so few threads take two pieces at
// once. Towards the end they take single pieces, so that all threads end together (docs/log.md).
std::vector<int32_t> FfnRuns(int32_t n_threads) {
  std::vector<int32_t> runs = {0};
  while (runs.back() < kFfnPieces)
    runs.push_back(runs.back() + (n_threads < 4 && runs.back() < kPairedPieces ? 2 : 1));
  return runs;
}
}  // namespace

Session::Session(const Program& program, ThreadPool& pool, int32_t n_context, bool is_dense,
                 bool is_timed)
    : program_(program),
      pool_(pool),
      n_context_(n_context),
      is_dense_(is_dense),
      is_timed_(is_timed),
      ffn_runs_(FfnRuns(pool.n_threads())),
      x_(int64_t{kPrefillChunk} * program.shape().hidden_size),
      x_quant_(kPrefillChunk *
               VectorBytes(program.shape().format,
                           std::max(program.shape().hidden_size,
                                    program.shape().n_heads * program.shape().head_dim))),
      q_(int64_t{kPrefillChunk} * program.shape().n_heads * program.head_stride()),
      attention_(int64_t{kPrefillChunk} * program.shape().n_heads * program.shape().head_dim),
      span_max_(int64_t{program.shape().n_heads} * CeilDiv(n_context, kSpan)),
      span_sum_(int64_t{program.shape().n_heads} * CeilDiv(n_context, kSpan)),
      span_out_(int64_t{CeilDiv(n_context, kSpan)} * program.shape().n_heads *
                program.head_stride()),
      z_(int64_t{kPrefillChunk} * std::max(program.largest_rank(), 1)),
      partials_(kFfnPieces * (int64_t{kPrefillChunk} *
                                  PaddedCols(program.shape().format, program.shape().hidden_size) +
                              kPartialGap)),
      logits_(program.vocab_size()),
      preview_inputs_(program.has_preview()
                          ? kPrefillChunk * PreviewInputBytes(program.shape().hidden_size)
                          : 0),
      tile_maxima_(program.has_preview()
                       ? int64_t{kPrefillChunk} * CeilDiv(program.vocab_size(), kPredictTile)
                       : 0),
      kv_(int64_t{CeilDiv(n_context, kSpan)} * program.n_layers() * program.shape().n_kv_heads * 2 *
              kSpan * program.head_stride(),
          true) {
  const ProgramShape& shape = program.shape();
  const int32_t group = shape.n_heads / shape.n_kv_heads, n_spans = CeilDiv(n_context, kSpan);
  const int64_t rows = std::max({shape.head_dim, kOutputRows, kHeadRows});
  // The largest of these uses: a piece's dot products for all tokens; a norm; one KV head's spans
  // with their maxima and sums; the maxima of a preview's tiles.
  const int64_t n_floats = std::max({rows * kPrefillChunk, int64_t{shape.hidden_size},
                                     int64_t{CeilDiv(program.vocab_size(), kPredictTile)},
                                     int64_t{shape.n_heads} * shape.head_dim,
                                     int64_t{n_spans} * group * (program.head_stride() + 2)});
  const int64_t vector_bytes =
      VectorBytes(shape.format, std::max(shape.hidden_size, shape.n_heads * shape.head_dim));
  // Pieces begin at multiples of 8 neurons, hence the 8. Prefill takes one piece at a time, decode
  // takes several.
  const int64_t n_neurons = program.n_neurons();
  const int64_t n_pairs =
      std::max(int64_t{CeilDiv(program.n_neurons(), kFfnPieces) + 8} * kPrefillChunk, n_neurons);
  const int64_t predictor_bytes = std::max<int64_t>(program.predictor_input_bytes(), 4);
  const int64_t preview_bytes = program.has_preview() ? PreviewInputBytes(shape.hidden_size) : 0;
  for (int32_t thread = 0; thread < pool.n_threads(); ++thread)
    threads_.push_back(std::make_unique<ThreadScratch>(
        n_floats, vector_bytes, n_pairs + 1, n_neurons + 1, kPrefillChunk * predictor_bytes,
        preview_bytes, shape.head_dim, program.n_layers()));
}

Session::~Session() = default;

int64_t Session::active_count(int32_t layer) const {
  int64_t n = 0;
  for (const auto& thread : threads_) n += thread->n_active[static_cast<size_t>(layer)];
  return n;
}

int64_t Session::predicted_count(int32_t layer) const {
  int64_t n = 0;
  for (const auto& thread : threads_) n += thread->n_predicted[static_cast<size_t>(layer)];
  return n;
}

int64_t Session::shortlisted_count() const {
  int64_t n = 0;
  for (const auto& thread : threads_) n += thread->n_shortlisted;
  return n;
}

int64_t Session::decode_bytes(Stage stage) const {
  int64_t bytes = 0;
  for (const auto& thread : threads_) bytes += thread->bytes[stage];
  return bytes;
}

int64_t Session::stage_nanoseconds(Stage stage) const {
  int64_t sum = 0;
  for (const auto& thread : threads_) sum += thread->nanoseconds[stage];
  return sum;
}

int64_t Session::waiting_nanoseconds() const {
  int64_t waiting = timed_wall_ * pool_.n_threads();
  for (int32_t stage = 0; stage < kStages; ++stage)
    waiting -= stage_nanoseconds(static_cast<Stage>(stage));
  return waiting;
}

void Session::ResetCounts() {
  for (const auto& thread : threads_) {
    std::fill(thread->n_active.begin(), thread->n_active.end(), 0);
    std::fill(thread->n_predicted.begin(), thread->n_predicted.end(), 0);
    thread->n_shortlisted = 0;
    std::fill_n(thread->bytes, kStages, 0);
    std::fill_n(thread->nanoseconds, kStages, 0);
  }
  timed_wall_ = 0;
}

void Session::Decode(int32_t token) {
  Begin(&token, 1, true, nullptr, true);
  for (size_t i = 0; i < program_.segments().size(); ++i) RunSegment(static_cast<int32_t>(i));
  End();
}

void Session::Prefill(const int32_t* tokens, int32_t n, float* all_logits,
                      const Observation* observation) {
  observation_ = observation;
  for (int32_t first = 0; first < n; first += kPrefillChunk) {
    const int32_t n_tokens = std::min(kPrefillChunk, n - first);
    float* logits =
        all_logits == nullptr ? nullptr : all_logits + int64_t{first} * program_.vocab_size();
    first_observed_ = first;
    Begin(tokens + first, n_tokens, false, logits, first + n_tokens == n);
    for (size_t i = 0; i < program_.segments().size(); ++i) RunSegment(static_cast<int32_t>(i));
    End();
  }
  observation_ = nullptr;
}

void Session::Begin(const int32_t* tokens, int32_t n, bool is_decode, float* all_logits,
                    bool wants_logits) {
  kernels_ = &ActiveKernels();
  std::copy(tokens, tokens + n, tokens_);
  n_tokens_ = n;
  all_logits_ = all_logits;
  wants_logits_ = wants_logits;
  phases_ = is_decode ? &program_.decode_phases() : &program_.prefill_phases();
  serial_ = next_serial_;
  next_serial_ += phases_->size();
}

void Session::RunSegment(int32_t index) {
  const Segment& segment = program_.segments()[static_cast<size_t>(index)];
  const Segment none{0, 0, false, false};
  const Segment& before = index == 0 ? none : program_.segments()[static_cast<size_t>(index) - 1];
  const size_t x_size = static_cast<size_t>(n_tokens_) * program_.shape().hidden_size;
  if (segment.receives_x) std::memcpy(x_.get(), exchange_.x, sizeof(float) * x_size);
  if (phases_ == &program_.decode_phases())
    RunPhases(before.decode_end, segment.decode_end);
  else
    RunPhases(before.prefill_end, segment.prefill_end);
  if (segment.sends_x) std::memcpy(exchange_.x, x_.get(), sizeof(float) * x_size);
}

void Session::RunPhases(int32_t first, int32_t last) {
  first_phase_ = first;
  Job job;
  job.context = this;
  job.n_phases = last - first;
  job.n_pieces = [](void* context, int32_t phase) {
    const Session& session = *static_cast<Session*>(context);
    return session.CountPieces(
        (*session.phases_)[static_cast<size_t>(session.first_phase_ + phase)]);
  };
  // Neurons may be sorted by falling frequency: later pieces of an FFN are then lighter.
  job.is_dealt = [](void* context, int32_t phase) {
    const Session& session = *static_cast<Session*>(context);
    return (*session.phases_)[static_cast<size_t>(session.first_phase_ + phase)].kind ==
           PhaseKind::kFfn;
  };
  job.ahead = [](void* context, int32_t phase, int32_t thread, int32_t n_threads) {
    const Session& session = *static_cast<Session*>(context);
    return session.ReadNext(session.first_phase_ + phase, thread, n_threads);
  };
  job.run_piece = [](void* context, int32_t phase, int32_t piece, int32_t thread) {
    Session& session = *static_cast<Session*>(context);
    session.RunPiece((*session.phases_)[static_cast<size_t>(session.first_phase_ + phase)], piece,
                     *session.threads_[static_cast<size_t>(thread)]);
  };
  const int64_t started = is_timed_ ? platform::Nanoseconds() : 0;
  pool_.Run(job);
  if (is_timed_) timed_wall_ += platform::Nanoseconds() - started;
}

// For decode only, since prefill computes more than it reads: the first weights of the thread's
// share of the next phase that streams weights.
Ahead Session::ReadNext(int32_t phase, int32_t thread, int32_t n_threads) const {
  constexpr int64_t kMostBytes = 64 << 10;
  const auto of_rows = [&](const Rows& rows, int32_t row) {
    if (rows.layout != RowLayout::kInterleaved) return Ahead{};
    const uint8_t* tiles = StartOf(rows, row);
    return Ahead{tiles,
                 tiles + std::min((rows.n_rows - row) / kRowTile * rows.values_stride, kMostBytes)};
  };
  if (phases_ != &program_.decode_phases()) return {};
  for (size_t i = static_cast<size_t>(phase) + 1; i < phases_->size(); ++i) {
    const Phase& next = (*phases_)[i];
    const int32_t first_piece =
        static_cast<int32_t>(int64_t{CountPieces(next)} * thread / n_threads);
    switch (next.kind) {
      case PhaseKind::kQkv:
        return of_rows(program_.op<Qkv>(next).rows, first_piece * program_.shape().head_dim);
      case PhaseKind::kOutput:
        return of_rows(program_.op<Attend>(next).o, first_piece * kOutputRows);
      case PhaseKind::kHead: {
        const Head& op = program_.op<Head>(next);
        if (!Previews(op)) return of_rows(op.rows, first_piece * kHeadRows);
        const uint8_t* tiles = op.preview->tiles + int64_t{first_piece} * kHeadRows / kPredictTile *
                                                       PreviewTileBytes(*op.preview);
        return {tiles, tiles + kMostBytes};
      }
      case PhaseKind::kPredict:
        if (is_dense_) break;
        return of_rows(program_.op<Ffn>(next).predictor->first, first_piece * kPredictRows);
      case PhaseKind::kFfn: {
        const Ffn& op = program_.op<Ffn>(next);
        const size_t run = static_cast<size_t>(std::min(thread, CountPieces(next) - 1));
        const int32_t first = std::max(FirstNeuron(op, ffn_runs_[run]), op.n_given()),
                      last = FirstNeuron(op, ffn_runs_[run + 1]);
        if (first >= last) return {};
        if (!op.predictor || is_dense_) return of_rows(op.gate, first);
        const Predictor& second = op.predictor->second;
        const int64_t tile_bytes = PredictTileBytes(second);
        return {second.tiles + first / kPredictTile * tile_bytes,
                second.tiles + last / kPredictTile * tile_bytes};
      }
      default:
        break;
    }
  }
  return {};
}

int32_t Session::CountPieces(const Phase& phase) const {
  const ProgramShape& shape = program_.shape();
  const int32_t token_pieces = CeilDiv(n_tokens_, kTokensPerPiece);
  const bool wants_head = wants_logits_ || all_logits_ != nullptr;
  switch (phase.kind) {
    case PhaseKind::kEmbed:
      return 1;
    case PhaseKind::kQkv:
    case PhaseKind::kQkvTokens:
      return shape.n_heads + 2 * shape.n_kv_heads;
    case PhaseKind::kAttend:
      return shape.n_kv_heads * CeilDiv(position_ + 1, kSpan);
    case PhaseKind::kOutput:
    case PhaseKind::kOutputTokens:
      return CeilDiv(shape.hidden_size, kOutputRows);
    case PhaseKind::kPredict:
    case PhaseKind::kPredictTokens:
      return is_dense_ ? 0 : CeilDiv(program_.op<Ffn>(phase).predictor->first.n_rows, kPredictRows);
    case PhaseKind::kFfn:
      return static_cast<int32_t>(ffn_runs_.size()) - 1;
    case PhaseKind::kFfnTokens:
      return kFfnPieces;
    case PhaseKind::kHead:
      return CeilDiv(program_.vocab_size(), kHeadRows);
    case PhaseKind::kShortlist:
      return Previews(program_.op<Head>(phase)) ? CeilDiv(program_.vocab_size(), kShortlistRows)
                                                : 0;
    case PhaseKind::kShortlistTokens:
      if (!wants_head || !Previews(program_.op<Head>(phase))) return 0;
      return all_logits_ == nullptr ? CeilDiv(program_.vocab_size(), kShortlistRows) : n_tokens_;
    case PhaseKind::kHeadTokens:
      return wants_head ? CeilDiv(program_.vocab_size(), kHeadRows) : 0;
    case PhaseKind::kAttendTokens:
      return shape.n_kv_heads * token_pieces;
    case PhaseKind::kHeadNormTokens:
      return wants_head ? token_pieces : 0;
    case PhaseKind::kEmbedTokens:
    case PhaseKind::kQkvNormTokens:
    case PhaseKind::kQuantizeTokens:
    case PhaseKind::kFfnNormTokens:
    case PhaseKind::kFfnSumTokens:
      return token_pieces;
  }
  return 0;
}

}  // namespace hybrid
