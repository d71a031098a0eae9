// The embedding, and how a layer begins: norm, q, k and v, rope, KV-cache write.

#include <algorithm>
#include <cmath>

#include "session/input.h"
#include "session/prefetch.h"
#include "session/stages.h"

namespace hybrid {

namespace {

void EmbedToken(const Pass& pass, const Embed& op, int32_t token) {
  const ProgramShape& shape = pass.shape();
  pass.kernels->dequantize(shape.format, op.embedding, pass.tokens[token].id, op.scale,
                           pass.scratch.x + int64_t{token} * shape.hidden_size);
}

// The rows of q, k and v, with the scale of the matrix that a head belongs to.
Rows RowsOf(const Pass& pass, const Qkv& op, int32_t head) {
  const int32_t n_heads = pass.shape().n_heads, n_kv_heads = pass.shape().n_kv_heads;
  Rows rows = op.rows;
  rows.matrix_scale = op.matrix_scales[head < n_heads ? 0 : head < n_heads + n_kv_heads ? 1 : 2];
  return rows;
}

// Applies rope to a projected head and stores it: q in scratch memory, k and v in the cache.
void FinishHead(const Pass& pass, const Qkv& op, int32_t head, int32_t token, const float* values,
                ThreadScratch& thread) {
  const ProgramShape& shape = pass.shape();
  const KernelTable& kernels = *pass.kernels;
  const KvCache& kv = *pass.tokens[token].kv;
  const int32_t position = pass.tokens[token].position, head_dim = shape.head_dim,
                half = head_dim / 2;
  const float* cos = shape.rope_cos + int64_t{position} * half;
  const float* sin = shape.rope_sin + int64_t{position} * half;
  if (head < shape.n_heads) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    kernels.rotate(values, cos, sin, half, scale, pass.QueryOf(token, head));
    return;
  }
  const int32_t kv_head = (head - shape.n_heads) % shape.n_kv_heads;
  const auto store = [&](const float* x, uint16_t* out) {
    const float largest = kernels.to_kv(kv.format(), x, head_dim, out);
    float& so_far = thread.largest_kv[token];
    so_far = std::max(so_far, largest);  // a NaN changes nothing
  };
  if (head >= shape.n_heads + shape.n_kv_heads)
    return store(values, kv.ValueAt(op.layer, kv_head, position));
  kernels.rotate(values, cos, sin, half, 1.0f, thread.rotated.get());
  store(thread.rotated.get(), thread.key.get());
  uint16_t* key = kv.KeyAt(op.layer, kv_head, position);
  for (int32_t i = 0; i < head_dim; ++i) key[i * kKeyTile] = thread.key[i];
}

}  // namespace

void RunEmbed(const Pass& pass, const Phase& phase, int32_t, ThreadScratch& thread) {
  const Embed& op = pass.program.op<Embed>(phase);
  EmbedToken(pass, op, 0);
  Read(pass, thread, kStageHead, RowBytes(op.embedding, pass.shape().format));
}

void RunEmbedTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Embed& op = pass.program.op<Embed>(phase);
  const TokenRange tokens = TokensOf(pass, piece);
  for (int32_t t = tokens.first; t < tokens.last; ++t) EmbedToken(pass, op, t);
  Read(pass, thread, kStageHead,
       (tokens.last - tokens.first) * RowBytes(op.embedding, pass.shape().format));
}

// A piece of q, k and v is one head.
void RunQkv(const Pass& pass, const Phase& phase, int32_t head, ThreadScratch& thread) {
  const Qkv& op = pass.program.op<Qkv>(phase);
  const Format format = pass.shape().format;
  const int32_t head_dim = pass.shape().head_dim;
  const uint8_t* x = NormOnce(pass, phase, op.norm, thread);
  float* values = thread.floats.get();
  PrefetchKey(pass, op, head);
  pass.kernels->gemm(
      {format, RowsOf(pass, op, head), head * head_dim, (head + 1) * head_dim, x, 0, 1, values, 0});
  FinishHead(pass, op, head, 0, values, thread);
  Read(pass, thread, kStageQkv, head_dim * RowBytes(op.rows, format));
}

void RunQkvNormTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Qkv& op = pass.program.op<Qkv>(phase);
  const TokenRange tokens = TokensOf(pass, piece);
  for (int32_t t = tokens.first; t < tokens.last; ++t)
    Norm(pass, op.norm, 1.0f, t, thread.floats.get(), InputOf(pass, t, op.rows.n_cols));
}

void RunQkvTokens(const Pass& pass, const Phase& phase, int32_t head, ThreadScratch& thread) {
  const Qkv& op = pass.program.op<Qkv>(phase);
  const Format format = pass.shape().format;
  const int32_t head_dim = pass.shape().head_dim;
  float* values = thread.floats.get();
  if (pass.n_tokens <= kFewTokens) PrefetchKey(pass, op, head);
  pass.kernels->gemm({format, RowsOf(pass, op, head), head * head_dim, (head + 1) * head_dim,
                      pass.scratch.inputs.get(), VectorBytes(format, op.rows.n_cols), pass.n_tokens,
                      values, head_dim});
  for (int32_t t = 0; t < pass.n_tokens; ++t)
    FinishHead(pass, op, head, t, values + t * head_dim, thread);
  Read(pass, thread, kStageQkv, head_dim * RowBytes(op.rows, format));
}

}  // namespace hybrid
