// Session: what one piece of each decode phase computes, and what decode and prefill share.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "platform.h"
#include "session/session.h"

namespace hybrid {

namespace {

// The stage to which the time of a phase is added, except for time that the phase itself has added.
Stage StageOf(PhaseKind kind) {
  switch (kind) {
    case PhaseKind::kQkv:
    case PhaseKind::kQkvNormTokens:
    case PhaseKind::kQkvTokens:
      return kStageQkv;
    case PhaseKind::kAttend:
    case PhaseKind::kAttendTokens:
      return kStageAttend;
    case PhaseKind::kOutput:
    case PhaseKind::kQuantizeTokens:
    case PhaseKind::kOutputTokens:
      return kStageOutput;
    case PhaseKind::kPredict:
    case PhaseKind::kPredictTokens:
      return kStagePredict;
    case PhaseKind::kFfn:
    case PhaseKind::kFfnTokens:
    case PhaseKind::kFfnSumTokens:
      return kStageUpDown;
    case PhaseKind::kFfnNormTokens:
      return kStageGate;
    default:
      return kStageHead;
  }
}

}  // namespace

void Session::RunPiece(const Phase& phase, int32_t piece, ThreadScratch& scratch) {
  if (is_timed_) scratch.last_tick = platform::Nanoseconds();
  if (phase.kind >= PhaseKind::kEmbedTokens)
    RunPrefillPiece(phase, piece, scratch);
  else
    RunDecodePiece(phase, piece, scratch);
  Tick(StageOf(phase.kind), scratch);
}

void Session::Tick(Stage stage, ThreadScratch& scratch) const {
  if (!is_timed_) return;
  const int64_t now = platform::Nanoseconds();
  scratch.nanoseconds[stage] += now - scratch.last_tick;
  scratch.last_tick = now;
}

void Session::RunDecodePiece(const Phase& phase, int32_t piece, ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int32_t head_dim = shape.head_dim, head_stride = program_.head_stride();
  const int32_t group = shape.n_heads / shape.n_kv_heads;
  float* floats = scratch.floats.get();
  switch (phase.kind) {
    case PhaseKind::kEmbed: {
      const Embed& op = program_.op<Embed>(phase);
      kernels_->dequantize(shape.format, op.embedding, tokens_[0], op.scale, x_.get());
      scratch.bytes[kStageHead] += RowBytes(op.embedding, shape.format);
      break;
    }
    case PhaseKind::kQkv: {
      const Qkv& op = program_.op<Qkv>(phase);
      const uint8_t* x = NormOnce(phase, op.norm, scratch);
      PrefetchKey(op, piece);
      kernels_->gemm(
          {shape.format, op.rows, piece * head_dim, (piece + 1) * head_dim, x, 0, 1, floats, 0});
      FinishHead(op, piece, floats, position_, 0, scratch);
      scratch.bytes[kStageQkv] += head_dim * RowBytes(op.rows, shape.format);
      break;
    }
    case PhaseKind::kAttend: {
      const Attend& op = program_.op<Attend>(phase);
      const int32_t span = piece / shape.n_kv_heads, kv_head = piece % shape.n_kv_heads;
      const int32_t head = kv_head * group;
      const int64_t row = int64_t{span} * shape.n_heads + head;
      // Threads take neighbouring pieces as long as they can, so the next piece is probably this
      // thread's.
      const int32_t next = piece + 1, n_pieces = CountPieces(phase);
      const void* next_bytes =
          next < n_pieces ? static_cast<const void*>(
                                KvSpan(op.layer, next % shape.n_kv_heads, next / shape.n_kv_heads))
                          : op.o.values;
      AttendSpan(op, kv_head, q_ + int64_t{head} * head_stride, span, position_ + 1, next_bytes,
                 scratch, span_max_ + row, span_sum_ + row, span_out_ + row * head_stride);
      scratch.bytes[kStageAttend] += 2 * int64_t{sizeof(uint16_t)} * head_stride *
                                     std::min(kSpan, position_ + 1 - span * kSpan);
      break;
    }
    case PhaseKind::kOutput: {
      const Attend& op = program_.op<Attend>(phase);
      AddRows(op, piece, MergeHeadsOnce(phase, scratch), 1, scratch);
      scratch.bytes[kStageOutput] +=
          std::min(kOutputRows, op.o.n_rows - piece * kOutputRows) * RowBytes(op.o, shape.format);
      break;
    }
    case PhaseKind::kPredict: {
      const Ffn& op = program_.op<Ffn>(phase);
      const Rows& rows = op.predictor->first;
      const int32_t first = piece * kPredictRows,
                    last = std::min(first + kPredictRows, rows.n_rows);
      const Format format = PredictorFormat(shape.format);
      kernels_->gemm(
          {format, rows, first, last, NormOnce(phase, op.norm, scratch), 0, 1, z_ + first, 0});
      scratch.bytes[kStagePredict] += (last - first) * RowBytes(rows, format);
      break;
    }
    case PhaseKind::kFfn: {
      const Ffn& op = program_.op<Ffn>(phase);
      const size_t run = static_cast<size_t>(piece);
      const int32_t first_piece = ffn_runs_[run], end_piece = ffn_runs_[run + 1];
      const int32_t first = std::max(FirstNeuron(op, first_piece), op.n_given()),
                    last = FirstNeuron(op, end_piece);
      const ActiveCounts counts =
          RunFfn(phase, op, first_piece, end_piece, NormOnce(phase, op.norm, scratch), scratch);
      if (op.predictor && !is_dense_ && last > first)
        scratch.bytes[kStageGate] += (CeilDiv(last, kPredictTile) - CeilDiv(first, kPredictTile)) *
                                     PredictTileBytes(op.predictor->second);
      scratch.bytes[kStageGate] += counts.n_predicted * RowBytes(op.gate, shape.format);
      scratch.bytes[kStageUpDown] +=
          counts.n_listed * (RowBytes(op.up, shape.format) + RowBytes(op.down, shape.format));
      for (int32_t i = first_piece; i < end_piece; ++i) AddPartial(op, i);
      break;
    }
    case PhaseKind::kShortlist:
      RunShortlist(phase, program_.op<Head>(phase), piece, scratch);
      break;
    default:  // kHead
      RunHead(phase, program_.op<Head>(phase), piece, scratch);
  }
}

// Norms and quantises a token's residual stream into `out`. Without a norm, the other device has
// computed it. Returns the normed vector, which may be in `floats`.
const float* Session::Norm(const float* norm, float scale, int32_t token, float* floats,
                           uint8_t* out) const {
  const ProgramShape& shape = program_.shape();
  const int64_t at = int64_t{token} * shape.hidden_size;
  const float* h = norm == nullptr ? exchange_.h + at : floats;
  if (norm != nullptr)
    kernels_->rms_norm(x_ + at, norm, shape.hidden_size, shape.rms_norm_eps, scale, floats);
  kernels_->quantize(shape.format, h, shape.hidden_size, out);
  return h;
}

// The input of a decode phase. Every thread computes its own, once per operation: that is cheaper
// than a phase for it, and all threads get equal results.
const uint8_t* Session::NormOnce(const Phase& phase, const float* norm, ThreadScratch& scratch) {
  const uint64_t serial = serial_ + static_cast<uint64_t>(phase.op);
  if (scratch.x_serial != serial) {
    Norm(norm, 1.0f, 0, scratch.floats.get(), scratch.x.get());
    scratch.x_serial = serial;
  }
  return scratch.x.get();
}

const uint8_t* Session::NormHeadOnce(const Phase& phase, const Head& op, ThreadScratch& scratch) {
  const uint64_t serial = serial_ + static_cast<uint64_t>(phase.op);
  if (scratch.x_serial != serial) {
    const float* h = Norm(op.norm, op.scale, 0, scratch.floats.get(), scratch.x.get());
    if (Previews(op))
      kernels_->make_preview_input(h, program_.shape().hidden_size, scratch.preview_input.get());
    scratch.x_serial = serial;
  }
  return scratch.x.get();
}

// Prefetches the next operation's norm, if it has one. Every thread reads the norm as soon as the
// next phase begins, and without the prefetch it would begin at the pace of single misses.
void Session::PrefetchNorm(int32_t op) const {
  const float* norm = program_.norm(op);
  if (norm == nullptr) return;
  constexpr int32_t kLine = 64 / sizeof(float);
  for (int32_t i = 0; i < program_.shape().hidden_size; i += kLine) platform::Prefetch(norm + i);
}

// The inputs of a predictor, for all tokens of the call.
const uint8_t* Session::PredictorInputsOnce(const Phase& phase, const Predictor& predictor,
                                            const uint8_t* x, ThreadScratch& scratch) {
  const uint64_t serial = serial_ + static_cast<uint64_t>(phase.op);
  uint8_t* inputs = scratch.predictor_inputs.get();
  if (scratch.predictor_serial != serial) {
    const ProgramShape& shape = program_.shape();
    const int64_t x_bytes = VectorBytes(shape.format, shape.hidden_size),
                  input_bytes = PredictorInputBytes(predictor);
    for (int32_t t = 0; t < n_tokens_; ++t)
      kernels_->make_predictor_input(predictor, shape.format, x + t * x_bytes, shape.hidden_size,
                                     z_ + int64_t{t} * predictor.size, inputs + t * input_bytes);
    scratch.predictor_serial = serial;
  }
  return inputs;
}

const uint8_t* Session::MergeHeadsOnce(const Phase& phase, ThreadScratch& scratch) {
  const uint64_t serial = serial_ + static_cast<uint64_t>(phase.op);
  if (scratch.x_serial != serial) {
    const ProgramShape& shape = program_.shape();
    const int32_t head_stride = program_.head_stride();
    for (int32_t head = 0; head < shape.n_heads; ++head)
      kernels_->merge_spans(span_max_ + head, span_sum_ + head,
                            span_out_ + int64_t{head} * head_stride, CeilDiv(position_ + 1, kSpan),
                            shape.n_heads, shape.head_dim, head_stride,
                            scratch.floats + int64_t{head} * shape.head_dim);
    kernels_->quantize(shape.format, scratch.floats.get(), shape.n_heads * shape.head_dim,
                       scratch.x.get());
    scratch.x_serial = serial;
  }
  return scratch.x.get();
}

// Applies rope to a projected head and stores it: q in scratch memory, k and v in the cache.
void Session::FinishHead(const Qkv& op, int32_t head, const float* values, int32_t position,
                         int32_t token, ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int32_t head_dim = shape.head_dim, half = head_dim / 2,
                head_stride = program_.head_stride();
  const float* cos = shape.rope_cos + int64_t{position} * half;
  const float* sin = shape.rope_sin + int64_t{position} * half;
  if (head < shape.n_heads) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    kernels_->rotate(values, cos, sin, half, scale,
                     q_ + (int64_t{token} * shape.n_heads + head) * head_stride);
    return;
  }
  const int32_t kv_head = (head - shape.n_heads) % shape.n_kv_heads;
  if (head >= shape.n_heads + shape.n_kv_heads) {
    uint16_t* first = KvSpan(op.layer, kv_head, position / kSpan) + int64_t{kSpan} * head_stride;
    kernels_->to_fp16(values, head_dim, first + position % kSpan * head_stride);
    return;
  }
  kernels_->rotate(values, cos, sin, half, 1.0f, scratch.rotated.get());
  kernels_->to_fp16(scratch.rotated.get(), head_dim, scratch.key.get());
  uint16_t* key = KeyAt(op.layer, kv_head, position);
  for (int32_t i = 0; i < head_dim; ++i) key[i * kKeyTile] = scratch.key[i];
}

// Prefetches the place where a key will be written, before the key is computed: each of its
// elements would be a cache miss.
void Session::PrefetchKey(const Qkv& op, int32_t head) const {
  const ProgramShape& shape = program_.shape();
  const int32_t kv_head = head - shape.n_heads;
  if (kv_head < 0 || kv_head >= shape.n_kv_heads) return;
  const uint16_t* key = KeyAt(op.layer, kv_head, position_);
  for (int32_t i = 0; i < shape.head_dim; ++i) platform::Prefetch(key + i * kKeyTile);
}

// The first element of a key. The stride to the next element is kKeyTile.
uint16_t* Session::KeyAt(int32_t layer, int32_t kv_head, int32_t position) const {
  const int32_t at = position % kSpan;
  return KvSpan(layer, kv_head, position / kSpan) +
         at / kKeyTile * kKeyTile * program_.head_stride() + at % kKeyTile;
}

// The keys of a span, in tiles. The values of the span follow them.
uint16_t* Session::KvSpan(int32_t layer, int32_t kv_head, int32_t span) const {
  const int64_t index =
      (int64_t{span} * program_.n_layers() + layer) * program_.shape().n_kv_heads + kv_head;
  return kv_ + index * 2 * kSpan * program_.head_stride();
}

void Session::AttendSpan(const Attend& op, int32_t kv_head, const float* q, int32_t span,
                         int32_t end, const void* next, ThreadScratch& scratch, float* max,
                         float* sum, float* out) {
  const ProgramShape& shape = program_.shape();
  AttendSpanArgs args;
  args.q = q;
  args.k = KvSpan(op.layer, kv_head, span);
  args.v = args.k + int64_t{kSpan} * program_.head_stride();
  args.n_group = shape.n_heads / shape.n_kv_heads;
  args.head_stride = program_.head_stride();
  args.n = std::min(kSpan, end - span * kSpan);
  args.next = next;
  args.scores = scratch.scores;
  args.max = max;
  args.sum = sum;
  args.out = out;
  kernels_->attend_span(args);
}

ActiveCounts Session::RunFfn(const Phase& phase, const Ffn& op, int32_t first_piece,
                             int32_t end_piece, const uint8_t* x, ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int64_t padded = PaddedCols(shape.format, shape.hidden_size);
  SparseFfnArgs args;
  args.format = shape.format;
  args.gate = op.gate;
  args.up = op.up;
  args.down = op.down;
  int32_t piece_ends[kFfnPieces];
  for (int32_t i = first_piece; i < end_piece; ++i)
    piece_ends[i - first_piece] = FirstNeuron(op, i + 1);
  args.first = FirstNeuron(op, first_piece);
  args.last = FirstNeuron(op, end_piece);
  args.n_pieces = end_piece - first_piece;
  args.piece_ends = piece_ends;
  args.given_gates = exchange_.gates;
  args.given_stride = exchange_.n_neurons;
  args.n_given = op.n_given();
  args.activation = op.activation;
  args.threshold = op.threshold;
  args.x = x;
  args.x_stride = VectorBytes(shape.format, shape.hidden_size);
  args.n_tokens = n_tokens_;
  args.out = partials_ + PlaceOf(first_piece) * PartialStride();
  args.piece_stride = (PlaceOf(first_piece + 1) - PlaceOf(first_piece)) * PartialStride();
  args.out_stride = padded;
  args.computes_all = is_dense_;
  args.active = scratch.active.get();
  if (op.predictor && !is_dense_) {
    const Predictor& predictor = op.predictor->second;
    args.predictor = &predictor;
    args.predictor_inputs = PredictorInputsOnce(phase, predictor, x, scratch);
    args.predictor_input_stride = PredictorInputBytes(predictor);
    args.predicted = scratch.predicted.get();
  }
  const ActiveCounts counts = kernels_->find_active(args);
  Tick(kStageGate, scratch);
  if (observation_ != nullptr) ObserveActive(op, args.active, counts.n_listed);
  if (n_tokens_ == 1) PrefetchNorm(phase.op + 1);
  kernels_->add_active(args, counts);
  const size_t layer = static_cast<size_t>(op.layer);
  scratch.n_active[layer] += counts.n_active;
  scratch.n_predicted[layer] += counts.n_predicted;
  return counts;
}

// To be called when a piece's partial sum is done. The places form two halves, even and odd. The
// thread that brings the last partial sum of a half adds that half up. The thread that is second to
// do so adds both halves to x. The order is that of sum_partials and add_partials over all places,
// so every number of threads gives the same bits.
void Session::AddPartial(const Ffn& op, int32_t piece) {
  const ProgramShape& shape = program_.shape();
  const int32_t padded = PaddedCols(shape.format, shape.hidden_size), half = PlaceOf(piece) % 2;
  if (n_arrived_[half].n.fetch_add(1, std::memory_order_acq_rel) + 1 < kFfnPieces / 2) return;
  n_arrived_[half].n.store(0, std::memory_order_relaxed);
  float* sum = partials_ + half * PartialStride();
  kernels_->sum_partials(sum, 2 * PartialStride(), kFfnPieces / 2, padded, sum);
  if (n_arrived_[2].n.fetch_add(1, std::memory_order_acq_rel) == 0) return;
  n_arrived_[2].n.store(0, std::memory_order_relaxed);
  if (op.split) std::fill_n(exchange_.y, shape.hidden_size, 0.0f);
  kernels_->add_partials(shape.format, partials_.get(), PartialStride(), 2, shape.hidden_size,
                         op.split ? 1.0f : op.scale, op.split ? exchange_.y : x_.get());
}

// Pieces begin at multiples of 8 neurons, so no two pieces write to the same byte of a mask.
void Session::ObserveActive(const Ffn& op, const Active* active, int32_t n_listed) {
  const int64_t n_bytes = CeilDiv(program_.n_neurons(), 8);
  uint8_t* masks =
      observation_->masks + (op.layer * observation_->n_tokens + first_observed_) * n_bytes;
  for (int32_t i = 0; i < n_listed; ++i) {
    const Active& pair = active[i];
    const uint8_t bit = pair.gate != 0.0f ? static_cast<uint8_t>(1 << pair.neuron % 8) : 0;
    masks[pair.token * n_bytes + pair.neuron / 8] |= bit;
  }
}

// x[token] += scale * dot(rows, x) for one piece of rows.
void Session::AddRows(const Attend& op, int32_t piece, const uint8_t* x, int32_t n_tokens,
                      ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int32_t first = piece * kOutputRows, last = std::min(first + kOutputRows, op.o.n_rows);
  float* dots = scratch.floats.get();
  kernels_->gemm({shape.format, op.o, first, last, x, VectorBytes(shape.format, op.o.n_cols),
                  n_tokens, dots, kOutputRows});
  for (int32_t t = 0; t < n_tokens; ++t)
    for (int32_t row = first; row < last; ++row)
      x_[int64_t{t} * shape.hidden_size + row] += op.scale * dots[t * kOutputRows + row - first];
}

}  // namespace hybrid
