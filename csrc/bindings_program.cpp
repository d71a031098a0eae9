// Thread pools, recorded programs and sessions.

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>

#include "bindings.h"
#include "kernels/dispatch.h"
#include "platform.h"
#include "program.h"
#include "session.h"

namespace hybrid {

namespace {

using Tokens = py::array_t<int64_t, py::array::c_style>;

// In a forked child the workers do not exist: the pool can be neither joined nor destroyed there.
struct FreeInOwnProcess {
  void operator()(ThreadPool* pool) const {
    if (platform::ProcessId() == pool->process_id()) delete pool;
  }
};

constexpr int64_t kReadPiece = int64_t{1} << 18;  // floats: 1 MiB

// Reads all of `memory` once, in pieces handed out to the pool's threads. Returns its sum.
double ReadMemory(ThreadPool& pool, const Floats& memory) {
  struct Context {
    const float* floats;
    int64_t n;
    const KernelTable* kernels;
    std::vector<double> sums;
  } context{memory.data(), memory.size() / 128 * 128, &ActiveKernels(), {}};
  Check(context.n > 0 && context.n / kReadPiece < (1 << 20), "memory: from 128 floats to 1 TiB");
  context.sums.resize(static_cast<size_t>((context.n + kReadPiece - 1) / kReadPiece));
  Job job;
  job.context = &context;
  job.n_phases = 1;
  job.n_pieces = [](void* c, int32_t) {
    return static_cast<int32_t>(static_cast<Context*>(c)->sums.size());
  };
  job.run_piece = [](void* c, int32_t, int32_t piece, int32_t) {
    Context& all = *static_cast<Context*>(c);
    const int64_t first = piece * kReadPiece, n = std::min(kReadPiece, all.n - first);
    all.sums[static_cast<size_t>(piece)] = all.kernels->read(all.floats + first, n);
  };
  WithoutGil([&] { pool.Run(job); });
  return std::accumulate(context.sums.begin(), context.sums.end(), 0.0);
}

// A recorded program together with the arrays that its pointers lead to.
struct PyProgram {
  PyProgram(Format format, int32_t hidden_size, int32_t n_heads, int32_t n_kv_heads,
            int32_t head_dim, float rms_norm_eps, Floats rope_cos, Floats rope_sin)
      : program({format, hidden_size, n_heads, n_kv_heads, head_dim,
                 static_cast<int32_t>(rope_cos.shape(0)), rms_norm_eps, rope_cos.data(),
                 rope_sin.data()}) {
    Check(rope_cos.ndim() == 2 && rope_cos.shape(1) == head_dim / 2,
          "rope tables must be (context, head_dim / 2)");
    Check(rope_sin.ndim() == 2 && rope_sin.shape(0) == rope_cos.shape(0) &&
              rope_sin.shape(1) == head_dim / 2,
          "rope tables must be alike");
    keep_alive.append(rope_cos);
    keep_alive.append(rope_sin);
  }
  void Add(Op op, const std::vector<py::object>& rows, std::optional<Floats> norm) {
    Rows* slots[] = {&op.a, &op.b, &op.c};
    for (size_t i = 0; i < rows.size(); ++i) {
      const PyRows& matrix = rows[i].cast<const PyRows&>();
      Check(matrix.format == program.shape().format, "rows of another format");
      *slots[i] = matrix.rows;
      keep_alive.append(rows[i]);
    }
    if (norm) {
      Check(norm->ndim() == 1 && norm->shape(0) == program.shape().hidden_size,
            "norm must be (hidden_size,)");
      op.norm = norm->data();
      keep_alive.append(*norm);
    }
    program.Add(op);
  }
  Program program;
  py::list keep_alive;
};

// A session, what it points to, and the flag that keeps its calls apart.
struct PySession {
  PySession(py::object program, py::object pool, int32_t n_context, bool is_dense, bool is_timed)
      : keep_program(program),
        keep_pool(pool),
        program(program.cast<PyProgram&>().program),
        pool(pool.cast<ThreadPool&>()),
        session(this->program, this->pool, CheckContext(this->program, n_context), is_dense,
                is_timed) {}

  static int32_t CheckContext(Program& program, int32_t n_context) {
    Check(n_context > 0 && n_context <= program.shape().max_context,
          "context must be within the rope tables");
    program.Seal();
    return n_context;
  }

  void CheckTokens(const int64_t* tokens, int64_t n) const {
    Check(n <= session.n_context() - session.position(), "the context is full");
    for (int64_t i = 0; i < n; ++i)
      Check(tokens[i] >= 0 && tokens[i] < program.vocab_size(), "token beyond the vocabulary");
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

  py::object keep_program, keep_pool;  // first: they must outlive the session
  Program& program;
  ThreadPool& pool;
  Session session;
  std::atomic<bool> is_busy{false};
};

// Holds a session for one call. Throws ValueError where another thread holds it, RuntimeError in a
// process forked after the session was opened: a lock of its pool may have been held at that
// moment.
class Turn {
 public:
  explicit Turn(PySession& s) : s_(s) {
    if (platform::ProcessId() != s.pool.process_id())
      throw std::runtime_error("the session was opened before a fork; load the model again here");
    Check(!s.is_busy.exchange(true), "the session is in use by another thread");
  }
  ~Turn() { s_.is_busy.store(false); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  PySession& s_;
};

}  // namespace

void BindProgram(py::module_& m) {
  py::class_<PyRows>(m, "Rows")
      .def(py::init<Format, Bytes, int32_t, int32_t, int64_t, std::optional<int64_t>, int64_t>(),
           py::kw_only(), py::arg("format"), py::arg("memory"), py::arg("n_rows"),
           py::arg("n_cols"), py::arg("offset") = 0, py::arg("row_stride") = py::none(),
           py::arg("scales_offset") = 0)
      .def_property_readonly("n_rows", [](const PyRows& r) { return r.rows.n_rows; })
      .def_property_readonly("n_cols", [](const PyRows& r) { return r.rows.n_cols; })
      .def_property_readonly("memory", [](const PyRows& r) { return r.memory; });

  py::class_<PyPredictor>(m, "Predictor")
      .def(py::init<Format, PredictorKind, int32_t, int32_t, Bytes, const PyRows*>(), py::kw_only(),
           py::arg("format"), py::arg("kind"), py::arg("size"), py::arg("n_neurons"),
           py::arg("tiles"), py::arg("first_matrix") = py::none());

  py::class_<ThreadPool, std::unique_ptr<ThreadPool, FreeInOwnProcess>>(m, "ThreadPool")
      .def(py::init([](int32_t n_threads) {
             Check(n_threads >= 1, "n_threads must be positive");
             return std::unique_ptr<ThreadPool, FreeInOwnProcess>(new ThreadPool(n_threads));
           }),
           py::arg("n_threads"))
      .def_property_readonly("n_threads", &ThreadPool::n_threads)
      .def(
          "read",
          [](ThreadPool& pool, const Floats& memory) {
            Check(platform::ProcessId() == pool.process_id(), "made before a fork");
            return ReadMemory(pool, memory);
          },
          py::arg("memory"));

  py::class_<PyProgram>(m, "Program")
      .def(py::init<Format, int32_t, int32_t, int32_t, int32_t, float, Floats, Floats>(),
           py::kw_only(), py::arg("format"), py::arg("hidden_size"), py::arg("n_heads"),
           py::arg("n_kv_heads"), py::arg("head_dim"), py::arg("rms_norm_eps"), py::arg("rope_cos"),
           py::arg("rope_sin"))
      .def(
          "embed",
          [](PyProgram& p, py::object embedding, float scale) {
            Op op{OpKind::kEmbed};
            op.scale = scale;
            p.Add(op, {embedding}, {});
          },
          py::arg("embedding"), py::arg("scale"))
      .def(
          "qkv",
          [](PyProgram& p, Floats norm, py::object qkv, int32_t layer) {
            Op op{OpKind::kQkv};
            op.layer = layer;
            p.Add(op, {qkv}, norm);
          },
          py::arg("norm"), py::arg("qkv"), py::arg("layer"))
      .def(
          "attend",
          [](PyProgram& p, py::object o, float scale, int32_t layer) {
            Op op{OpKind::kAttend};
            op.scale = scale;
            op.layer = layer;
            p.Add(op, {o}, {});
          },
          py::arg("o"), py::arg("scale"), py::arg("layer"))
      .def(
          "ffn",
          [](PyProgram& p, Floats norm, py::object gate, py::object up, py::object down,
             Activation activation, float threshold, float scale, int32_t layer,
             py::object predictor) {
            Op op{OpKind::kFfn};
            op.activation = activation;
            op.threshold = threshold;
            op.scale = scale;
            op.layer = layer;
            if (!predictor.is_none()) {
              const PyPredictor& of = predictor.cast<const PyPredictor&>();
              Check(of.format == p.program.shape().format &&
                        of.n_neurons == gate.cast<const PyRows&>().rows.n_rows,
                    "predictor of another format or size");
              op.has_predictor = true;
              op.predictor = of.predictor;
              op.d = of.rows;
              p.keep_alive.append(predictor);
            }
            p.Add(op, {gate, up, down}, norm);
          },
          py::arg("norm"), py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("activation"),
          py::arg("threshold"), py::arg("scale"), py::arg("layer"),
          py::arg("predictor") = py::none())
      .def(
          "head",
          [](PyProgram& p, Floats norm, py::object head, float scale) {
            Op op{OpKind::kHead};
            op.scale = scale;
            p.Add(op, {head}, norm);
          },
          py::arg("norm"), py::arg("head"), py::arg("scale"))
      .def_property_readonly("max_context",
                             [](const PyProgram& p) { return p.program.shape().max_context; });

  py::class_<PySession>(m, "Session")
      .def(py::init<py::object, py::object, int32_t, bool, bool>(), py::arg("program"),
           py::arg("pool"), py::arg("n_context"), py::arg("is_dense") = false,
           py::arg("is_timed") = false)
      .def(
          "prefill",
          [](PySession& s, const Tokens& tokens, bool all_logits, std::optional<Bytes> masks,
             std::optional<Halves> inputs) -> py::object {
            Turn turn(s);
            Check(tokens.ndim() == 1 && tokens.shape(0) > 0, "tokens must be (n,), n > 0");
            // A copy, so that nobody can change what was checked.
            const std::vector<int64_t> given(tokens.data(), tokens.data() + tokens.shape(0));
            s.CheckTokens(given.data(), tokens.shape(0));
            const std::vector<int32_t> ids(given.begin(), given.end());
            const int32_t n = static_cast<int32_t>(ids.size());
            py::object logits = py::none();
            float* out = nullptr;
            if (all_logits) {
              Floats array({py::ssize_t{n}, py::ssize_t{s.program.vocab_size()}});
              out = array.mutable_data();
              logits = array;
            }
            Observation observation{};
            if (masks) observation = s.Observe(n, *masks, inputs);
            const Observation* observed = masks ? &observation : nullptr;
            WithoutGil([&] { s.session.Prefill(ids.data(), n, out, observed); });
            return logits;
          },
          py::arg("tokens"), py::arg("all_logits") = false,
          py::arg("masks").noconvert() = py::none(), py::arg("inputs").noconvert() = py::none())
      .def(
          "decode",
          [](PySession& s, int64_t token) {
            Turn turn(s);
            s.CheckTokens(&token, 1);
            WithoutGil([&] { s.session.Decode(static_cast<int32_t>(token)); });
          },
          py::arg("token"))
      .def(
          "truncate",
          [](PySession& s, int32_t position) {
            Turn turn(s);
            Check(position >= 0 && position <= s.session.position(),
                  "position is beyond the session's");
            s.session.Truncate(position);
          },
          py::arg("position"))
      // A view of the session's own memory: overwritten by the next call.
      .def_property_readonly("logits",
                             [](py::object self) {
                               const PySession& s = self.cast<const PySession&>();
                               const std::vector<py::ssize_t> shape = {s.program.vocab_size()};
                               Floats view(shape, s.session.logits(), self);
                               view.attr("flags").attr("writeable") = false;
                               return view;
                             })
      .def_property_readonly("position", [](const PySession& s) { return s.session.position(); })
      .def_property_readonly("n_context", [](const PySession& s) { return s.session.n_context(); })
      .def_property_readonly("active_counts",
                             [](const PySession& s) {
                               std::vector<int64_t> counts;
                               for (int32_t layer = 0; layer < s.program.n_layers(); ++layer)
                                 counts.push_back(s.session.active_count(layer));
                               return counts;
                             })
      .def_property_readonly("predicted_counts",
                             [](const PySession& s) {
                               std::vector<int64_t> counts;
                               for (int32_t layer = 0; layer < s.program.n_layers(); ++layer)
                                 counts.push_back(s.session.predicted_count(layer));
                               return counts;
                             })
      .def_property_readonly("decode_bytes",
                             [](PySession& s) {
                               Turn turn(s);
                               py::dict bytes;
                               for (int32_t stage = 0; stage < kStages; ++stage)
                                 bytes[kStageNames[stage]] =
                                     s.session.decode_bytes(static_cast<Stage>(stage));
                               return bytes;
                             })
      .def_property_readonly(
          "stage_seconds",
          [](PySession& s) {
            Turn turn(s);
            py::dict seconds;
            for (int32_t stage = 0; stage < kStages; ++stage)
              seconds[kStageNames[stage]] =
                  1e-9 *
                  static_cast<double>(s.session.stage_nanoseconds(static_cast<Stage>(stage)));
            seconds["waiting"] = 1e-9 * static_cast<double>(s.session.waiting_nanoseconds());
            return seconds;
          })
      .def("reset_counts", [](PySession& s) {
        Turn turn(s);
        s.session.ResetCounts();
      });
}

}  // namespace hybrid
