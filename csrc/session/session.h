// A session is one sequence with its position, KV cache and scratch memory. It runs a recorded
// program (program.h), which it shares with other sessions, on a thread pool.
//
// Prefill appends many tokens, up to kPrefillChunk at a time, and Decode appends one. Each call
// runs the phases of the program's segments. The work of a phase is cut into pieces, whose sizes
// are constants. The results therefore do not depend on the number of threads, and prefill and
// decode give equal bits.
//
// A session is not thread-safe. Different sessions of one program may run at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "platform.h"
#include "program.h"
#include "thread_pool.h"

namespace hybrid {

// An array of T in memory from platform::AllocatePages. `n` may be 0.
template <typename T>
class Pages {
 public:
  explicit Pages(int64_t n, bool huge = false);
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

template <typename T>
Pages<T>::Pages(int64_t n, bool huge)
    : data_(nullptr), bytes_(static_cast<size_t>(n > 0 ? n : 1) * sizeof(T)) {
  data_ = static_cast<T*>(platform::AllocatePages(bytes_, huge));
}

template <typename T>
Pages<T>::~Pages() {
  platform::FreePages(data_, bytes_);
}

inline int32_t CeilDiv(int32_t n, int32_t d) { return (n + d - 1) / d; }

// Sizes of pieces. They are constants, independent of the number of threads, since they fix the
// order of every sum.
constexpr int32_t kFfnPieces = kMaxPieces;
static_assert((kFfnPieces & (kFfnPieces - 1)) == 0, "partial sums are added half to half");
constexpr int32_t kOutputRows = 32;  // rows per piece of the output projection
constexpr int32_t kHeadRows = 256;   // rows per piece of the head
static_assert(kHeadRows % kPredictTile == 0, "pieces of a preview are whole tiles");
// The shortlist's limit is set so that one of kShortlistShare tiles of the preview holds a logit on
// the shortlist. If logits are normally distributed, that puts 4 % of the rows on it.
constexpr int32_t kShortlistShare = 2;
constexpr int32_t kShortlistRows = 16 * kHeadRows;  // rows per piece of the shortlist
constexpr int32_t kPredictRows = 8;  // rows per piece of a low-rank predictor's first matrix
constexpr int32_t kTokensPerPiece = 8;
constexpr int32_t kPartialGap = 16;  // floats: a cache line

// Two threads take pairs of FFN pieces alternately, and single pieces towards the end
// (session.cpp). PlaceOf orders the partial sums of the pieces so that even places belong to one
// thread and odd places to the other. The two halves are then added up separately, since a thread
// is slow to read what another core has written.
constexpr int32_t kPairedPieces = kFfnPieces * 3 / 4;
static_assert(kPairedPieces % 4 == 0, "two pairs fill four places");
inline int32_t PlaceOf(int32_t piece) {
  return piece < kPairedPieces ? piece / 4 * 4 + piece % 2 * 2 + piece / 2 % 2 : piece;
}

// The first neuron of a piece of an FFN layer. Pieces begin at multiples of 8 neurons.
inline int32_t FirstNeuron(const Ffn& op, int32_t piece) {
  const int32_t n_neurons = op.n_neurons() - op.first_neuron();
  return piece == kFfnPieces
             ? op.n_neurons()
             : op.first_neuron() +
                   static_cast<int32_t>(int64_t{n_neurons} * piece / kFfnPieces) / 8 * 8;
}

// The parts of a token for which bytes and times are counted.
enum Stage : int32_t {
  kStageQkv,
  kStageAttend,
  kStageOutput,
  kStagePredict,  // a low-rank predictor's first matrix; its other work belongs to kStageGate
  kStageGate,
  kStageUpDown,
  kStageHead
};
constexpr int32_t kStages = 7;
constexpr const char* kStageNames[kStages] = {"qkv",  "attend",  "output", "predict",
                                              "gate", "up_down", "head"};

// What a prefill call writes for the profiler: `n_tokens` tokens of all layers.
struct Observation {
  int64_t n_tokens;
  // (n_layers, n_tokens, CeilDiv(n_neurons, 8)): bit i % 8 of byte i / 8 is set if neuron i fired.
  // The caller provides zeros.
  uint8_t* masks;
  uint16_t* inputs;  // fp16 (n_layers, n_tokens, hidden_size), the FFN's normed input; or null
};

// The memory through which a session and another device exchange data. Both see it. Each array has
// rows for T = kPrefillChunk tokens.
struct Exchange {
  float* x;      // (T, hidden) the residual stream, in both directions
  float* h;      // (T, hidden) the normed input of a split FFN, from the device
  float* gates;  // (T, n_neurons) gates that the device computed; 0 if a neuron does not fire
  float* y;      // (T, hidden) the session's part of a split FFN, to the device
  int32_t n_neurons;
};

class Session {
 public:
  // Reserves a KV cache for `n_context` positions; the system provides its memory as it is used.
  // `is_dense`: no neuron is skipped, for comparisons. `is_timed`: calls measure their stages.
  // `program` and `pool` must outlive the session. Throws std::bad_alloc.
  Session(const Program& program, ThreadPool& pool, int32_t n_context, bool is_dense,
          bool is_timed);
  ~Session();

  int32_t position() const { return position_; }  // of the next token
  int32_t n_context() const { return n_context_; }
  // Forgets all tokens from `position` on.
  void Truncate(int32_t position) { position_ = position; }

  // Append tokens. The caller guarantees position() + n <= n_context() and 0 <= token < vocab_size.
  // `all_logits`, if not null, receives (n, vocab_size) logits. logits() always holds those of the
  // last token. `observation`, if not null, has rows for these n tokens.
  void Prefill(const int32_t* tokens, int32_t n, float* all_logits,
               const Observation* observation = nullptr);
  void Decode(int32_t token);

  // Run a program of several segments, with work of another device between them: Begin up to
  // kPrefillChunk tokens, run every segment in order, End. `all_logits` as above. `wants_logits`
  // says whether logits() must hold the last token's logits. The memory of `exchange` must outlive
  // its use.
  void SetExchange(const Exchange& exchange) { exchange_ = exchange; }
  void Begin(const int32_t* tokens, int32_t n, bool is_decode, float* all_logits,
             bool wants_logits);
  void RunSegment(int32_t segment);
  void End() { position_ += n_tokens_; }
  const Exchange& exchange() const { return exchange_; }
  const Program& program() const { return program_; }
  ThreadPool& pool() const { return pool_; }

  const float* logits() const { return logits_.get(); }
  // Active (neuron, token) pairs of a layer since the last reset, in decode and prefill. This and
  // the counts below must not be read during a call.
  int64_t active_count(int32_t layer) const;
  // Pairs of a layer whose gate was computed: those that a predictor selected, or all without one.
  int64_t predicted_count(int32_t layer) const;
  // Rows of the head that were computed in full because they were on a preview's shortlist.
  int64_t shortlisted_count() const;
  // Bytes of packed rows and of the KV cache that decode has read. The head's bytes include the
  // token's embedding row.
  int64_t decode_bytes(Stage stage) const;
  // For a timed session: the nanoseconds that all threads together worked on a stage, and those
  // that they waited for one another.
  int64_t stage_nanoseconds(Stage stage) const;
  int64_t waiting_nanoseconds() const;
  void ResetCounts();

 private:
  // The scratch memory and the counts of one thread.
  struct ThreadScratch {
    ThreadScratch(int64_t n_floats, int64_t vector_bytes, int64_t n_pairs, int64_t n_neurons,
                  int64_t predictor_bytes, int64_t preview_bytes, int32_t head_dim,
                  int32_t n_layers)
        : floats(n_floats),
          x(vector_bytes),
          active(n_pairs),
          predicted(n_neurons),
          predictor_inputs(predictor_bytes),
          preview_input(preview_bytes),
          shortlist(preview_bytes > 0 ? kShortlistRows + 1 : 0),
          n_active(static_cast<size_t>(n_layers)),
          n_predicted(static_cast<size_t>(n_layers)),
          rotated(head_dim),
          key(head_dim) {}
    Pages<float> floats;
    Pages<uint8_t> x;                 // the thread's own quantised vector
    Pages<Active> active;             // pairs of the FFN's pieces
    Pages<int32_t> predicted;         // predicted neurons of the FFN's pieces
    Pages<uint8_t> predictor_inputs;  // of all tokens of a call
    Pages<uint8_t> preview_input;     // of decode's token
    Pages<int32_t> shortlist;         // rows of one piece
    float likely = 0.0f;              // the least logit on the shortlist
    uint64_t likely_serial = 0;       // the operation and call that `likely` belongs to
    int64_t n_shortlisted = 0;
    uint64_t x_serial = 0;                       // the operation and call that `x` belongs to
    uint64_t predictor_serial = 0;               // likewise for `predictor_inputs`
    std::vector<int64_t> n_active, n_predicted;  // pairs, per layer
    int64_t bytes[kStages] = {};
    int64_t nanoseconds[kStages] = {};
    int64_t last_tick = 0;
    Pages<float> rotated;  // one key, after rope
    Pages<uint16_t> key;   // the same key in fp16
    float scores[kHeadTile * kSpan];
  };

  void RunPhases(int32_t first, int32_t last);
  Ahead ReadNext(int32_t phase, int32_t thread, int32_t n_threads) const;
  int32_t CountPieces(const Phase& phase) const;
  void RunPiece(const Phase& phase, int32_t piece, ThreadScratch& scratch);

  void RunDecodePiece(const Phase& phase, int32_t piece, ThreadScratch& scratch);
  void RunPrefillPiece(const Phase& phase, int32_t piece, ThreadScratch& scratch);
  // Adds the time since the thread's last tick to a stage.
  void Tick(Stage stage, ThreadScratch& scratch) const;
  const float* Norm(const float* norm, float scale, int32_t token, float* floats,
                    uint8_t* out) const;
  const uint8_t* NormOnce(const Phase& phase, const float* norm, ThreadScratch& scratch);
  const uint8_t* NormHeadOnce(const Phase& phase, const Head& op, ThreadScratch& scratch);
  void PrefetchNorm(int32_t op) const;
  const uint8_t* PredictorInputsOnce(const Phase& phase, const Predictor& predictor,
                                     const uint8_t* x, ThreadScratch& scratch);
  const uint8_t* MergeHeadsOnce(const Phase& phase, ThreadScratch& scratch);
  void FinishHead(const Qkv& op, int32_t head, const float* values, int32_t position, int32_t token,
                  ThreadScratch& scratch);
  void AttendSpan(const Attend& op, int32_t kv_head, const float* q, int32_t span, int32_t end,
                  const void* next, ThreadScratch& scratch, float* max, float* sum, float* out);
  ActiveCounts RunFfn(const Phase& phase, const Ffn& op, int32_t first_piece, int32_t end_piece,
                      const uint8_t* x, ThreadScratch& scratch);
  void AddPartial(const Ffn& op, int32_t piece);
  bool Previews(const Head& op) const;
  void RunHead(const Phase& phase, const Head& op, int32_t piece, ThreadScratch& scratch);
  void RunShortlist(const Phase& phase, const Head& op, int32_t piece, ThreadScratch& scratch);
  void RunHeadTokens(const Head& op, int32_t piece);
  void RunShortlistTokens(const Phase& phase, const Head& op, int32_t piece,
                          ThreadScratch& scratch);
  void PreviewRows(const Head& op, int32_t piece, const uint8_t* input, float* logits,
                   float* maxima) const;
  float LikelyOnce(const Phase& phase, const Head& op, ThreadScratch& scratch) const;
  float LikelyLogit(const Head& op, const float* maxima, ThreadScratch& scratch) const;
  int64_t Shortlist(const Head& op, int32_t piece, float likely, const uint8_t* x,
                    const float* maxima, float* logits, ThreadScratch& scratch) const;
  // Floats from one piece's partial sums to the next. The gap keeps this from being a multiple of
  // the sizes by which caches are divided; otherwise pieces would evict one another.
  int64_t PartialStride() const {
    return n_tokens_ * int64_t{PaddedCols(program_.shape().format, program_.shape().hidden_size)} +
           kPartialGap;
  }
  void ObserveActive(const Ffn& op, const Active* active, int32_t n_listed);
  void AddRows(const Attend& op, int32_t piece, const uint8_t* x, int32_t n_tokens,
               ThreadScratch& scratch);
  void PrefetchKey(const Qkv& op, int32_t head) const;
  uint16_t* KeyAt(int32_t layer, int32_t kv_head, int32_t position) const;
  uint16_t* KvSpan(int32_t layer, int32_t kv_head, int32_t span) const;

  const Program& program_;
  ThreadPool& pool_;
  const KernelTable* kernels_ = nullptr;  // the table in use during one call
  const int32_t n_context_;
  const bool is_dense_, is_timed_;
  // How decode deals out an FFN's pieces: run i is pieces [ffn_runs_[i], ffn_runs_[i + 1]). The
  // choice of runs changes no sum.
  const std::vector<int32_t> ffn_runs_;
  int32_t position_ = 0;
  int64_t timed_wall_ = 0;  // nanoseconds

  // What the current call works on.
  const std::vector<Phase>* phases_ = nullptr;
  int32_t first_phase_ = 0;
  int32_t tokens_[kPrefillChunk] = {};
  Exchange exchange_{};
  int32_t n_tokens_ = 0;
  float* all_logits_ = nullptr;
  bool wants_logits_ = true;
  const Observation* observation_ = nullptr;
  int32_t first_observed_ = 0;  // the chunk's first token within the observation
  // The serial number of the call's first operation. Every operation of every call has its own.
  uint64_t serial_ = 0;
  uint64_t next_serial_ = 1;

  // Scratch memory that all threads share; T = kPrefillChunk tokens.
  Pages<float> x_;                 // (T, hidden) residual stream
  Pages<uint8_t> x_quant_;         // (T) quantised vectors of the operation's input
  Pages<float> q_;                 // (T, n_heads, head_stride)
  Pages<float> attention_;         // (T, n_heads * head_dim)
  Pages<float> span_max_;          // (n_heads, n_spans)
  Pages<float> span_sum_;          // (n_heads, n_spans)
  Pages<float> span_out_;          // (n_spans, n_heads, head_stride)
  Pages<float> z_;                 // (T, rank) x times the first matrix of a low-rank predictor
  Pages<float> partials_;          // (kFfnPieces, PartialStride())
  Pages<float> logits_;            // (vocab_size,)
  Pages<uint8_t> preview_inputs_;  // (T, PreviewInputBytes) for prefill
  Pages<float> tile_maxima_;       // (T, tiles of the preview); decode uses the first row
  // How many partial sums of even places are done, how many of odd places, and how many of the two
  // halves are added up. Each count has its own cache line. All are 0 between operations.
  struct alignas(64) Arrived {
    std::atomic<int32_t> n{0};
  };
  Arrived n_arrived_[3];
  // fp16 (n_spans, n_layers, n_kv_heads, keys and values of a span). What one piece of attention
  // reads is contiguous, and huge pages fill up as the context grows.
  Pages<uint16_t> kv_;
  std::vector<std::unique_ptr<ThreadScratch>> threads_;
};

}  // namespace hybrid
