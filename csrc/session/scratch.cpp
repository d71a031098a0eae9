#include "session/scratch.h"

#include <algorithm>

#include "session/pieces.h"

namespace hybrid {

namespace {

int64_t Attention(const ProgramShape& shape) { return int64_t{shape.n_heads} * shape.head_dim; }

// Of the widest quantised vector.
int64_t InputBytes(const ProgramShape& shape) {
  return VectorBytes(shape.format, std::max(shape.hidden_size, shape.n_heads * shape.head_dim));
}

int64_t OtherInputBytes(const Program& program) {
  return program.has_other_inputs() ? VectorBytes(Format::kQ8, program.shape().hidden_size) : 0;
}

int64_t PreviewBytes(const Program& program) {
  return program.has_preview() ? PreviewInputBytes(program.shape().hidden_size) : 0;
}

// Floats for the largest of these uses: a piece's dot products for all tokens; a norm; one KV
// head's spans with their maxima and sums; the maxima of a preview's tiles.
int64_t PieceFloats(const Program& program, int32_t n_context) {
  const ProgramShape& shape = program.shape();
  const int64_t rows = std::max({shape.head_dim, kOutputRows, kHeadRows}),
                group = shape.n_heads / shape.n_kv_heads;
  return std::max({rows * kPrefillChunk, int64_t{shape.hidden_size}, Attention(shape),
                   int64_t{CeilDiv(program.vocab_size(), kPredictTile)},
                   CeilDiv(n_context, kSpan) * group * (program.head_stride() + 2)});
}

// Prefill takes one piece at a time, decode takes several. Pieces begin at multiples of 8 neurons,
// hence the 8. The kernels need room for one more.
int64_t FfnPairs(const Program& program) {
  const int32_t n_neurons = program.n_neurons();
  return std::max(int64_t{CeilDiv(n_neurons, kFfnPieces) + 8} * kPrefillChunk, int64_t{n_neurons}) +
         1;
}

}  // namespace

Scratch::Scratch(const Program& program, int32_t n_context)
    : x(int64_t{kPrefillChunk} * program.shape().hidden_size),
      inputs(kPrefillChunk * InputBytes(program.shape())),
      q(int64_t{kPrefillChunk} * program.shape().n_heads * program.head_stride()),
      attention(kPrefillChunk * Attention(program.shape())),
      span_max(int64_t{CeilDiv(n_context, kSpan)} * program.shape().n_heads),
      span_sum(int64_t{CeilDiv(n_context, kSpan)} * program.shape().n_heads),
      span_out(int64_t{CeilDiv(n_context, kSpan)} * program.shape().n_heads *
               program.head_stride()),
      z(int64_t{kPrefillChunk} * program.largest_rank()),
      other_inputs(2 * kPrefillChunk * OtherInputBytes(program)),
      partials(kFfnPieces * PartialStride(program.shape(), kPrefillChunk)),
      preview_inputs(kPrefillChunk * PreviewBytes(program)),
      tile_maxima(program.has_preview()
                      ? int64_t{kPrefillChunk} * CeilDiv(program.vocab_size(), kPredictTile)
                      : 0) {}

ThreadScratch::ThreadScratch(const Program& program, int32_t n_context, bool is_timed)
    : floats(PieceFloats(program, n_context)),
      active(FfnPairs(program)),
      predicted(int64_t{program.n_neurons()} + 1),
      predictor_inputs(kPrefillChunk * program.predictor_input_bytes()),
      input(InputBytes(program.shape())),
      other_input(OtherInputBytes(program)),
      preview_input(PreviewBytes(program)),
      shortlist(program.has_preview() ? kShortlistRows + 1 : 0),
      rotated(program.shape().head_dim),
      key(program.shape().head_dim),
      counters(program.n_layers(), is_timed) {}

}  // namespace hybrid
