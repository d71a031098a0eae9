// Session: what one piece of each prefill phase computes.

#include <algorithm>

#include "session/session.h"

namespace hybrid {

void Session::RunPrefillPiece(const Phase& phase, const Op& op, int32_t piece,
                              ThreadScratch& scratch) {
  const ProgramShape& shape = program_.shape();
  const int32_t hidden = shape.hidden_size, head_dim = shape.head_dim,
                head_stride = program_.head_stride();
  const int32_t group = shape.n_heads / shape.n_kv_heads, attention = shape.n_heads * head_dim;
  const int64_t x_bytes = VectorBytes(shape.format, hidden);
  const int32_t first_token = piece * kTokensPerPiece;  // for phases that are cut by tokens only
  const int32_t last_token = std::min(first_token + kTokensPerPiece, n_tokens_);
  float* floats = scratch.floats.get();
  switch (phase.kind) {
    case PhaseKind::kEmbedTokens:
      for (int32_t t = first_token; t < last_token; ++t)
        kernels_->dequantize(shape.format, op.a, tokens_[t], op.scale, x_ + int64_t{t} * hidden);
      break;
    case PhaseKind::kNormTokens:
      for (int32_t t = first_token; t < last_token; ++t) {
        const float scale = op.kind == OpKind::kHead ? op.scale : 1.0f;
        if (op.is_split)
          std::copy_n(exchange_.h + int64_t{t} * hidden, hidden, floats);
        else
          kernels_->rms_norm(x_ + int64_t{t} * hidden, op.norm, hidden, shape.rms_norm_eps, scale,
                             floats);
        kernels_->quantize(shape.format, floats, hidden, x_quant_ + t * x_bytes);
        if (Previews(op))
          kernels_->make_preview_input(floats, hidden,
                                       preview_inputs_ + t * PreviewInputBytes(hidden));
        if (observation_ != nullptr && observation_->inputs != nullptr && op.kind == OpKind::kFfn) {
          const int64_t token = op.layer * observation_->n_tokens + first_observed_ + t;
          kernels_->to_fp16(floats, hidden, observation_->inputs + token * hidden);
        }
      }
      break;
    case PhaseKind::kQkvTokens:
      kernels_->gemm({shape.format, op.a, piece * head_dim, (piece + 1) * head_dim, x_quant_.get(),
                      x_bytes, n_tokens_, floats, head_dim});
      for (int32_t t = 0; t < n_tokens_; ++t)
        FinishHead(op, piece, floats + t * head_dim, position_ + t, t, scratch);
      break;
    case PhaseKind::kAttendTokens: {
      const int32_t kv_head = piece % shape.n_kv_heads,
                    first = piece / shape.n_kv_heads * kTokensPerPiece;
      for (int32_t t = first; t < std::min(first + kTokensPerPiece, n_tokens_); ++t) {
        const int32_t head = kv_head * group, end = position_ + t + 1,
                      n_spans = CeilDiv(end, kSpan);
        float *max = floats, *sum = max + int64_t{n_spans} * group,
              *out = sum + int64_t{n_spans} * group;
        for (int32_t span = 0; span < n_spans; ++span)
          AttendSpan(op, kv_head, q_ + (int64_t{t} * shape.n_heads + head) * head_stride, span, end,
                     nullptr, scratch, max + int64_t{span} * group, sum + int64_t{span} * group,
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
      AddRows(op, piece, x_quant_.get(), n_tokens_, scratch);
      break;
    case PhaseKind::kPredictTokens: {
      const int32_t first = piece * kPredictRows,
                    last = std::min(first + kPredictRows, op.d.n_rows);
      kernels_->gemm({PredictorFormat(shape.format), op.d, first, last, x_quant_.get(), x_bytes,
                      n_tokens_, z_ + first, op.d.n_rows});
      break;
    }
    case PhaseKind::kFfnTokens:
      RunFfn(phase, op, piece, piece + 1, x_quant_.get(), scratch);
      break;
    case PhaseKind::kFfnSumTokens: {
      const int64_t padded = PaddedCols(shape.format, hidden);
      float* out = op.is_split ? exchange_.y : x_.get();
      if (op.is_split)
        std::fill(out + int64_t{first_token} * hidden, out + int64_t{last_token} * hidden, 0.0f);
      for (int32_t t = first_token; t < last_token; ++t)
        kernels_->add_partials(shape.format, partials_ + t * padded, PartialStride(), kFfnPieces,
                               hidden, op.is_split ? 1.0f : op.scale, out + int64_t{t} * hidden);
      break;
    }
    case PhaseKind::kShortlistTokens:
      RunShortlistTokens(phase, op, piece, scratch);
      break;
    default:  // kHeadTokens
      RunHeadTokens(op, piece);
  }
}

}  // namespace hybrid
