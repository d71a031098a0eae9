// Session: the head. With a preview, all logits are estimated first, and only the shortlist's rows
// are computed in full.

#include <algorithm>
#include <functional>

#include "session/session.h"

namespace hybrid {

bool Session::Previews(const Head& op) const { return op.preview.has_value() && !is_dense_; }

void Session::RunHead(const Phase& phase, const Head& op, int32_t piece, ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const uint8_t* x = NormHeadOnce(phase, op, scratch);
  const int32_t first = piece * kHeadRows, last = std::min(first + kHeadRows, op.rows.n_rows);
  if (Previews(op)) {
    PreviewRows(op, piece, scratch.preview_input.get(), logits_.get(), tile_maxima_.get());
    scratch.bytes[kStageHead] +=
        CeilDiv(last - first, kPredictTile) * PreviewTileBytes(*op.preview);
    return;
  }
  kernels_->gemm({shape.format, op.rows, first, last, x, 0, 1, logits_ + first, 0});
  scratch.bytes[kStageHead] += (last - first) * RowBytes(op.rows, shape.format);
}

void Session::RunShortlist(const Phase& phase, const Head& op, int32_t piece,
                           ThreadScratch& scratch) {
  const int64_t n =
      Shortlist(op, piece, LikelyOnce(phase, op, scratch), NormHeadOnce(phase, op, scratch),
                tile_maxima_.get(), logits_.get(), scratch);
  scratch.bytes[kStageHead] += n * RowBytes(op.rows, program_.shape().format);
}

// Computes the logits of all tokens if the caller wants them, otherwise those of the last token.
void Session::RunHeadTokens(const Head& op, int32_t piece) {
  const ProgramShape& shape = program_.shape();
  const int64_t x_bytes = VectorBytes(shape.format, shape.hidden_size);
  const int32_t first = piece * kHeadRows, last = std::min(first + kHeadRows, op.rows.n_rows);
  const int32_t final_token = n_tokens_ - 1;
  if (Previews(op)) {
    const int64_t input_bytes = PreviewInputBytes(shape.hidden_size);
    const auto preview = [&](int32_t token, float* logits, float* maxima) {
      PreviewRows(op, piece, preview_inputs_ + token * input_bytes, logits, maxima);
    };
    if (all_logits_ == nullptr) {
      preview(final_token, logits_.get(), tile_maxima_.get());
      return;
    }
    for (int32_t t = 0; t < n_tokens_; ++t)
      preview(t, all_logits_ + int64_t{t} * op.rows.n_rows,
              tile_maxima_ + t * CountTiles(*op.preview));
    return;
  }
  if (all_logits_ == nullptr) {
    const uint8_t* x = x_quant_ + final_token * x_bytes;
    kernels_->gemm({shape.format, op.rows, first, last, x, 0, 1, logits_ + first, 0});
    return;
  }
  kernels_->gemm({shape.format, op.rows, first, last, x_quant_.get(), x_bytes, n_tokens_,
                  all_logits_ + first, op.rows.n_rows});
  const float* row = all_logits_ + int64_t{final_token} * op.rows.n_rows;
  if (wants_logits_) std::copy(row + first, row + last, logits_ + first);
}

// A piece is a range of rows for the last token, or one token if all logits are wanted.
void Session::RunShortlistTokens(const Phase& phase, const Head& op, int32_t piece,
                                 ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int64_t x_bytes = VectorBytes(shape.format, shape.hidden_size);
  const int32_t final_token = n_tokens_ - 1;
  if (all_logits_ == nullptr) {
    Shortlist(op, piece, LikelyOnce(phase, op, scratch), x_quant_ + final_token * x_bytes,
              tile_maxima_.get(), logits_.get(), scratch);
    return;
  }
  const float* maxima = tile_maxima_ + piece * CountTiles(*op.preview);
  float* logits = all_logits_ + int64_t{piece} * op.rows.n_rows;
  const float likely = LikelyLogit(op, maxima, scratch);
  for (int32_t rows = 0; rows < CeilDiv(op.rows.n_rows, kShortlistRows); ++rows)
    Shortlist(op, rows, likely, x_quant_ + piece * x_bytes, maxima, logits, scratch);
  if (wants_logits_ && piece == final_token) std::copy_n(logits, op.rows.n_rows, logits_.get());
}

void Session::PreviewRows(const Head& op, int32_t piece, const uint8_t* input, float* logits,
                          float* maxima) const {
  constexpr int32_t kTiles = kHeadRows / kPredictTile;
  const int32_t first = piece * kTiles, last = std::min(first + kTiles, CountTiles(*op.preview));
  kernels_->preview(*op.preview, first, last, input, logits + first * kPredictTile, maxima + first);
}

float Session::LikelyOnce(const Phase& phase, const Head& op, ThreadScratch& scratch) const {
  const uint64_t serial = serial_ + static_cast<uint64_t>(phase.op);
  if (scratch.likely_serial != serial) {
    scratch.likely = LikelyLogit(op, tile_maxima_.get(), scratch);
    scratch.likely_serial = serial;
  }
  return scratch.likely;
}

// The shortlist's limit: the logit that one of kShortlistShare tiles reaches. It is found from
// every fourth tile, which takes a few microseconds.
float Session::LikelyLogit(const Head& op, const float* maxima, ThreadScratch& scratch) const {
  constexpr int32_t kStep = 4;
  const int32_t n_tiles = CountTiles(*op.preview);
  float *sample = scratch.floats.get(), *end = sample;
  for (int32_t tile = 0; tile < n_tiles; tile += kStep) *end++ = maxima[tile];
  float* nth = sample + (end - sample) / kShortlistShare;
  std::nth_element(sample, nth, end, std::greater<float>());
  return *nth;
}

// Computes in full those of a piece's rows whose previewed logit is at least `likely`. Returns how
// many.
int64_t Session::Shortlist(const Head& op, int32_t piece, float likely, const uint8_t* x,
                           const float* maxima, float* logits, ThreadScratch& scratch) const {
  const int32_t first = piece * kShortlistRows,
                last = std::min(first + kShortlistRows, op.rows.n_rows);
  int32_t* rows = scratch.shortlist.get();
  int32_t n = 0;
  for (int32_t tile = first / kPredictTile; tile < CeilDiv(last, kPredictTile); ++tile) {
    if (maxima[tile] < likely) continue;
    for (int32_t row = tile * kPredictTile; row < std::min((tile + 1) * kPredictTile, last);
         ++row) {
      rows[n] = row;
      n += logits[row] >= likely;
    }
  }
  kernels_->gather_dots(program_.shape().format, op.rows, rows, n, x, logits);
  scratch.n_shortlisted += n;
  return n;
}

}  // namespace hybrid
