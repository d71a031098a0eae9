// The head. With a preview, all logits are estimated first, and only the shortlist's rows are
// computed in full.
//
// Prefill computes the logits of the tokens whose logits are wanted. It numbers these tokens anew.

#include <algorithm>
#include <functional>

#include "session/input.h"
#include "session/stages.h"

namespace hybrid {

namespace {

// The shortlist's limit is set so that one of kShortlistShare tiles of the preview holds a logit on
// the shortlist. If logits are normally distributed, that puts 4 % of the rows on it.
constexpr int32_t kShortlistShare = 2;

// Norms and quantises a token into `input`. With a preview, makes the preview's input too.
void NormHead(const Pass& pass, const Head& op, int32_t token, uint8_t* input,
              uint8_t* preview_input, ThreadScratch& thread) {
  const float* h = Norm(pass, op.norm, op.scale, token, thread.floats.get(), input);
  if (Previews(pass, op))
    pass.kernels->make_preview_input(h, pass.shape().hidden_size, preview_input);
}

const uint8_t* NormHeadOnce(const Pass& pass, const Phase& phase, ThreadScratch& thread) {
  return InputOnce(pass, phase, thread, [&] {
    NormHead(pass, pass.program.op<Head>(phase), 0, thread.input.get(), thread.preview_input.get(),
             thread);
  });
}

// A token's logits of all rows, and the largest previewed logit of each tile of the preview.
struct Logits {
  float *rows, *tile_maxima;
};
Logits LogitsOf(const Pass& pass, const Head& op, int32_t wanted) {
  const int32_t n_tiles = op.preview ? CountTiles(*op.preview) : 0;
  return {pass.tokens[pass.wanted[wanted]].logits,
          pass.scratch.tile_maxima + int64_t{wanted} * n_tiles};
}

// Estimates a piece's logits of one token.
void PreviewRows(const Pass& pass, const Preview& preview, int32_t piece, const uint8_t* input,
                 const Logits& logits) {
  constexpr int32_t kTiles = kHeadRows / kPredictTile;
  const int32_t first = piece * kTiles, last = std::min(first + kTiles, CountTiles(preview));
  pass.kernels->preview(preview, first, last, input, logits.rows + first * kPredictTile,
                        logits.tile_maxima + first);
}

void PreviewTokens(const Pass& pass, const Head& op, int32_t piece) {
  for (int32_t i = 0; i < pass.n_wanted; ++i)
    PreviewRows(pass, *op.preview, piece,
                pass.scratch.preview_inputs + i * PreviewInputBytes(pass.shape().hidden_size),
                LogitsOf(pass, op, i));
}

void ComputeTokens(const Pass& pass, const Head& op, int32_t piece, ThreadScratch& thread) {
  const Format format = pass.shape().format;
  const int32_t first = piece * kHeadRows, last = std::min(first + kHeadRows, op.rows.n_rows);
  float* dots = thread.floats.get();
  pass.kernels->gemm({format, op.rows, first, last, pass.scratch.inputs.get(),
                      VectorBytes(format, op.rows.n_cols), pass.n_wanted, dots, kHeadRows});
  for (int32_t i = 0; i < pass.n_wanted; ++i)
    std::copy_n(dots + i * kHeadRows, last - first, LogitsOf(pass, op, i).rows + first);
}

// Counts rows [first, last), or what the preview has of them.
void ReadRows(const Pass& pass, const Head& op, int32_t first, int32_t last,
              ThreadScratch& thread) {
  Read(pass, thread, kStageHead,
       Previews(pass, op) ? CeilDiv(last - first, kPredictTile) * PreviewTileBytes(*op.preview)
                          : (last - first) * RowBytes(op.rows, pass.shape().format));
}

// The shortlist's limit: the logit that one of kShortlistShare tiles reaches. It is found from
// every fourth tile, which takes a few microseconds.
float LikelyLogit(const Preview& preview, const Logits& logits, ThreadScratch& thread) {
  constexpr int32_t kStep = 4;
  const int32_t n_tiles = CountTiles(preview);
  float *sample = thread.floats.get(), *end = sample;
  for (int32_t tile = 0; tile < n_tiles; tile += kStep) *end++ = logits.tile_maxima[tile];
  float* nth = sample + (end - sample) / kShortlistShare;
  std::nth_element(sample, nth, end, std::greater<float>());
  return *nth;
}

// The limit, if only one token's logits are wanted. A thread finds it once per operation.
float LikelyOnce(const Pass& pass, const Phase& phase, ThreadScratch& thread) {
  if (thread.likely_serial != pass.Serial(phase)) {
    const Head& op = pass.program.op<Head>(phase);
    thread.likely = LikelyLogit(*op.preview, LogitsOf(pass, op, 0), thread);
    thread.likely_serial = pass.Serial(phase);
  }
  return thread.likely;
}

// Computes in full those of a piece's rows whose previewed logit is at least `likely`.
void Shortlist(const Pass& pass, const Head& op, int32_t piece, float likely, const uint8_t* x,
               const Logits& logits, ThreadScratch& thread) {
  const int32_t first = piece * kShortlistRows,
                last = std::min(first + kShortlistRows, op.rows.n_rows);
  int32_t* rows = thread.shortlist.get();
  int32_t n = 0;
  for (int32_t tile = first / kPredictTile; tile < CeilDiv(last, kPredictTile); ++tile) {
    if (logits.tile_maxima[tile] < likely) continue;
    for (int32_t row = tile * kPredictTile; row < std::min((tile + 1) * kPredictTile, last);
         ++row) {
      rows[n] = row;
      n += logits.rows[row] >= likely;
    }
  }
  pass.kernels->gather_dots(pass.shape().format, op.rows, rows, n, x, logits.rows);
  thread.counters.n_shortlisted += n;
  Read(pass, thread, kStageHead, n * RowBytes(op.rows, pass.shape().format));
}

}  // namespace

void RunHead(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Head& op = pass.program.op<Head>(phase);
  const Format format = pass.shape().format;
  const uint8_t* x = NormHeadOnce(pass, phase, thread);
  const int32_t first = piece * kHeadRows, last = std::min(first + kHeadRows, op.rows.n_rows);
  const Logits logits = LogitsOf(pass, op, 0);
  if (Previews(pass, op))
    PreviewRows(pass, *op.preview, piece, thread.preview_input.get(), logits);
  else
    pass.kernels->gemm({format, op.rows, first, last, x, 0, 1, logits.rows + first, 0});
  ReadRows(pass, op, first, last, thread);
}

void RunHeadNormTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const int32_t hidden = pass.shape().hidden_size;
  NormHead(pass, pass.program.op<Head>(phase), pass.wanted[piece], InputOf(pass, piece, hidden),
           pass.scratch.preview_inputs + piece * PreviewInputBytes(hidden), thread);
}

void RunHeadTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Head& op = pass.program.op<Head>(phase);
  if (Previews(pass, op))
    PreviewTokens(pass, op, piece);
  else
    ComputeTokens(pass, op, piece, thread);
  const int32_t first = piece * kHeadRows;
  ReadRows(pass, op, first, std::min(first + kHeadRows, op.rows.n_rows), thread);
}

void RunShortlist(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Head& op = pass.program.op<Head>(phase);
  const float likely = LikelyOnce(pass, phase, thread);
  const uint8_t* x = NormHeadOnce(pass, phase, thread);
  Shortlist(pass, op, piece, likely, x, LogitsOf(pass, op, 0), thread);
}

// A piece is one token or, if the logits of only one token are wanted, a range of rows.
void RunShortlistTokens(const Pass& pass, const Phase& phase, int32_t piece,
                        ThreadScratch& thread) {
  const Head& op = pass.program.op<Head>(phase);
  const bool is_alone = pass.n_wanted == 1;
  const int32_t wanted = is_alone ? 0 : piece;
  const uint8_t* x = InputOf(pass, wanted, op.rows.n_cols);
  const Logits logits = LogitsOf(pass, op, wanted);
  if (is_alone)
    return Shortlist(pass, op, piece, LikelyOnce(pass, phase, thread), x, logits, thread);
  const float likely = LikelyLogit(*op.preview, logits, thread);
  for (int32_t rows = 0; rows < CeilDiv(op.rows.n_rows, kShortlistRows); ++rows)
    Shortlist(pass, op, rows, likely, x, logits, thread);
}

}  // namespace hybrid
