// Thread pools, recorded programs and sessions.

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>

#include "bindings/session.h"
#include "kernels/dispatch.h"
#include "platform.h"

namespace hybrid {

namespace {

using Tokens = py::array_t<int64_t, py::array::c_style>;

// In a forked child the workers do not exist, so the pool can be neither joined nor destroyed
// there.
struct FreeInOwnProcess {
  void operator()(ThreadPool* pool) const {
    if (platform::ProcessId() == pool->process_id()) delete pool;
  }
};

constexpr int64_t kReadPiece = int64_t{1} << 18;  // floats: 1 MiB

// Reads all of `memory` once, in pieces for the pool's threads. Returns the sum of its floats.
double ReadMemory(ThreadPool& pool, const Floats& memory) {
  struct Context {
    const float* floats;
    int64_t n;
    const KernelTable* kernels;
    std::vector<double> sums;
  } context{memory.data(), memory.size() / 128 * 128, &ActiveKernels(), {}};
  Check(context.n > 0 && context.n / kReadPiece < (1 << 20),
        "memory must have from 128 floats to 1 TiB");
  context.sums.resize(static_cast<size_t>((context.n + kReadPiece - 1) / kReadPiece));
  Job job;
  job.context = &context;
  job.n_phases = 1;
  job.n_pieces = [](void* c, int32_t) {
    return static_cast<int32_t>(static_cast<Context*>(c)->sums.size());
  };
  job.is_dealt = [](void*, int32_t) { return false; };
  job.ahead = [](void*, int32_t, int32_t, int32_t) { return Ahead{}; };
  job.run_piece = [](void* c, int32_t, int32_t piece, int32_t) {
    Context& all = *static_cast<Context*>(c);
    const int64_t first = piece * kReadPiece, n = std::min(kReadPiece, all.n - first);
    all.sums[static_cast<size_t>(piece)] = all.kernels->read(all.floats + first, n);
  };
  WithoutGil([&] { pool.Run(job); });
  return std::accumulate(context.sums.begin(), context.sums.end(), 0.0);
}

// What a session's or a batch's passes counted.
template <typename Owner>
void BindCounts(py::class_<Owner>& owner) {
  owner
      .def_property_readonly("active_counts",
                             [](const Owner& o) { return o.runner().Count().n_active; })
      .def_property_readonly("predicted_counts",
                             [](const Owner& o) { return o.runner().Count().n_predicted; })
      .def_property_readonly("shortlisted_count",
                             [](const Owner& o) { return o.runner().Count().n_shortlisted; })
      .def_property_readonly("decode_bytes",
                             [](Owner& o) {
                               ExclusiveUse use(o);
                               const Counters counted = o.runner().Count();
                               py::dict bytes;
                               for (int32_t stage = 0; stage < kStages; ++stage)
                                 bytes[kStageNames[stage]] = counted.bytes[stage];
                               return bytes;
                             })
      .def_property_readonly(
          "stage_seconds",
          [](Owner& o) {
            ExclusiveUse use(o);
            const Counters counted = o.runner().Count();
            py::dict seconds;
            for (int32_t stage = 0; stage < kStages; ++stage)
              seconds[kStageNames[stage]] = 1e-9 * static_cast<double>(counted.nanoseconds[stage]);
            seconds["waiting"] = 1e-9 * static_cast<double>(o.runner().waiting_nanoseconds());
            return seconds;
          })
      .def("reset_counts", [](Owner& o) {
        ExclusiveUse use(o);
        o.runner().ResetCounts();
      });
}

}  // namespace

void BindProgram(py::module_& m) {
  py::class_<PyRows>(m, "Rows")
      .def(py::init<Format, Bytes, int32_t, int32_t, int64_t, std::optional<int64_t>, int64_t,
                    bool>(),
           py::kw_only(), py::arg("format"), py::arg("memory"), py::arg("n_rows"),
           py::arg("n_cols"), py::arg("offset") = 0, py::arg("row_stride") = py::none(),
           py::arg("scales_offset") = 0, py::arg("is_bit_reversed") = false)
      // The same rows in the same memory, with another matrix scale.
      .def(
          "scaled",
          [](const PyRows& r, float matrix_scale) {
            PyRows scaled = r;
            scaled.rows.matrix_scale = matrix_scale;
            return scaled;
          },
          py::arg("matrix_scale"))
      .def_property_readonly("n_rows", [](const PyRows& r) { return r.rows.n_rows; })
      .def_property_readonly("n_cols", [](const PyRows& r) { return r.rows.n_cols; })
      .def_property_readonly("matrix_scale", [](const PyRows& r) { return r.rows.matrix_scale; })
      .def_property_readonly("memory", [](const PyRows& r) { return r.memory; });

  py::class_<PyPredictor>(m, "Predictor")
      .def(py::init<Format, int32_t, Bytes, const PyRows&>(), py::kw_only(), py::arg("format"),
           py::arg("n_neurons"), py::arg("tiles"), py::arg("first_matrix"))
      .def(py::init<const PyRows&, const PyRows&, float, PredictorInput, std::optional<Floats>,
                    std::optional<Floats>>(),
           py::kw_only(), py::arg("first_matrix"), py::arg("second_matrix"), py::arg("threshold"),
           py::arg("input"), py::arg("first_biases") = py::none(),
           py::arg("second_biases") = py::none());

  py::class_<PyPreview>(m, "Preview")
      .def(py::init<int32_t, int32_t, Bytes>(), py::kw_only(), py::arg("n_rows"), py::arg("n_cols"),
           py::arg("tiles"))
      .def_property_readonly("n_bytes", [](const PyPreview& p) { return p.tiles.nbytes(); });

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
            Check(platform::ProcessId() == pool.process_id(),
                  "the thread pool was made before a fork; make a new one in this process");
            return ReadMemory(pool, memory);
          },
          py::arg("memory"));

  py::class_<PyProgram>(m, "Program")
      .def(py::init<Format, int32_t, int32_t, int32_t, int32_t, float, Floats, Floats,
                    std::optional<int32_t>, py::object>(),
           py::kw_only(), py::arg("format"), py::arg("hidden_size"), py::arg("n_heads"),
           py::arg("n_kv_heads"), py::arg("head_dim"), py::arg("rms_norm_eps"), py::arg("rope_cos"),
           py::arg("rope_sin"), py::arg("n_filled") = py::none(), py::arg("fill_rope") = py::none())
      .def(
          "embed",
          [](PyProgram& p, py::object embedding, float scale) {
            p.program.Add(Embed{p.TakeRows(embedding), scale});
          },
          py::arg("embedding"), py::arg("scale"))
      .def(
          "qkv",
          [](PyProgram& p, Floats norm, py::object qkv, int32_t layer,
             std::array<float, 3> matrix_scales) {
            p.program.Add(Qkv{p.TakeNorm(norm), p.TakeRows(qkv), layer, matrix_scales});
          },
          py::arg("norm"), py::arg("qkv"), py::arg("layer"),
          py::arg("matrix_scales") = std::array<float, 3>{1.0f, 1.0f, 1.0f})
      .def(
          "attend",
          [](PyProgram& p, py::object o, float scale, int32_t layer) {
            p.program.Add(Attend{p.TakeRows(o), scale, layer});
          },
          py::arg("o"), py::arg("scale"), py::arg("layer"))
      .def(
          "ffn",
          [](PyProgram& p, std::optional<Floats> norm, py::object gate, py::object up,
             py::object down, Activation activation, float threshold, float scale, int32_t layer,
             py::object predictor, int32_t first_neuron, int32_t n_given) {
            Ffn op{};
            op.gate = p.TakeRows(gate);
            op.up = p.TakeRows(up);
            op.down = p.TakeRows(down);
            op.activation = activation;
            op.threshold = threshold;
            op.scale = scale;
            op.layer = layer;
            if (norm) {
              op.norm = p.TakeNorm(*norm);
              Check(first_neuron == 0 && n_given == 0, "a split FFN must have no norm");
            } else {
              op.split = FfnSplit{first_neuron, n_given};
            }
            if (!predictor.is_none()) {
              const PyPredictor& of = predictor.cast<const PyPredictor&>();
              Check((IsMlp(of.predictor) || of.format == p.program.shape().format) &&
                        of.n_neurons == op.n_neurons(),
                    "the predictor must have the program's format and one score per gate row");
              op.predictor =
                  FfnPredictor{of.rows, of.rows_format, of.predictor, of.input, of.biases};
              p.keep_alive.append(predictor);
            }
            p.program.Add(op);
          },
          py::arg("norm"), py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("activation"),
          py::arg("threshold"), py::arg("scale"), py::arg("layer"),
          py::arg("predictor") = py::none(), py::arg("first_neuron") = 0, py::arg("n_given") = 0)
      .def(
          "end_segment", [](PyProgram& p, bool sends_x) { p.program.EndSegment(sends_x); },
          py::kw_only(), py::arg("sends_x"))
      .def("seal", [](PyProgram& p) { p.program.Seal(); })
      .def("receive_x", [](PyProgram& p) { p.program.ReceiveX(); })
      .def_property_readonly("n_segments",
                             [](const PyProgram& p) { return p.program.segments().size(); })
      .def(
          "head",
          [](PyProgram& p, Floats norm, py::object head, float scale, py::object preview) {
            Head op{p.TakeNorm(norm), p.TakeRows(head), scale, std::nullopt};
            if (!preview.is_none()) {
              op.preview = preview.cast<const PyPreview&>().preview;
              p.keep_alive.append(preview);
            }
            p.program.Add(op);
          },
          py::arg("norm"), py::arg("head"), py::arg("scale"), py::arg("preview") = py::none())
      .def_property_readonly("max_context",
                             [](const PyProgram& p) { return p.program.shape().max_context; });

  py::class_<PySession> session(m, "Session");
  session
      .def(py::init<py::object, py::object, int32_t, bool, bool, KvFormat>(), py::arg("program"),
           py::arg("pool"), py::arg("n_context"), py::arg("is_dense") = false,
           py::arg("is_timed") = false, py::arg("kv") = KvFormat::kFp16)
      .def(
          "prefill",
          [](PySession& s, const Tokens& tokens, bool all_logits, std::optional<Bytes> masks,
             std::optional<Halves> inputs) -> py::object {
            ExclusiveUse use(s);
            s.CheckAlone();
            Check(tokens.ndim() == 1 && tokens.shape(0) > 0, "tokens must be (n,), n > 0");
            // Copy the tokens, so that no other thread can change them after the check.
            const std::vector<int64_t> given(tokens.data(), tokens.data() + tokens.shape(0));
            s.Admit(given.data(), tokens.shape(0));
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
            ExclusiveUse use(s);
            s.CheckAlone();
            s.Admit(&token, 1);
            WithoutGil([&] { s.session.Decode(static_cast<int32_t>(token)); });
          },
          py::arg("token"))
      .def(
          "begin",
          [](PySession& s, const Tokens& tokens, bool is_decode, std::optional<Floats> logits) {
            ExclusiveUse use(s);
            s.CheckExchange();
            Check(tokens.ndim() == 1 && tokens.shape(0) > 0 && tokens.shape(0) <= kPrefillChunk,
                  "tokens must be (n,), n from 1 to PREFILL_CHUNK");
            Check(!is_decode || tokens.shape(0) == 1, "decode takes exactly one token");
            const std::vector<int32_t> ids(tokens.data(), tokens.data() + tokens.shape(0));
            s.Admit(tokens.data(), tokens.shape(0));
            float* out = nullptr;
            if (logits) {
              Check(logits->ndim() == 2 && logits->shape(0) == tokens.shape(0) &&
                        logits->shape(1) == s.program.vocab_size(),
                    "logits must be (n, vocab_size)");
              out = logits->mutable_data();
            }
            s.session.Begin(ids.data(), static_cast<int32_t>(ids.size()), is_decode, out);
            s.keep_logits = logits ? py::object(*logits) : py::none();
            s.next_segment = 0;
          },
          py::arg("tokens"), py::kw_only(), py::arg("is_decode"),
          py::arg("logits").noconvert() = py::none())
      .def(
          "run_segment",
          [](PySession& s, int32_t segment) {
            ExclusiveUse use(s);
            Check(segment == s.next_segment &&
                      segment < static_cast<int32_t>(s.program.segments().size()),
                  "segments must run in order, after begin");
            WithoutGil([&] { s.session.RunSegment(segment); });
            ++s.next_segment;
          },
          py::arg("segment"))
      .def("end",
           [](PySession& s) {
             ExclusiveUse use(s);
             Check(s.next_segment == static_cast<int32_t>(s.program.segments().size()),
                   "end was called before all segments have run");
             s.session.End();
             s.next_segment = -1;
           })
      .def(
          "truncate",
          [](PySession& s, int32_t position) {
            ExclusiveUse use(s);
            Check(position >= 0 && position <= s.session.position(),
                  "position is negative or beyond the session's position");
            s.session.Truncate(position);
          },
          py::arg("position"))
      .def(
          "copy_prefix",
          [](PySession& s, PySession& source, int32_t n) {
            const ExclusiveUse use(s), use_source(source);
            s.CheckAlone();
            Check(&s.program == &source.program && s.session.kv() == source.session.kv(),
                  "the sessions must have one program, and one format of the KV cache");
            Check(n >= 0 && n <= source.session.position() && n <= s.session.n_context(),
                  "n is negative, or beyond the source's position or the context");
            WithoutGil([&] { s.session.kv_cache().CopyPrefix(source.session.kv_cache(), n); });
            s.session.Truncate(n);
          },
          py::arg("source"), py::arg("n"))
      // Keys and values as (n, n_layers, n_kv_heads, 2, head_dim), key before value.
      .def(
          "read_kv",
          [](PySession& s, int32_t first, int32_t last) {
            const ExclusiveUse use(s);
            s.CheckAlone();
            Check(first >= 0 && first <= last && last <= s.session.position(),
                  "first and last must be positions of the session, in order");
            Halves array(s.KvShape(last - first));
            uint16_t* out = array.mutable_data();
            const int32_t head_dim = s.program.shape().head_dim;
            WithoutGil([&] { s.session.kv_cache().Read(first, last, head_dim, out); });
            return array;
          },
          py::arg("first"), py::arg("last"))
      .def(
          "append_kv",
          [](PySession& s, const Halves& array) {
            const ExclusiveUse use(s);
            s.CheckAlone();
            const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
            Check(!shape.empty() && shape == s.KvShape(shape[0]),
                  "keys and values must be (n, n_layers, n_kv_heads, 2, head_dim)");
            const int32_t first = s.session.position();
            Check(shape[0] <= s.session.n_context() - first, "the context is full");
            const int32_t last = first + static_cast<int32_t>(shape[0]);
            const uint16_t* in = array.data();
            const int32_t head_dim = s.program.shape().head_dim;
            WithoutGil([&] { s.session.kv_cache().Write(first, last, head_dim, in); });
            s.session.Truncate(last);
          },
          py::arg("array").noconvert())
      // A view of the session's own memory. The next call overwrites it.
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
      .def_property_readonly("kv", [](const PySession& s) { return s.session.kv(); })
      .def_property_readonly("largest_kv",
                             [](const PySession& s) { return s.session.largest_kv(); });
  BindCounts(session);

  py::class_<PyBatch> batch(m, "Batch");
  batch
      .def(py::init<py::object, py::object, int32_t, bool>(), py::arg("program"), py::arg("pool"),
           py::arg("n_context"), py::arg("is_timed") = false)
      // Appends tokens to sessions, in one pass. wants_logits[i] says whether session i's logits
      // must become those of its last token.
      .def(
          "run",
          [](PyBatch& b, const std::vector<py::object>& sessions,
             const std::vector<std::vector<int64_t>>& tokens,
             const std::vector<bool>& wants_logits) { b.Run(sessions, tokens, wants_logits); },
          py::arg("sessions"), py::arg("tokens"), py::arg("wants_logits"));
  BindCounts(batch);
}

}  // namespace hybrid
