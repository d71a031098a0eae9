// The head. With a preview, all logits are estimated first, and only the shortlist's rows are
// computed in full.
//
// Prefill computes the logits of all tokens if the caller wants them, otherwise those of the last.

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
// Those of decode's token, or of prefill's last one.
Logits LastLogits(const Pass& pass) {
  return {pass.scratch.logits.get(), pass.scratch.tile_maxima.get()};
}
// Those of any token, if the caller wants all.
Logits LogitsOf(const Pass& pass, const Head& op, int32_t token) {
  return {pass.all_logits + int64_t{token} * op.rows.n_rows,
          pass.scratch.tile_maxima + token * CountTiles(*op.preview)};
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
  const auto preview = [&](int32_t token, const Logits& logits) {
    const uint8_t* input =
        pass.scratch.preview_inputs + token * PreviewInputBytes(pass.shape().hidden_size);
    PreviewRows(pass, *op.preview, piece, input, logits);
  };
  if (pass.all_logits == nullptr) return preview(pass.n_tokens - 1, LastLogits(pass));
  for (int32_t t = 0; t < pass.n_tokens; ++t) preview(t, LogitsOf(pass, op, t));
}

void ComputeTokens(const Pass& pass, const Head& op, int32_t piece) {
  const Format format = pass.shape().format;
  const int32_t n_cols = op.rows.n_cols, n_rows = op.rows.n_rows, final_token = pass.n_tokens - 1;
  const int32_t first = piece * kHeadRows, last = std::min(first + kHeadRows, n_rows);
  if (pass.all_logits == nullptr) {
    pass.kernels->gemm({format, op.rows, first, last, InputOf(pass, final_token, n_cols), 0, 1,
                        pass.scratch.logits + first, 0});
    return;
  }
  pass.kernels->gemm({format, op.rows, first, last, pass.scratch.inputs.get(),
                      VectorBytes(format, n_cols), pass.n_tokens, pass.all_logits + first, n_rows});
  const float* row = pass.all_logits + int64_t{final_token} * n_rows;
  if (pass.wants_logits) std::copy(row + first, row + last, pass.scratch.logits + first);
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

// The limit for the last token. A thread finds it once per operation.
float LikelyOnce(const Pass& pass, const Phase& phase, ThreadScratch& thread) {
  if (thread.likely_serial != pass.Serial(phase)) {
    const Preview& preview = *pass.program.op<Head>(phase).preview;
    thread.likely = LikelyLogit(preview, LastLogits(pass), thread);
    thread.likely_serial = pass.Serial(phase);
  }
  return thread.likely;
}

// Computes in full those of a piece's rows whose previewed logit is at least `likely`. Returns how
// many.
int64_t Shortlist(const Pass& pass, const Head& op, int32_t piece, float likely, const uint8_t* x,
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
  return n;
}

}  // namespace

void RunHead(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Head& op = pass.program.op<Head>(phase);
  const Format format = pass.shape().format;
  const uint8_t* x = NormHeadOnce(pass, phase, thread);
  const int32_t first = piece * kHeadRows, last = std::min(first + kHeadRows, op.rows.n_rows);
  if (Previews(pass, op)) {
    PreviewRows(pass, *op.preview, piece, thread.preview_input.get(), LastLogits(pass));
    thread.counters.bytes[kStageHead] +=
        CeilDiv(last - first, kPredictTile) * PreviewTileBytes(*op.preview);
    return;
  }
  pass.kernels->gemm({format, op.rows, first, last, x, 0, 1, pass.scratch.logits + first, 0});
  thread.counters.bytes[kStageHead] += (last - first) * RowBytes(op.rows, format);
}

void RunHeadNormTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const int32_t hidden = pass.shape().hidden_size;
  const TokenRange tokens = TokensOf(pass, piece);
  for (int32_t t = tokens.first; t < tokens.last; ++t)
    NormHead(pass, pass.program.op<Head>(phase), t, InputOf(pass, t, hidden),
             pass.scratch.preview_inputs + t * PreviewInputBytes(hidden), thread);
}

void RunHeadTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch&) {
  const Head& op = pass.program.op<Head>(phase);
  if (Previews(pass, op))
    PreviewTokens(pass, op, piece);
  else
    ComputeTokens(pass, op, piece);
}

void RunShortlist(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Head& op = pass.program.op<Head>(phase);
  const float likely = LikelyOnce(pass, phase, thread);
  const uint8_t* x = NormHeadOnce(pass, phase, thread);
  const int64_t n = Shortlist(pass, op, piece, likely, x, LastLogits(pass), thread);
  thread.counters.bytes[kStageHead] += n * RowBytes(op.rows, pass.shape().format);
}

// A piece is a range of rows for the last token, or one token if all logits are wanted.
void RunShortlistTokens(const Pass& pass, const Phase& phase, int32_t piece,
                        ThreadScratch& thread) {
  const Head& op = pass.program.op<Head>(phase);
  const int32_t n_rows = op.rows.n_rows, final_token = pass.n_tokens - 1;
  if (pass.all_logits == nullptr) {
    const uint8_t* x = InputOf(pass, final_token, op.rows.n_cols);
    Shortlist(pass, op, piece, LikelyOnce(pass, phase, thread), x, LastLogits(pass), thread);
    return;
  }
  const int32_t token = piece;
  const Logits logits = LogitsOf(pass, op, token);
  const float likely = LikelyLogit(*op.preview, logits, thread);
  for (int32_t rows = 0; rows < CeilDiv(n_rows, kShortlistRows); ++rows)
    Shortlist(pass, op, rows, likely, InputOf(pass, token, op.rows.n_cols), logits, thread);
  if (pass.wants_logits && token == final_token)
    std::copy_n(logits.rows, n_rows, pass.scratch.logits.get());
}

}  // namespace hybrid
