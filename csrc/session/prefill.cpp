// Session: what one piece of each prefill phase computes.

#include <algorithm>

#include "session/session.h"

namespace hybrid {

void Session::RunPrefillPiece(const Phase& phase, int32_t piece, ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int32_t hidden = shape.hidden_size, head_dim = shape.head_dim,
                head_stride = program_.head_stride();
  const int32_t group = shape.n_heads / shape.n_kv_heads, attention = shape.n_heads * head_dim;
  const int64_t x_bytes = VectorBytes(shape.format, hidden);
  const int32_t first_token = piece * kTokensPerPiece;  // for phases that are cut by tokens only
  const int32_t last_token = std::min(first_token + kTokensPerPiece, n_tokens_);
  float* floats = scratch.floats.get();
  switch (phase.kind) {
    case PhaseKind::kEmbedTokens: {
      const Embed& op = program_.op<Embed>(phase);
      for (int32_t t = first_token; t < last_token; ++t)
        kernels_->dequantize(shape.format, op.embedding, tokens_[t], op.scale,
                             x_ + int64_t{t} * hidden);
      break;
    }
    case PhaseKind::kQkvNormTokens:
      for (int32_t t = first_token; t < last_token; ++t)
        Norm(program_.op<Qkv>(phase).norm, 1.0f, t, floats, x_quant_ + t * x_bytes);
      break;
    case PhaseKind::kQkvTokens: {
      const Qkv& op = program_.op<Qkv>(phase);
      kernels_->gemm({shape.format, op.rows, piece * head_dim, (piece + 1) * head_dim,
                      x_quant_.get(), x_bytes, n_tokens_, floats, head_dim});
      for (int32_t t = 0; t < n_tokens_; ++t)
        FinishHead(op, piece, floats + t * head_dim, position_ + t, t, scratch);
      break;
    }
    case PhaseKind::kAttendTokens: {
      const int32_t kv_head = piece % shape.n_kv_heads,
                    first = piece / shape.n_kv_heads * kTokensPerPiece;
      for (int32_t t = first; t < std::min(first + kTokensPerPiece, n_tokens_); ++t) {
        const int32_t head = kv_head * group, end = position_ + t + 1,
                      n_spans = CeilDiv(end, kSpan);
        float *max = floats, *sum = max + int64_t{n_spans} * group,
              *out = sum + int64_t{n_spans} * group;
        for (int32_t span = 0; span < n_spans; ++span)
          AttendSpan(program_.op<Attend>(phase), kv_head,
                     q_ + (int64_t{t} * shape.n_heads + head) * head_stride, span, end, nullptr,
                     scratch, max + int64_t{span} * group, sum + int64_t{span} * group,
                     out + int64_t{span} * group * head_stride);
        for (int32_t g = 0; g < group; ++g)
          kernels_->merge_spans(max + g, sum + g, out + int64_t{g} * head_stride, n_spans, group,
                                head_dim, head_stride,
                                attention_ + int64_t{t} * attention + int64_t{head + g} * head_dim);
      }
      break;
    }
    case PhaseKind::kQuantizeTokens:
      for (int32_t t = first_token; t < last_token; ++t)
        kernels_->quantize(shape.format, attention_ + int64_t{t} * attention, attention,
                           x_quant_ + t * VectorBytes(shape.format, attention));
      break;
    case PhaseKind::kOutputTokens:
      AddRows(program_.op<Attend>(phase), piece, x_quant_.get(), n_tokens_, scratch);
      break;
    case PhaseKind::kFfnNormTokens: {
      const Ffn& op = program_.op<Ffn>(phase);
      for (int32_t t = first_token; t < last_token; ++t) {
        const float* h = Norm(op.norm, 1.0f, t, floats, x_quant_ + t * x_bytes);
        if (observation_ != nullptr && observation_->inputs != nullptr) {
          const int64_t token = op.layer * observation_->n_tokens + first_observed_ + t;
          kernels_->to_fp16(h, hidden, observation_->inputs + token * hidden);
        }
      }
      break;
    }
    case PhaseKind::kPredictTokens: {
      const Rows& rows = program_.op<Ffn>(phase).predictor->first;
      const int32_t first = piece * kPredictRows,
                    last = std::min(first + kPredictRows, rows.n_rows);
      kernels_->gemm({PredictorFormat(shape.format), rows, first, last, x_quant_.get(), x_bytes,
                      n_tokens_, z_ + first, rows.n_rows});
      break;
    }
    case PhaseKind::kFfnTokens:
      RunFfn(phase, program_.op<Ffn>(phase), piece, piece + 1, x_quant_.get(), scratch);
      break;
    case PhaseKind::kFfnSumTokens: {
      const Ffn& op = program_.op<Ffn>(phase);
      const int64_t padded = PaddedCols(shape.format, hidden);
      float* out = op.split ? exchange_.y : x_.get();
      if (op.split)
        std::fill(out + int64_t{first_token} * hidden, out + int64_t{last_token} * hidden, 0.0f);
      for (int32_t t = first_token; t < last_token; ++t)
        kernels_->add_partials(shape.format, partials_ + t * padded, PartialStride(), kFfnPieces,
                               hidden, op.split ? 1.0f : op.scale, out + int64_t{t} * hidden);
      break;
    }
    case PhaseKind::kHeadNormTokens: {
      const Head& op = program_.op<Head>(phase);
      for (int32_t t = first_token; t < last_token; ++t) {
        const float* h = Norm(op.norm, op.scale, t, floats, x_quant_ + t * x_bytes);
        if (Previews(op))
          kernels_->make_preview_input(h, hidden, preview_inputs_ + t * PreviewInputBytes(hidden));
      }
      break;
    }
    case PhaseKind::kShortlistTokens:
      RunShortlistTokens(phase, program_.op<Head>(phase), piece, scratch);
      break;
    default:  // kHeadTokens
      RunHeadTokens(program_.op<Head>(phase), piece);
  }
}

}  // namespace hybrid
