// Each phase: how many pieces it has, what a piece runs, and to which stage its time belongs.

#include "session/pieces.h"
#include "session/stages.h"

namespace hybrid {

namespace {

struct Code {
  PhaseCode* run;
  Stage stage;  // of the time that the phase has not added to another stage itself
};

Code CodeOf(PhaseKind kind) {
  switch (kind) {
    case PhaseKind::kEmbed:
      return {RunEmbed, kStageHead};
    case PhaseKind::kQkv:
      return {RunQkv, kStageQkv};
    case PhaseKind::kAttend:
      return {RunAttend, kStageAttend};
    case PhaseKind::kOutput:
      return {RunOutput, kStageOutput};
    case PhaseKind::kPredict:
      return {RunPredict, kStagePredict};
    case PhaseKind::kFfn:
      return {RunFfn, kStageUpDown};
    case PhaseKind::kHead:
      return {RunHead, kStageHead};
    case PhaseKind::kShortlist:
      return {RunShortlist, kStageHead};
    case PhaseKind::kEmbedTokens:
      return {RunEmbedTokens, kStageHead};
    case PhaseKind::kQkvNormTokens:
      return {RunQkvNormTokens, kStageQkv};
    case PhaseKind::kQkvTokens:
      return {RunQkvTokens, kStageQkv};
    case PhaseKind::kAttendTokens:
      return {RunAttendTokens, kStageAttend};
    case PhaseKind::kQuantizeTokens:
      return {RunQuantizeTokens, kStageOutput};
    case PhaseKind::kOutputTokens:
      return {RunOutputTokens, kStageOutput};
    case PhaseKind::kFfnNormTokens:
      return {RunFfnNormTokens, kStageGate};
    case PhaseKind::kPredictTokens:
      return {RunPredictTokens, kStagePredict};
    case PhaseKind::kFfnTokens:
      return {RunFfnTokens, kStageUpDown};
    case PhaseKind::kFfnSumTokens:
      return {RunFfnSumTokens, kStageUpDown};
    case PhaseKind::kHeadNormTokens:
      return {RunHeadNormTokens, kStageHead};
    case PhaseKind::kHeadTokens:
      return {RunHeadTokens, kStageHead};
    case PhaseKind::kShortlistTokens:
      return {RunShortlistTokens, kStageHead};
  }
  return {};
}

}  // namespace

void RunPiece(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Code code = CodeOf(phase.kind);
  thread.counters.Start();
  code.run(pass, phase, piece, thread);
  thread.counters.Tick(code.stage);
}

int32_t CountPieces(const Pass& pass, const Phase& phase) {
  const Program& program = pass.program;
  const ProgramShape& shape = program.shape();
  const int32_t token_pieces = CeilDiv(pass.n_tokens, TokensPerPiece(pass.n_tokens));
  const bool wants_head = pass.n_wanted > 0;
  switch (phase.kind) {
    case PhaseKind::kEmbed:
      return 1;
    case PhaseKind::kEmbedTokens:
    case PhaseKind::kQkvNormTokens:
    case PhaseKind::kQuantizeTokens:
    case PhaseKind::kFfnNormTokens:
    case PhaseKind::kFfnSumTokens:
      return token_pieces;
    case PhaseKind::kQkv:
    case PhaseKind::kQkvTokens:
      return shape.n_heads + 2 * shape.n_kv_heads;
    case PhaseKind::kAttend:
      return shape.n_kv_heads * CeilDiv(pass.tokens[0].position + 1, kSpan);
    case PhaseKind::kAttendTokens:
      return shape.n_kv_heads * pass.n_groups;
    case PhaseKind::kOutput:
    case PhaseKind::kOutputTokens:
      return CeilDiv(shape.hidden_size, kOutputRows);
    case PhaseKind::kPredict:
    case PhaseKind::kPredictTokens:
      if (pass.is_dense) return 0;
      return CeilDiv(program.op<Ffn>(phase).predictor->first.n_rows, kPredictRows);
    case PhaseKind::kFfn:
      return static_cast<int32_t>(pass.ffn_runs.size()) - 1;
    case PhaseKind::kFfnTokens:
      return kFfnPieces;
    case PhaseKind::kHead:
      return CeilDiv(program.vocab_size(), kHeadRows);
    case PhaseKind::kHeadNormTokens:
      return pass.n_wanted;
    case PhaseKind::kHeadTokens:
      return wants_head ? CeilDiv(program.vocab_size(), kHeadRows) : 0;
    case PhaseKind::kShortlist:
      if (!Previews(pass, program.op<Head>(phase))) return 0;
      return CeilDiv(program.vocab_size(), kShortlistRows);
    case PhaseKind::kShortlistTokens:
      if (!wants_head || !Previews(pass, program.op<Head>(phase))) return 0;
      return pass.n_wanted == 1 ? CeilDiv(program.vocab_size(), kShortlistRows) : pass.n_wanted;
  }
  return 0;
}

}  // namespace hybrid
