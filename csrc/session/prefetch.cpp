#include "session/prefetch.h"

#include <algorithm>

#include "platform.h"
#include "session/pieces.h"
#include "session/stages.h"

namespace hybrid {

namespace {

constexpr int64_t kMostBytes = 64 << 10;

Ahead FromRow(const Rows& rows, int32_t row) {
  if (rows.layout != RowLayout::kInterleaved) return {};
  const uint8_t* tiles = StartOf(rows, row);
  return {tiles, tiles + std::min((rows.n_rows - row) / kRowTile * rows.values_stride, kMostBytes)};
}

Ahead OfHead(const Pass& pass, const Head& op, int32_t piece) {
  if (!Previews(pass, op)) return FromRow(op.rows, piece * kHeadRows);
  const int64_t first_tile = int64_t{piece} * kHeadRows / kPredictTile;
  const uint8_t* tiles = op.preview->tiles + first_tile * PreviewTileBytes(*op.preview);
  return {tiles, tiles + kMostBytes};
}

Ahead OfFfn(const Pass& pass, const Ffn& op, int32_t run) {
  const int32_t *pieces = pass.ffn_runs.data() + run,
                first = std::max(FirstNeuron(op, pieces[0]), op.n_given()),
                last = FirstNeuron(op, pieces[1]);
  if (first >= last) return {};
  if (!op.predictor || pass.is_dense) return FromRow(op.gate, first);
  const Predictor& second = op.predictor->second;
  const int64_t tile_bytes = PredictTileBytes(second);
  return {second.tiles + first / kPredictTile * tile_bytes,
          second.tiles + last / kPredictTile * tile_bytes};
}

}  // namespace

Ahead NextWeights(const Pass& pass, int32_t index, int32_t thread, int32_t n_threads) {
  const Program& program = pass.program;
  if (!pass.is_decode()) return {};
  for (size_t i = static_cast<size_t>(index) + 1; i < pass.phases->size(); ++i) {
    const Phase& next = (*pass.phases)[i];
    const int32_t n_pieces = CountPieces(pass, next),
                  piece = static_cast<int32_t>(int64_t{n_pieces} * thread / n_threads);
    switch (next.kind) {
      case PhaseKind::kQkv:
        return FromRow(program.op<Qkv>(next).rows, piece * pass.shape().head_dim);
      case PhaseKind::kOutput:
        return FromRow(program.op<Attend>(next).o, piece * kOutputRows);
      case PhaseKind::kPredict:
        if (pass.is_dense) break;
        return FromRow(program.op<Ffn>(next).predictor->first, piece * kPredictRows);
      case PhaseKind::kFfn:  // its runs are dealt
        return OfFfn(pass, program.op<Ffn>(next), std::min(thread, n_pieces - 1));
      case PhaseKind::kHead:
        return OfHead(pass, program.op<Head>(next), piece);
      default:
        break;
    }
  }
  return {};
}

void PrefetchNextNorm(const Pass& pass, const Phase& phase) {
  constexpr int32_t kLine = 64 / sizeof(float);
  const float* norm = pass.program.norm(phase.op + 1);
  if (norm == nullptr) return;
  for (int32_t i = 0; i < pass.shape().hidden_size; i += kLine) platform::Prefetch(norm + i);
}

void PrefetchKey(const Pass& pass, const Qkv& op, int32_t head) {
  const ProgramShape& shape = pass.shape();
  const int32_t kv_head = head - shape.n_heads;
  if (kv_head < 0 || kv_head >= shape.n_kv_heads) return;
  for (int32_t t = 0; t < pass.n_tokens; ++t) {
    const uint16_t* key = pass.tokens[t].kv->KeyAt(op.layer, kv_head, pass.tokens[t].position);
    for (int32_t i = 0; i < shape.head_dim; ++i) platform::Prefetch(key + i * kKeyTile);
  }
}

}  // namespace hybrid
