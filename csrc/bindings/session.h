// Programs, sessions and batches as Python holds them, together with the objects that their
// pointers lead to.
#pragma once

#include <algorithm>
#include <atomic>
#include <deque>

#include "bindings/bindings.h"
#include "platform.h"
#include "program.h"
#include "session/session.h"

namespace hybrid {

// A recorded program, together with the arrays that its pointers lead to.
struct PyProgram {
  PyProgram(Format format, int32_t hidden_size, int32_t n_heads, int32_t n_kv_heads,
            int32_t head_dim, float rms_norm_eps, Floats rope_cos, Floats rope_sin,
            std::optional<int32_t> n_filled, py::object fill_rope)
      : program({format, hidden_size, n_heads, n_kv_heads, head_dim,
                 static_cast<int32_t>(rope_cos.shape(0)), rms_norm_eps, rope_cos.data(),
                 rope_sin.data()}) {
    Check(rope_cos.ndim() == 2 && rope_cos.shape(1) == head_dim / 2,
          "rope tables must be (context, head_dim / 2)");
    Check(rope_sin.ndim() == 2 && rope_sin.shape(0) == rope_cos.shape(0) &&
              rope_sin.shape(1) == head_dim / 2,
          "rope_cos and rope_sin must have the same shape");
    this->n_filled = n_filled.value_or(program.shape().max_context);
    Check(this->n_filled <= program.shape().max_context, "n_filled is beyond the rope tables");
    Check(this->n_filled == program.shape().max_context || !fill_rope.is_none(),
          "rope tables that are not whole need fill_rope");
    this->fill_rope = fill_rope;
    keep_alive.append(rope_cos);
    keep_alive.append(rope_sin);
  }
  // Makes sure that the first `n` positions of the rope tables are filled. The caller holds the
  // GIL, which `fill_rope` may release: another thread may then have filled more.
  void FillRope(int32_t n) {
    if (n <= n_filled) return;
    const int32_t filled = fill_rope(n).cast<int32_t>();
    Check(filled >= n && filled <= program.shape().max_context,
          "fill_rope must return how many positions are filled");
    n_filled = std::max(n_filled, filled);
  }
  // The rows or the norm of an operation, checked. The program keeps their memory alive.
  Rows TakeRows(const py::object& matrix) {
    const PyRows& rows = matrix.cast<const PyRows&>();
    Check(rows.format == program.shape().format, "all rows must have the program's format");
    keep_alive.append(matrix);
    return rows.rows;
  }
  const float* TakeNorm(const Floats& norm) {
    Check(norm.ndim() == 1 && norm.shape(0) == program.shape().hidden_size,
          "norm must be (hidden_size,)");
    keep_alive.append(norm);
    return norm.data();
  }
  Program program;
  int32_t n_filled;  // positions of the rope tables
  py::object fill_rope;
  py::list keep_alive;
};

// A session, what it points to, and the flag that allows only one call at a time.
struct PySession {
  PySession(py::object program, py::object pool, int32_t n_context, bool is_dense, bool is_timed,
            KvFormat kv)
      : keep_program(program),
        keep_pool(pool),
        owner(program.cast<PyProgram&>()),
        program(owner.program),
        pool(pool.cast<ThreadPool&>()),
        session(this->program, this->pool, CheckContext(this->program, n_context), kv, is_dense,
                is_timed) {}

  static int32_t CheckContext(Program& program, int32_t n_context) {
    Check(n_context > 0 && n_context <= program.shape().max_context,
          "n_context must be from 1 to the length of the rope tables");
    program.Seal();
    return n_context;
  }

  // Checks the next tokens, and prepares their positions. Every pass begins with it.
  void Admit(const int64_t* tokens, int64_t n) {
    Check(n <= session.n_context() - session.position(), "the context is full");
    for (int64_t i = 0; i < n; ++i)
      Check(tokens[i] >= 0 && tokens[i] < program.vocab_size(), "a token is beyond the vocabulary");
    owner.FillRope(session.position() + static_cast<int32_t>(n));
  }

  Observation Observe(int32_t n, Bytes& masks, std::optional<Halves>& inputs) const {
    const py::ssize_t n_layers = program.n_layers(), hidden = program.shape().hidden_size;
    Check(masks.ndim() == 3 && masks.shape(0) == n_layers && masks.shape(1) == n &&
              masks.shape(2) == CeilDiv(program.n_neurons(), 8),
          "masks must be (n_layers, n, ceil(n_neurons / 8))");
    if (inputs)
      Check(inputs->ndim() == 3 && inputs->shape(0) == n_layers && inputs->shape(1) == n &&
                inputs->shape(2) == hidden,
            "inputs must be (n_layers, n, hidden_size)");
    return {n, masks.mutable_data(), inputs ? inputs->mutable_data() : nullptr};
  }

  // The shape of the keys and values of `n` positions.
  std::vector<py::ssize_t> KvShape(py::ssize_t n) const {
    const ProgramShape& shape = program.shape();
    return {n, program.n_layers(), shape.n_kv_heads, 2, shape.head_dim};
  }

  // For calls that run the whole program at once.
  void CheckAlone() const {
    Check(program.segments().size() == 1 && !program.segments()[0].sends_x,
          "the program has hand-offs: call begin, run_segment and end instead");
  }
  void CheckExchange() const {
    Check(session.runner().exchange().x != nullptr || program.segments().size() == 1,
          "the program has hand-offs, but the session has no link: call meet first");
  }

  Runner& runner() { return session.runner(); }
  const Runner& runner() const { return session.runner(); }

  py::object keep_program, keep_pool;  // declared first: they must outlive the session
  py::object keep_link = py::none(), keep_logits = py::none();
  int32_t next_segment = -1;  // of a call that runs segment by segment; -1: there is none
  PyProgram& owner;
  Program& program;
  ThreadPool& pool;
  Session session;
  std::atomic<bool> is_busy{false};
};

// Holds a session or a batch for one call. Throws ValueError if another thread holds it. Throws
// RuntimeError in a process that was forked after it was opened: at that moment another thread may
// have held a lock of the pool.
class ExclusiveUse {
 public:
  template <typename Owner>
  explicit ExclusiveUse(Owner& owner) : is_busy_(owner.is_busy) {
    if (platform::ProcessId() != owner.pool.process_id())
      throw std::runtime_error(
          "the session was opened before a fork; load the model again in this process");
    Check(!is_busy_.exchange(true), "the session is in use by another thread");
  }
  ~ExclusiveUse() { is_busy_.store(false); }
  ExclusiveUse(const ExclusiveUse&) = delete;
  ExclusiveUse& operator=(const ExclusiveUse&) = delete;

 private:
  std::atomic<bool>& is_busy_;
};

// A batch, and what it points to.
struct PyBatch {
  PyBatch(py::object program, py::object pool, int32_t n_context, bool is_timed)
      : keep_program(program),
        keep_pool(pool),
        program(program.cast<PyProgram&>().program),
        pool(pool.cast<ThreadPool&>()),
        n_context(PySession::CheckContext(this->program, n_context)),
        batch(this->program, this->pool, n_context, is_timed) {}
  Runner& runner() { return batch.runner(); }
  const Runner& runner() const { return batch.runner(); }

  void Run(const std::vector<py::object>& sessions, const std::vector<std::vector<int64_t>>& tokens,
           const std::vector<bool>& wants_logits) {
    Check(!sessions.empty() && sessions.size() == tokens.size() &&
              sessions.size() == wants_logits.size(),
          "sessions, tokens and wants_logits must have the same length, 1 or more");
    const ExclusiveUse use(*this);
    std::deque<ExclusiveUse> uses;
    std::vector<Part> parts;
    std::vector<std::vector<int32_t>> ids;
    size_t n_tokens = 0;
    for (const std::vector<int64_t>& of : tokens) {
      Check(!of.empty(), "every session needs at least one token");
      n_tokens += of.size();
      ids.emplace_back(of.begin(), of.end());
    }
    Check(n_tokens <= kPrefillChunk, "a pass takes at most PREFILL_CHUNK tokens");
    for (size_t i = 0; i < sessions.size(); ++i) {
      PySession& s = sessions[i].cast<PySession&>();
      uses.emplace_back(s);  // a session that occurs twice is in use
      s.CheckAlone();
      Check(&s.program == &program, "a session belongs to another program");
      Check(s.session.n_context() <= n_context, "a session's context is larger than the batch's");
      s.Admit(tokens[i].data(), static_cast<int64_t>(tokens[i].size()));
      parts.push_back({&s.session.sequence(), ids[i].data(), static_cast<int32_t>(ids[i].size()),
                       nullptr, wants_logits[i]});
    }
    WithoutGil([&] { batch.Run(parts); });
  }

  py::object keep_program, keep_pool;  // declared first: they must outlive the batch
  Program& program;
  ThreadPool& pool;
  int32_t n_context;
  Batch batch;
  std::atomic<bool> is_busy{false};
};

}  // namespace hybrid
