// Session: how each phase of a program is cut into pieces, and what a piece computes.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/dispatch.h"
#include "platform.h"
#include "program.h"

namespace hybrid {

namespace {

// Constants, independent of the number of threads: they fix the order of every sum.
constexpr int32_t kFfnPieces = 16;
constexpr int32_t kOutputRows = 64;  // rows per piece of the output projection
constexpr int32_t kHeadRows = 256;   // rows per piece of the head
constexpr int32_t kTokensPerPiece = 8;

int32_t CeilDiv(int32_t n, int32_t d) { return (n + d - 1) / d; }

// First neuron of a piece of an FFN layer; pieces begin at multiples of 8 rows.
int32_t FirstNeuron(int32_t n_neurons, int32_t piece) {
  return piece == kFfnPieces
             ? n_neurons
             : static_cast<int32_t>(int64_t{n_neurons} * piece / kFfnPieces) / 8 * 8;
}

}  // namespace

template <typename T>
Pages<T>::Pages(int64_t n)
    : data_(static_cast<T*>(platform::AllocatePages(static_cast<size_t>(n) * sizeof(T), false))),
      bytes_(static_cast<size_t>(n) * sizeof(T)) {}
template <typename T>
Pages<T>::~Pages() {
  platform::FreePages(data_, bytes_);
}

struct Session::ThreadScratch {
  ThreadScratch(int64_t n_floats, int64_t vector_bytes) : floats(n_floats), x(vector_bytes) {}
  Pages<float> floats;
  Pages<uint8_t> x;       // a private quantised vector
  uint64_t x_serial = 0;  // which phase of which call `x` was made for
  float scores[kSpan];
};

Session::Session(const Program& program, ThreadPool& pool, int32_t n_context)
    : program_(program),
      pool_(pool),
      n_context_(n_context),
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
      partials_(int64_t{kFfnPieces} * kPrefillChunk *
                PaddedCols(program.shape().format, program.shape().hidden_size)),
      logits_(program.vocab_size()),
      kv_(int64_t{program.n_layers()} * 2 * program.shape().n_kv_heads * n_context *
          program.head_stride()),
      active_(static_cast<size_t>(program.n_layers())) {
  const ProgramShape& shape = program.shape();
  const int32_t group = shape.n_heads / shape.n_kv_heads, n_spans = CeilDiv(n_context, kSpan);
  const int64_t rows = std::max({shape.head_dim, kOutputRows, kHeadRows});
  // A piece's dot products for all tokens; or a norm; or one KV head's spans with their maxima and
  // sums.
  const int64_t n_floats = std::max({rows * kPrefillChunk, int64_t{shape.hidden_size},
                                     int64_t{shape.n_heads} * shape.head_dim,
                                     int64_t{n_spans} * group * (program.head_stride() + 2)});
  const int64_t vector_bytes =
      VectorBytes(shape.format, std::max(shape.hidden_size, shape.n_heads * shape.head_dim));
  for (int32_t thread = 0; thread < pool.n_threads(); ++thread)
    threads_.push_back(std::make_unique<ThreadScratch>(n_floats, vector_bytes));
}

Session::~Session() = default;

void Session::ResetActiveCounts() {
  for (std::atomic<int64_t>& count : active_) count.store(0);
}

void Session::Decode(int32_t token) {
  tokens_ = &token;
  n_tokens_ = 1;
  RunPhases(program_.decode_phases());
  position_ += 1;
}

void Session::Prefill(const int32_t* tokens, int32_t n, float* all_logits) {
  for (int32_t first = 0; first < n; first += kPrefillChunk) {
    tokens_ = tokens + first;
    n_tokens_ = std::min(kPrefillChunk, n - first);
    all_logits_ =
        all_logits == nullptr ? nullptr : all_logits + int64_t{first} * program_.vocab_size();
    wants_logits_ = first + n_tokens_ == n;
    RunPhases(program_.prefill_phases());
    position_ += n_tokens_;
  }
}

void Session::RunPhases(const std::vector<Phase>& phases) {
  kernels_ = &ActiveKernels();
  phases_ = &phases;
  serial_ = next_serial_;
  next_serial_ += phases.size();
  Job job;
  job.context = this;
  job.n_phases = static_cast<int32_t>(phases.size());
  job.n_pieces = [](void* context, int32_t phase) {
    const Session& session = *static_cast<Session*>(context);
    return session.CountPieces((*session.phases_)[static_cast<size_t>(phase)]);
  };
  job.run_piece = [](void* context, int32_t phase, int32_t piece, int32_t thread) {
    Session& session = *static_cast<Session*>(context);
    session.RunPiece((*session.phases_)[static_cast<size_t>(phase)], piece,
                     *session.threads_[static_cast<size_t>(thread)]);
  };
  pool_.Run(job);
}

int32_t Session::CountPieces(const Phase& phase) const {
  const ProgramShape& shape = program_.shape();
  const Op& op = program_.op(phase.op);
  const int32_t token_pieces = CeilDiv(n_tokens_, kTokensPerPiece);
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
      return CeilDiv(op.a.n_rows, kOutputRows);
    case PhaseKind::kFfn:
    case PhaseKind::kFfnTokens:
      return kFfnPieces;
    case PhaseKind::kFfnSum:
      return CeilDiv(shape.hidden_size, kGroup);
    case PhaseKind::kHead:
      return CeilDiv(op.a.n_rows, kHeadRows);
    case PhaseKind::kHeadTokens:
      return wants_logits_ || all_logits_ != nullptr ? CeilDiv(op.a.n_rows, kHeadRows) : 0;
    case PhaseKind::kAttendTokens:
      return shape.n_kv_heads * token_pieces;
    case PhaseKind::kEmbedTokens:
    case PhaseKind::kNormTokens:
    case PhaseKind::kQuantizeTokens:
    case PhaseKind::kFfnSumTokens:
      return token_pieces;
  }
  return 0;
}

void Session::RunPiece(const Phase& phase, int32_t piece, ThreadScratch& scratch) {
  const Op& op = program_.op(phase.op);
  if (phase.kind < PhaseKind::kEmbedTokens)
    RunDecodePiece(phase, op, piece, scratch);
  else
    RunPrefillPiece(phase, op, piece, scratch);
}

void Session::RunDecodePiece(const Phase& phase, const Op& op, int32_t piece,
                             ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int32_t hidden = shape.hidden_size, head_dim = shape.head_dim,
                head_stride = program_.head_stride();
  const int32_t group = shape.n_heads / shape.n_kv_heads;
  float* floats = scratch.floats.get();
  switch (phase.kind) {
    case PhaseKind::kEmbed:
      kernels_->dequantize(shape.format, op.a, tokens_[0], op.scale, x_.get());
      break;
    case PhaseKind::kQkv: {
      const uint8_t* x = NormOnce(phase, op, scratch);
      kernels_->gemm(
          {shape.format, op.a, piece * head_dim, (piece + 1) * head_dim, x, 0, 1, floats, 0});
      FinishHead(op, piece, floats, position_, 0);
      break;
    }
    case PhaseKind::kAttend: {
      const int32_t n_spans = CeilDiv(position_ + 1, kSpan), kv_head = piece / n_spans,
                    span = piece % n_spans;
      const int32_t head = kv_head * group;
      const int64_t row = int64_t{span} * shape.n_heads + head;
      AttendSpan(op, kv_head, q_ + int64_t{head} * head_stride, span, position_ + 1, scratch,
                 span_max_ + row, span_sum_ + row, span_out_ + row * head_stride);
      break;
    }
    case PhaseKind::kOutput:
      AddRows(op, piece, MergeHeadsOnce(phase, scratch), 1, scratch);
      break;
    case PhaseKind::kFfn:
      RunFfn(op, piece, NormOnce(phase, op, scratch), 1);
      break;
    case PhaseKind::kFfnSum: {
      const int32_t first = piece * kGroup;
      const int64_t stride = int64_t{kPrefillChunk} * PaddedCols(shape.format, hidden);
      kernels_->add_partials(shape.format, partials_.get(), stride, kFfnPieces, first,
                             std::min(first + kGroup, hidden), op.scale, x_.get());
      break;
    }
    default: {  // kHead
      const uint8_t* x = NormOnce(phase, op, scratch);
      const int32_t first = piece * kHeadRows, last = std::min(first + kHeadRows, op.a.n_rows);
      kernels_->gemm({shape.format, op.a, first, last, x, 0, 1, logits_ + first, 0});
    }
  }
}

void Session::RunPrefillPiece(const Phase& phase, const Op& op, int32_t piece,
                              ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int32_t hidden = shape.hidden_size, head_dim = shape.head_dim,
                head_stride = program_.head_stride();
  const int32_t group = shape.n_heads / shape.n_kv_heads, attention = shape.n_heads * head_dim;
  const int64_t x_bytes = VectorBytes(shape.format, hidden);
  const int32_t first_token = piece * kTokensPerPiece;  // of the phases cut by tokens alone
  const int32_t last_token = std::min(first_token + kTokensPerPiece, n_tokens_);
  float* floats = scratch.floats.get();
  switch (phase.kind) {
    case PhaseKind::kEmbedTokens:
      for (int32_t t = first_token; t < last_token; ++t)
        kernels_->dequantize(shape.format, op.a, tokens_[t], op.scale, x_ + int64_t{t} * hidden);
      break;
    case PhaseKind::kNormTokens:
      for (int32_t t = first_token; t < last_token; ++t) {
        const float scale = op.kind == OpKind::kHead ? op.scale : 1.0f;
        kernels_->rms_norm(x_ + int64_t{t} * hidden, op.norm, hidden, shape.rms_norm_eps, scale,
                           floats);
        kernels_->quantize(shape.format, floats, hidden, x_quant_ + t * x_bytes);
      }
      break;
    case PhaseKind::kQkvTokens:
      kernels_->gemm({shape.format, op.a, piece * head_dim, (piece + 1) * head_dim, x_quant_.get(),
                      x_bytes, n_tokens_, floats, head_dim});
      for (int32_t t = 0; t < n_tokens_; ++t)
        FinishHead(op, piece, floats + t * head_dim, position_ + t, t);
      break;
    case PhaseKind::kAttendTokens: {
      const int32_t kv_head = piece % shape.n_kv_heads,
                    first = piece / shape.n_kv_heads * kTokensPerPiece;
      for (int32_t t = first; t < std::min(first + kTokensPerPiece, n_tokens_); ++t) {
        const int32_t head = kv_head * group, end = position_ + t + 1,
                      n_spans = CeilDiv(end, kSpan);
        float *max = floats, *sum = max + int64_t{n_spans} * group,
              *out = sum + int64_t{n_spans} * group;
        for (int32_t span = 0; span < n_spans; ++span)
          AttendSpan(op, kv_head, q_ + (int64_t{t} * shape.n_heads + head) * head_stride, span, end,
                     scratch, max + int64_t{span} * group, sum + int64_t{span} * group,
                     out + int64_t{span} * group * head_stride);
        for (int32_t g = 0; g < group; ++g)
          MergeSpans(g, n_spans, max, sum, out, group,
                     attention_ + int64_t{t} * attention + int64_t{head + g} * head_dim);
      }
      break;
    }
    case PhaseKind::kQuantizeTokens:
      for (int32_t t = first_token; t < last_token; ++t)
        kernels_->quantize(shape.format, attention_ + int64_t{t} * attention, attention,
                           x_quant_ + t * VectorBytes(shape.format, attention));
      break;
    case PhaseKind::kOutputTokens:
      AddRows(op, piece, x_quant_.get(), n_tokens_, scratch);
      break;
    case PhaseKind::kFfnTokens:
      RunFfn(op, piece, x_quant_.get(), n_tokens_);
      break;
    case PhaseKind::kFfnSumTokens: {
      const int64_t padded = PaddedCols(shape.format, hidden);
      for (int32_t t = first_token; t < last_token; ++t)
        kernels_->add_partials(shape.format, partials_ + t * padded, kPrefillChunk * padded,
                               kFfnPieces, 0, hidden, op.scale, x_ + int64_t{t} * hidden);
      break;
    }
    default: {  // kHeadTokens: all tokens where asked for, else the last one
      const int32_t first = piece * kHeadRows, last = std::min(first + kHeadRows, op.a.n_rows);
      const uint8_t* last_x = x_quant_ + (n_tokens_ - 1) * x_bytes;
      if (all_logits_ != nullptr)
        kernels_->gemm({shape.format, op.a, first, last, x_quant_.get(), x_bytes, n_tokens_,
                        all_logits_ + first, op.a.n_rows});
      if (wants_logits_)
        kernels_->gemm({shape.format, op.a, first, last, last_x, 0, 1, logits_ + first, 0});
    }
  }
}

// The normed and quantised input of a decode phase. Every thread makes its own, once a phase:
// cheaper than a phase of its own, and equal on all threads.
const uint8_t* Session::NormOnce(const Phase& phase, const Op& op, ThreadScratch& scratch) {
  const uint64_t serial = serial_ + static_cast<uint64_t>(&phase - phases_->data());
  if (scratch.x_serial != serial) {
    const ProgramShape& shape = program_.shape();
    const float scale = op.kind == OpKind::kHead ? op.scale : 1.0f;
    kernels_->rms_norm(x_.get(), op.norm, shape.hidden_size, shape.rms_norm_eps, scale,
                       scratch.floats.get());
    kernels_->quantize(shape.format, scratch.floats.get(), shape.hidden_size, scratch.x.get());
    scratch.x_serial = serial;
  }
  return scratch.x.get();
}

const uint8_t* Session::MergeHeadsOnce(const Phase& phase, ThreadScratch& scratch) {
  const uint64_t serial = serial_ + static_cast<uint64_t>(&phase - phases_->data());
  if (scratch.x_serial != serial) {
    const ProgramShape& shape = program_.shape();
    for (int32_t head = 0; head < shape.n_heads; ++head)
      MergeSpans(head, CeilDiv(position_ + 1, kSpan), span_max_.get(), span_sum_.get(),
                 span_out_.get(), shape.n_heads, scratch.floats + int64_t{head} * shape.head_dim);
    kernels_->quantize(shape.format, scratch.floats.get(), shape.n_heads * shape.head_dim,
                       scratch.x.get());
    scratch.x_serial = serial;
  }
  return scratch.x.get();
}

// Rope and the places where a projected head goes: q to scratch, k and v to the cache.
void Session::FinishHead(const Op& op, int32_t head, float* values, int32_t position,
                         int32_t token) {
  const ProgramShape& shape = program_.shape();
  const int32_t head_dim = shape.head_dim, half = head_dim / 2,
                head_stride = program_.head_stride();
  const bool is_value = head >= shape.n_heads + shape.n_kv_heads;
  if (!is_value) {
    const float* cos = shape.rope_cos + int64_t{position} * half;
    const float* sin = shape.rope_sin + int64_t{position} * half;
    for (int32_t i = 0; i < half; ++i) {
      const float first = values[i], second = values[i + half];
      values[i] = first * cos[i] - second * sin[i];
      values[i + half] = second * cos[i] + first * sin[i];
    }
  }
  if (head < shape.n_heads) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    float* q = q_ + (int64_t{token} * shape.n_heads + head) * head_stride;
    for (int32_t i = 0; i < head_dim; ++i) q[i] = values[i] * scale;
  } else {
    const int32_t kv_head = (head - shape.n_heads) % shape.n_kv_heads;
    kernels_->to_fp16(values, head_dim,
                      KvHead(op.layer, is_value, kv_head) + int64_t{position} * head_stride);
  }
}

uint16_t* Session::KvHead(int32_t layer, bool is_value, int32_t head) const {
  const int64_t index = (int64_t{layer} * 2 + is_value) * program_.shape().n_kv_heads + head;
  return kv_ + index * n_context_ * program_.head_stride();
}

void Session::AttendSpan(const Op& op, int32_t kv_head, const float* q, int32_t span, int32_t end,
                         ThreadScratch& scratch, float* max, float* sum, float* out) {
  const ProgramShape& shape = program_.shape();
  AttendSpanArgs args;
  args.q = q;
  args.k = KvHead(op.layer, false, kv_head);
  args.v = KvHead(op.layer, true, kv_head);
  args.n_group = shape.n_heads / shape.n_kv_heads;
  args.head_stride = program_.head_stride();
  args.first = span * kSpan;
  args.last = std::min(args.first + kSpan, end);
  args.scores = scratch.scores;
  args.max = max;
  args.sum = sum;
  args.out = out;
  kernels_->attend_span(args);
}

// Softmax over spans, in index order: `max`, `sum` and `out` of span s begin `s * stride` heads
// further.
void Session::MergeSpans(int32_t head, int32_t n_spans, const float* max, const float* sum,
                         const float* out, int64_t stride, float* merged) const {
  const int32_t head_dim = program_.shape().head_dim, head_stride = program_.head_stride();
  float largest = max[head];
  for (int32_t span = 1; span < n_spans; ++span)
    largest = std::max(largest, max[span * stride + head]);
  float total = 0.0f;
  std::memset(merged, 0, sizeof(float) * static_cast<size_t>(head_dim));
  for (int32_t span = 0; span < n_spans; ++span) {
    const float weight = std::exp(max[span * stride + head] - largest);
    const float* values = out + (span * stride + head) * head_stride;
    total += weight * sum[span * stride + head];
    for (int32_t i = 0; i < head_dim; ++i) merged[i] += weight * values[i];
  }
  for (int32_t i = 0; i < head_dim; ++i) merged[i] /= total;
}

void Session::RunFfn(const Op& op, int32_t piece, const uint8_t* x, int32_t n_tokens) {
  const ProgramShape& shape = program_.shape();
  const int64_t padded = PaddedCols(shape.format, shape.hidden_size);
  SparseFfnArgs args;
  args.format = shape.format;
  args.gate = op.a;
  args.up = op.b;
  args.down = op.c;
  args.first = FirstNeuron(op.a.n_rows, piece);
  args.last = FirstNeuron(op.a.n_rows, piece + 1);
  args.activation = op.activation;
  args.threshold = op.threshold;
  args.x = x;
  args.x_stride = VectorBytes(shape.format, shape.hidden_size);
  args.n_tokens = n_tokens;
  args.out = partials_ + int64_t{piece} * kPrefillChunk * padded;
  args.out_stride = padded;
  const int64_t n_active = kernels_->sparse_ffn(args);
  active_[static_cast<size_t>(op.layer)].fetch_add(n_active, std::memory_order_relaxed);
}

// x[token] += scale * dot(rows, x) for one piece of rows.
void Session::AddRows(const Op& op, int32_t piece, const uint8_t* x, int32_t n_tokens,
                      ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int32_t first = piece * kOutputRows, last = std::min(first + kOutputRows, op.a.n_rows);
  float* dots = scratch.floats.get();
  kernels_->gemm({shape.format, op.a, first, last, x, VectorBytes(shape.format, op.a.n_cols),
                  n_tokens, dots, kOutputRows});
  for (int32_t t = 0; t < n_tokens; ++t)
    for (int32_t row = first; row < last; ++row)
      x_[int64_t{t} * shape.hidden_size + row] += op.scale * dots[t * kOutputRows + row - first];
}

}  // namespace hybrid
