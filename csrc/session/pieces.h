// How the work of a phase is cut into pieces. Sizes that fix the order of a sum are constants,
// independent of the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "program.h"

namespace hybrid {

inline int32_t CeilDiv(int32_t n, int32_t d) { return (n + d - 1) / d; }

// Tokens per piece, where each token is computed by itself.
inline int32_t TokensPerPiece(int32_t n_tokens) { return n_tokens <= kFewTokens ? 1 : 8; }
constexpr int32_t kOutputRows = 32;  // rows per piece of the output projection
constexpr int32_t kPredictRows = 8;  // rows per piece of a low-rank predictor's first matrix
constexpr int32_t kHeadRows = 256;   // rows per piece of the head
static_assert(kHeadRows % kPredictTile == 0, "pieces of a preview are whole tiles");
constexpr int32_t kShortlistRows = 16 * kHeadRows;  // rows per piece of the shortlist
constexpr int32_t kFfnPieces = kMaxPieces;
static_assert((kFfnPieces & (kFfnPieces - 1)) == 0, "partial sums are added half to half");

// The first neuron of a piece of an FFN. Pieces begin at multiples of 8 neurons.
inline int32_t FirstNeuron(const Ffn& op, int32_t piece) {
  const int32_t first = op.first_neuron(), n_neurons = op.n_neurons() - first;
  return piece == kFfnPieces
             ? op.n_neurons()
             : first + static_cast<int32_t>(int64_t{n_neurons} * piece / kFfnPieces) / 8 * 8;
}

// How decode deals out an FFN's pieces: run i is pieces [runs[i], runs[i + 1]). The choice of runs
// changes no sum. Every run begins and ends with a wait for memory, so few threads take two pieces
// at once. Towards the end they take single pieces, so that all threads end together (docs/log.md).
constexpr int32_t kPairedPieces = kFfnPieces * 3 / 4;
inline std::vector<int32_t> FfnRuns(int32_t n_threads) {
  std::vector<int32_t> runs = {0};
  while (runs.back() < kFfnPieces)
    runs.push_back(runs.back() + (n_threads < 4 && runs.back() < kPairedPieces ? 2 : 1));
  return runs;
}

// Where the partial sum of a piece lies. Two threads take runs alternately, so even places belong
// to one thread and odd places to the other. The two halves are added up separately, since a thread
// is slow to read what another core has written.
static_assert(kPairedPieces % 4 == 0, "two pairs fill four places");
inline int32_t PlaceOf(int32_t piece) {
  return piece < kPairedPieces ? piece / 4 * 4 + piece % 2 * 2 + piece / 2 % 2 : piece;
}

// Floats from one place to the next. The gap keeps this from being a multiple of the sizes by which
// caches are divided; otherwise pieces would evict one another.
inline int64_t PartialStride(const ProgramShape& shape, int32_t n_tokens) {
  constexpr int32_t kGap = 64 / sizeof(float);
  return n_tokens * int64_t{PaddedCols(shape.format, shape.hidden_size)} + kGap;
}

}  // namespace hybrid
