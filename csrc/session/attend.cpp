// Attention over the KV cache, and its output projection.
//
// The context is cut into spans of kSpan positions. Each span has a softmax relative to its own
// maximum, and the spans of a head are merged in order. In decode a piece of attention is one span
// of one KV head. In prefill it is all spans of one KV head, for a group of tokens of one sequence.

#include <algorithm>

#include "session/input.h"
#include "session/stages.h"

namespace hybrid {

namespace {

struct SpanAt {
  int32_t layer, kv_head, span, token;
};

// Results of spans and query heads, from a first head on (see AttendSpanArgs). The results of the
// next span are n_heads heads behind those of a span.
struct SpanResults {
  float *max, *sum, *out;
  int32_t n_heads;
};

SpanResults FromHead(const Pass& pass, const SpanResults& of, int32_t head) {
  return {of.max + head, of.sum + head, of.out + int64_t{head} * pass.program.head_stride(),
          of.n_heads};
}

SpanResults DecodeResults(const Pass& pass, int32_t head) {
  const Scratch& scratch = pass.scratch;
  return FromHead(pass,
                  {scratch.span_max.get(), scratch.span_sum.get(), scratch.span_out.get(),
                   pass.shape().n_heads},
                  head);
}

int32_t SpansOf(const Pass& pass, int32_t token) {
  return CeilDiv(pass.tokens[token].position + 1, kSpan);
}

int32_t PositionsIn(const Pass& pass, int32_t token, int32_t span) {
  return std::min(kSpan, pass.tokens[token].position + 1 - span * kSpan);
}

// Attends with the query heads of a KV head. `next`: see AttendSpanArgs.
void AttendSpan(const Pass& pass, const SpanAt& at, const void* next, const SpanResults& to,
                ThreadScratch& thread) {
  const int32_t head_stride = pass.program.head_stride();
  const int64_t row = int64_t{at.span} * to.n_heads;
  const KvCache& kv = *pass.tokens[at.token].kv;
  AttendSpanArgs args;
  args.kv = kv.format();
  args.n_group = pass.HeadsPerKvHead();
  args.q = pass.QueryOf(at.token, at.kv_head * args.n_group);
  args.k = kv.KvSpan(at.layer, at.kv_head, at.span);
  args.v = kv.ValuesOf(args.k);
  args.head_stride = head_stride;
  args.n = PositionsIn(pass, at.token, at.span);
  args.next = next;
  args.scores = thread.scores;
  args.max = to.max + row;
  args.sum = to.sum + row;
  args.out = to.out + row * head_stride;
  pass.kernels->attend_span(args);
}

// Merges the spans of one head into (head_dim,) floats.
void MergeSpans(const Pass& pass, const SpanResults& of, int32_t n_spans, float* merged) {
  pass.kernels->merge_spans(of.max, of.sum, of.out, n_spans, of.n_heads, pass.shape().head_dim,
                            pass.program.head_stride(), merged);
}

// x += scale * o(inputs), for all tokens and one piece of rows.
void AddOutput(const Pass& pass, const Attend& op, int32_t piece, const uint8_t* inputs,
               ThreadScratch& thread) {
  const ProgramShape& shape = pass.shape();
  const int32_t first = piece * kOutputRows, last = std::min(first + kOutputRows, op.o.n_rows);
  float* dots = thread.floats.get();
  pass.kernels->gemm({shape.format, op.o, first, last, inputs,
                      VectorBytes(shape.format, op.o.n_cols), pass.n_tokens, dots, kOutputRows});
  for (int32_t t = 0; t < pass.n_tokens; ++t) {
    float* x = pass.scratch.x + int64_t{t} * shape.hidden_size;
    for (int32_t row = first; row < last; ++row)
      x[row] += op.scale * dots[t * kOutputRows + row - first];
  }
  Read(pass, thread, kStageOutput, (last - first) * RowBytes(op.o, shape.format));
}

// What a thread will probably read after a piece of attention. Threads take neighbouring pieces as
// long as they can, so the next piece is probably this thread's.
const void* AfterPiece(const Pass& pass, const Phase& phase, int32_t piece) {
  const Attend& op = pass.program.op<Attend>(phase);
  const int32_t next = piece + 1, n_kv_heads = pass.shape().n_kv_heads;
  if (next >= CountPieces(pass, phase)) return op.o.values;
  const int32_t part = next / n_kv_heads;  // a span, or a group of tokens
  const KvCache& kv = *pass.tokens[pass.is_decode() ? 0 : pass.groups[part]].kv;
  return kv.KvSpan(op.layer, next % n_kv_heads, pass.is_decode() ? part : 0);
}

}  // namespace

void RunAttend(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Attend& op = pass.program.op<Attend>(phase);
  const int32_t n_kv_heads = pass.shape().n_kv_heads, span = piece / n_kv_heads,
                kv_head = piece % n_kv_heads;
  AttendSpan(pass, {op.layer, kv_head, span, 0}, AfterPiece(pass, phase, piece),
             DecodeResults(pass, kv_head * pass.HeadsPerKvHead()), thread);
  Read(pass, thread, kStageAttend, pass.tokens[0].kv->Bytes(PositionsIn(pass, 0, span)));
}

void RunAttendTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const ProgramShape& shape = pass.shape();
  const Attend& op = pass.program.op<Attend>(phase);
  const int32_t kv_head = piece % shape.n_kv_heads, group = pass.HeadsPerKvHead();
  const int32_t *bounds = pass.groups + piece / shape.n_kv_heads, first = bounds[0],
                last = bounds[1];
  for (int32_t t = first; t < last; ++t) {
    const int32_t n_spans = SpansOf(pass, t);
    const int64_t n_results = int64_t{n_spans} * group;
    float* floats = thread.floats.get();
    const SpanResults results = {floats, floats + n_results, floats + 2 * n_results, group};
    for (int32_t span = 0; span < n_spans; ++span) {
      // What the first token has read is in the cache for the others.
      const void* next = nullptr;
      if (t == first)
        next = span + 1 < n_spans ? pass.tokens[t].kv->KvSpan(op.layer, kv_head, span + 1)
                                  : AfterPiece(pass, phase, piece);
      AttendSpan(pass, {op.layer, kv_head, span, t}, next, results, thread);
    }
    float* attention = pass.AttentionOf(t) + int64_t{kv_head} * group * shape.head_dim;
    for (int32_t head = 0; head < group; ++head)
      MergeSpans(pass, FromHead(pass, results, head), n_spans,
                 attention + int64_t{head} * shape.head_dim);
  }
  const Token& longest = pass.tokens[last - 1];
  Read(pass, thread, kStageAttend, longest.kv->Bytes(longest.position + 1));
}

void RunOutput(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const ProgramShape& shape = pass.shape();
  const Attend& op = pass.program.op<Attend>(phase);
  const uint8_t* x = InputOnce(pass, phase, thread, [&] {
    float* attention = thread.floats.get();
    for (int32_t head = 0; head < shape.n_heads; ++head)
      MergeSpans(pass, DecodeResults(pass, head), SpansOf(pass, 0),
                 attention + int64_t{head} * shape.head_dim);
    pass.kernels->quantize(shape.format, attention, op.o.n_cols, thread.input.get());
  });
  AddOutput(pass, op, piece, x, thread);
}

void RunQuantizeTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch&) {
  const int32_t n_cols = pass.program.op<Attend>(phase).o.n_cols;
  const TokenRange tokens = TokensOf(pass, piece);
  for (int32_t t = tokens.first; t < tokens.last; ++t)
    pass.kernels->quantize(pass.shape().format, pass.AttentionOf(t), n_cols,
                           InputOf(pass, t, n_cols));
}

void RunOutputTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  AddOutput(pass, pass.program.op<Attend>(phase), piece, pass.scratch.inputs.get(), thread);
}

}  // namespace hybrid
