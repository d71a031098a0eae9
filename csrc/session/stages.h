// What one piece of each phase computes, and what is known of a phase before it runs.
//
// embed_qkv.cpp, attend.cpp, ffn.cpp and head.cpp hold the pieces of decode and those of prefill
// (...Tokens) side by side. Both must give each token the same bits, so what they do to one token
// is one function.
#pragma once

#include <cstdint>

#include "session/pass.h"

namespace hybrid {

// phases.cpp: the number of pieces of a phase in this pass. If it is 0, the phase is skipped.
int32_t CountPieces(const Pass& pass, const Phase& phase);
// phases.cpp: runs one piece and adds its time to the phase's stage.
void RunPiece(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread);

// Counts what a piece has read of weights or of KV caches.
inline void Read(const Pass& pass, ThreadScratch& thread, Stage stage, int64_t n_bytes) {
  if (pass.counts_bytes) thread.counters.bytes[stage] += n_bytes;
}

// One piece of the phase of that name.
using PhaseCode = void(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread);
PhaseCode RunEmbed, RunEmbedTokens;
PhaseCode RunQkv, RunQkvNormTokens, RunQkvTokens;
PhaseCode RunAttend, RunAttendTokens;
PhaseCode RunOutput, RunQuantizeTokens, RunOutputTokens;
PhaseCode RunPredict, RunFfnNormTokens, RunPredictTokens;
PhaseCode RunFfn, RunFfnTokens, RunFfnSumTokens;
PhaseCode RunHead, RunHeadNormTokens, RunHeadTokens;
PhaseCode RunShortlist, RunShortlistTokens;

// Whether logits are estimated from a preview first.
inline bool Previews(const Pass& pass, const Head& op) {
  return op.preview.has_value() && !pass.is_dense;
}

}  // namespace hybrid
