// The input of an operation: the residual stream, normed and quantised.
//
// In prefill, phases of their own make the inputs of all tokens. In decode, every thread makes its
// own copy, once per operation. That is cheaper than a phase, and all threads get equal results.
#pragma once

#include <algorithm>
#include <cstdint>

#include "session/pass.h"
#include "session/pieces.h"

namespace hybrid {

// The tokens of a piece, if a phase is cut by tokens.
struct TokenRange {
  int32_t first, last;
};
inline TokenRange TokensOf(const Pass& pass, int32_t piece) {
  const int32_t n = TokensPerPiece(pass.n_tokens), first = piece * n;
  return {first, std::min(first + n, pass.n_tokens)};
}

// Prefill's input for a token, in `inputs`.
inline uint8_t* InputOf(const Pass& pass, int32_t token, int32_t n_cols) {
  return pass.scratch.inputs + token * VectorBytes(pass.shape().format, n_cols);
}

// Norms a token's residual stream and quantises it into `out`. If `norm` is null, another device
// has normed it. Returns the normed vector, which may lie in `floats`.
inline const float* Norm(const Pass& pass, const float* norm, float scale, int32_t token,
                         float* floats, uint8_t* out) {
  const ProgramShape& shape = pass.shape();
  const int64_t at = int64_t{token} * shape.hidden_size;
  const float* h = norm == nullptr ? pass.exchange.h + at : floats;
  if (norm != nullptr)
    pass.kernels->rms_norm(pass.scratch.x + at, norm, shape.hidden_size, shape.rms_norm_eps, scale,
                           floats);
  pass.kernels->quantize(shape.format, h, shape.hidden_size, out);
  return h;
}

// Decode's input, which `make` writes to thread.input.
template <typename Make>
const uint8_t* InputOnce(const Pass& pass, const Phase& phase, ThreadScratch& thread,
                         const Make& make) {
  if (thread.input_serial != pass.Serial(phase)) {
    make();
    thread.input_serial = pass.Serial(phase);
  }
  return thread.input.get();
}
inline const uint8_t* NormOnce(const Pass& pass, const Phase& phase, const float* norm,
                               ThreadScratch& thread) {
  return InputOnce(pass, phase, thread,
                   [&] { Norm(pass, norm, 1.0f, 0, thread.floats.get(), thread.input.get()); });
}

}  // namespace hybrid
