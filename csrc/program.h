// A transformer, recorded once as a flat list of fused operations and replayed for each token.
//
// Program   immutable after recording: operations with pointers to weights. Shared by all sessions.
// Session   one sequence: position, KV cache, scratch. Not thread-safe; different sessions may run
// at once.
//
// Each operation expands into phases of a thread-pool job (see thread_pool.h), one list for decode
// (one token) and one for prefill (up to kPrefillChunk tokens). The number of pieces of a phase
// never depends on the threads, and both lists compute each token with the same sums in the same
// order: prefill, decode and any number of threads give equal bits.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "thread_pool.h"

namespace hybrid {

constexpr int32_t kPrefillChunk = kTokenTile;

struct ProgramShape {
  Format format;
  int32_t hidden_size;
  int32_t n_heads, n_kv_heads, head_dim;
  int32_t max_context;  // rows of the rope tables
  float rms_norm_eps;
  const float* rope_cos;  // (max_context, head_dim / 2)
  const float* rope_sin;
};

// One fused operation; which fields count is said beside each kind.
enum class OpKind : int32_t {
  kEmbed,  // x = embedding[token] * scale                                          (a)
  kQkv,  // norm, q k v projections, rope, KV-cache write                         (a: q, k, v rows)
  kAttend,  // attention, output projection, x += scale * o                          (a: o)
  kFfn,   // norm, gated FFN, x += scale * y                                       (a: gate, b: up,
          // c: down)
  kHead,  // logits = head(norm(x) * scale)                                        (a)
};
struct Op {
  OpKind kind;
  Rows a{}, b{}, c{};
  const float* norm = nullptr;  // (hidden_size,)
  float scale = 1.0f;
  Activation activation = Activation::kRelu;
  float threshold = 0.0f;
  int32_t layer = 0;
};

enum class PhaseKind : int32_t {
  // decode
  kEmbed,
  kQkv,
  kAttend,
  kOutput,
  kFfn,
  kFfnSum,
  kHead,
  // prefill
  kEmbedTokens,
  kNormTokens,
  kQkvTokens,
  kAttendTokens,
  kQuantizeTokens,
  kOutputTokens,
  kFfnTokens,
  kFfnSumTokens,
  kHeadTokens,
};
struct Phase {
  PhaseKind kind;
  int32_t op;
};

class Program {
 public:
  // Throws std::invalid_argument for sizes that the kernels do not take.
  explicit Program(const ProgramShape& shape);

  // Records one operation. Throws std::invalid_argument where its sizes do not fit the shape.
  void Add(const Op& op);

  const ProgramShape& shape() const { return shape_; }
  int32_t head_stride() const { return RoundUp(shape_.head_dim, kHeadAlign); }
  int32_t n_layers() const { return n_layers_; }
  int32_t n_neurons() const { return n_neurons_; }  // of the widest layer
  int32_t vocab_size() const { return vocab_size_; }
  const Op& op(int32_t index) const { return ops_[static_cast<size_t>(index)]; }
  const std::vector<Phase>& decode_phases() const { return decode_; }
  const std::vector<Phase>& prefill_phases() const { return prefill_; }

 private:
  ProgramShape shape_;
  std::vector<Op> ops_;
  std::vector<Phase> decode_, prefill_;
  int32_t n_layers_ = 0, n_neurons_ = 0, vocab_size_ = 0;
};

// Memory from platform::AllocatePages, as an array of T.
template <typename T>
class Pages {
 public:
  explicit Pages(int64_t n);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  T* get() const { return data_; }
  T* operator+(int64_t i) const { return data_ + i; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
  size_t bytes_;
};

class Session {
 public:
  // Reserves a KV cache for `n_context` positions; memory is touched as it is used.
  // `program` and `pool` must outlive the session. Throws std::bad_alloc.
  Session(const Program& program, ThreadPool& pool, int32_t n_context);
  ~Session();

  int32_t position() const { return position_; }  // of the next token
  int32_t n_context() const { return n_context_; }
  // Forgets all tokens from `position` on.
  void Truncate(int32_t position) { position_ = position; }

  // Appends tokens. The caller guarantees position() + n <= n_context() and 0 <= token <
  // vocab_size. `all_logits`, where not null, receives (n, vocab_size) logits; logits() always
  // holds the last token's.
  void Prefill(const int32_t* tokens, int32_t n, float* all_logits);
  void Decode(int32_t token);

  const float* logits() const { return logits_.get(); }
  // Active (neuron, token) pairs per layer since the last reset, over decode and prefill alike.
  int64_t active_count(int32_t layer) const { return active_[static_cast<size_t>(layer)].load(); }
  void ResetActiveCounts();

 private:
  struct ThreadScratch;

  void RunPhases(const std::vector<Phase>& phases);
  int32_t CountPieces(const Phase& phase) const;
  void RunPiece(const Phase& phase, int32_t piece, ThreadScratch& scratch);

  void RunDecodePiece(const Phase& phase, const Op& op, int32_t piece, ThreadScratch& scratch);
  void RunPrefillPiece(const Phase& phase, const Op& op, int32_t piece, ThreadScratch& scratch);
  const uint8_t* NormOnce(const Phase& phase, const Op& op, ThreadScratch& scratch);
  const uint8_t* MergeHeadsOnce(const Phase& phase, ThreadScratch& scratch);
  void FinishHead(const Op& op, int32_t head, float* values, int32_t position, int32_t token);
  void AttendSpan(const Op& op, int32_t kv_head, const float* q, int32_t span, int32_t end,
                  ThreadScratch& scratch, float* max, float* sum, float* out);
  void MergeSpans(int32_t head, int32_t n_spans, const float* max, const float* sum,
                  const float* out, int64_t stride, float* merged) const;
  void RunFfn(const Op& op, int32_t piece, const uint8_t* x, int32_t n_tokens);
  void AddRows(const Op& op, int32_t piece, const uint8_t* x, int32_t n_tokens,
               ThreadScratch& scratch);
  uint16_t* KvHead(int32_t layer, bool is_value, int32_t head) const;

  const Program& program_;
  ThreadPool& pool_;
  const KernelTable* kernels_ = nullptr;  // the table in use during one call
  const int32_t n_context_;
  int32_t position_ = 0;

  // What the current call works on.
  const std::vector<Phase>* phases_ = nullptr;
  const int32_t* tokens_ = nullptr;
  int32_t n_tokens_ = 0;
  float* all_logits_ = nullptr;
  bool wants_logits_ = true;
  uint64_t serial_ = 0;  // of the call's first phase; every phase of every call has its own
  uint64_t next_serial_ = 1;

  // Shared scratch; T = kPrefillChunk tokens.
  Pages<float> x_;          // (T, hidden) residual stream
  Pages<uint8_t> x_quant_;  // (T) quantised vectors of the operation's input
  Pages<float> q_;          // (T, n_heads, head_stride)
  Pages<float> attention_;  // (T, n_heads * head_dim)
  Pages<float> span_max_;   // (n_heads, n_spans)
  Pages<float> span_sum_;   // (n_heads, n_spans)
  Pages<float> span_out_;   // (n_spans, n_heads, head_stride)
  Pages<float> partials_;   // (kFfnPieces, T, padded hidden)
  Pages<float> logits_;     // (vocab_size,)
  Pages<uint16_t> kv_;      // fp16 (n_layers, k and v, n_kv_heads, n_context, head_stride)
  std::vector<std::atomic<int64_t>> active_;
  std::vector<std::unique_ptr<ThreadScratch>> threads_;
};

}  // namespace hybrid
