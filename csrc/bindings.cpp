// The only file that knows Python. Arguments are checked here; below it only assertions remain.
// Every call that computes releases the GIL.

#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "kernels/dispatch.h"
#include "platform.h"
#include "program.h"
#include "session.h"

namespace py = pybind11;
using hybrid::Activation;
using hybrid::Format;
using hybrid::Op;
using hybrid::OpKind;

namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Halves = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;
using Tokens = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

void Check(bool ok, const char* what) {
  if (!ok) throw py::value_error(what);
}

// Packed rows within NumPy arrays, which it keeps alive.
struct PyRows {
  PyRows(Format format, Bytes values, std::optional<Bytes> scales, int32_t n_rows, int32_t n_cols,
         int64_t values_stride, int64_t scales_stride, int64_t values_offset, int64_t scales_offset)
      : format(format), values_array(values), scales_array(std::move(scales)) {
    const int64_t padded = hybrid::PaddedCols(format, n_cols);
    const int64_t row_bytes = format == Format::kBf16 ? 2 * padded : padded;
    Check(n_rows > 0 && n_cols > 0, "rows and columns must be positive");
    Check(values_stride >= row_bytes && values_offset >= 0, "rows overlap");
    Check(values_offset + (n_rows - 1) * values_stride + row_bytes <= values.nbytes(),
          "rows beyond the array");
    rows = {values.data() + values_offset, nullptr, values_stride, scales_stride, n_rows, n_cols};
    if (format == Format::kQ8) {
      const int64_t scale_bytes = padded / hybrid::kBlock * 2;
      Check(scales_array.has_value(), "q8 rows need scales");
      Check(scales_stride >= scale_bytes && scales_offset >= 0, "scales overlap");
      Check(scales_offset + (n_rows - 1) * scales_stride + scale_bytes <= scales_array->nbytes(),
            "scales beyond the array");
      rows.scales = scales_array->data() + scales_offset;
    }
  }
  Format format;
  hybrid::Rows rows;
  Bytes values_array;
  std::optional<Bytes> scales_array;
};

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
    hybrid::Rows* slots[] = {&op.a, &op.b, &op.c};
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
  hybrid::Program program;
  py::list keep_alive;
};

struct PySession {
  PySession(py::object program, py::object pool, int32_t n_context)
      : program(program.cast<PyProgram&>().program),
        session(this->program, pool.cast<hybrid::ThreadPool&>(),
                CheckContext(this->program, n_context)),
        keep_program(program),
        keep_pool(pool) {}
  static int32_t CheckContext(const hybrid::Program& program, int32_t n_context) {
    Check(n_context > 0 && n_context <= program.shape().max_context,
          "context must be within the rope tables");
    return n_context;
  }
  void CheckTokens(const int32_t* tokens, int64_t n) const {
    Check(session.position() + n <= session.n_context(), "the context is full");
    for (int64_t i = 0; i < n; ++i)
      Check(tokens[i] >= 0 && tokens[i] < program.vocab_size(), "token beyond the vocabulary");
  }
  const hybrid::Program& program;
  hybrid::Session session;
  py::object keep_program, keep_pool;
};

Bytes AllocateBytes(int64_t n_bytes) {
  Check(n_bytes > 0, "n_bytes must be positive");
  const size_t size = static_cast<size_t>(n_bytes);
  struct Allocation {
    void* pages;
    size_t size;
  };
  auto* allocation = new Allocation{hybrid::platform::AllocatePages(size, true), size};
  py::capsule owner(allocation, [](void* p) {
    auto* a = static_cast<Allocation*>(p);
    hybrid::platform::FreePages(a->pages, a->size);
    delete a;
  });
  return Bytes({n_bytes}, {int64_t{1}}, static_cast<uint8_t*>(allocation->pages), owner);
}

void BindKernels(py::module_& m) {
  m.def("available_isas", &hybrid::AvailableIsas);
  m.def("active_isa", [] { return std::string(hybrid::ActiveKernels().name); });
  m.def("set_isa", &hybrid::SetIsa, py::arg("name"));
  m.def("set_best_isa", &hybrid::SetBestIsa, py::arg("cap"));
  m.def("allocate_bytes", &AllocateBytes, py::arg("n_bytes"));
  m.def("padded_cols", &hybrid::PaddedCols, py::arg("format"), py::arg("n_cols"));

  m.def(
      "quantize",
      [](Format format, const Floats& x) {
        Check(x.ndim() == 1 && x.shape(0) > 0, "x must be (n,)");
        const int32_t n = static_cast<int32_t>(x.shape(0));
        Bytes out(hybrid::VectorBytes(format, n));
        hybrid::ActiveKernels().quantize(format, x.data(), n, out.mutable_data());
        return out;
      },
      py::arg("format"), py::arg("x"));
  m.def(
      "dequantize",
      [](const PyRows& rows, int32_t row, float scale) {
        Check(row >= 0 && row < rows.rows.n_rows, "row out of range");
        Floats out(rows.rows.n_cols);
        hybrid::ActiveKernels().dequantize(rows.format, rows.rows, row, scale, out.mutable_data());
        return out;
      },
      py::arg("rows"), py::arg("row"), py::arg("scale") = 1.0f);
  m.def(
      "gemm",
      [](const PyRows& rows, const Bytes& x, int32_t first, int32_t last) {
        Check(0 <= first && first <= last && last <= rows.rows.n_rows, "row range");
        Check(x.ndim() == 2 && x.shape(1) == hybrid::VectorBytes(rows.format, rows.rows.n_cols),
              "x must be quantised vectors");
        Floats out({x.shape(0), py::ssize_t{last - first}});
        const hybrid::GemmArgs args = {rows.format,
                                       rows.rows,
                                       first,
                                       last,
                                       x.data(),
                                       x.shape(1),
                                       static_cast<int32_t>(x.shape(0)),
                                       out.mutable_data(),
                                       last - first};
        py::gil_scoped_release release;
        hybrid::ActiveKernels().gemm(args);
        return out;
      },
      py::arg("rows"), py::arg("x"), py::arg("first"), py::arg("last"));
  m.def(
      "sparse_ffn",
      [](const PyRows& gate, const PyRows& up, const PyRows& down, const Bytes& x, int32_t first,
         int32_t last, Activation activation, float threshold) {
        const Format format = gate.format;
        Check(0 <= first && first <= last && last <= gate.rows.n_rows, "neuron range");
        Check(up.format == format && down.format == format, "formats differ");
        Check(up.rows.n_rows == gate.rows.n_rows && down.rows.n_rows == gate.rows.n_rows,
              "neurons differ");
        Check(up.rows.n_cols == gate.rows.n_cols, "gate and up widths differ");
        Check(x.ndim() == 2 && x.shape(0) <= hybrid::kTokenTile, "at most kTokenTile tokens");
        Check(x.shape(1) == hybrid::VectorBytes(format, gate.rows.n_cols),
              "x must be quantised vectors");
        const int64_t padded = hybrid::PaddedCols(format, down.rows.n_cols);
        Floats out({x.shape(0), static_cast<py::ssize_t>(padded)});
        const hybrid::SparseFfnArgs args = {format,
                                            gate.rows,
                                            up.rows,
                                            down.rows,
                                            first,
                                            last,
                                            activation,
                                            threshold,
                                            x.data(),
                                            x.shape(1),
                                            static_cast<int32_t>(x.shape(0)),
                                            out.mutable_data(),
                                            padded};
        int64_t n_active;
        {
          py::gil_scoped_release release;
          n_active = hybrid::ActiveKernels().sparse_ffn(args);
        }
        return py::make_tuple(out, n_active);
      },
      py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("x"), py::arg("first"),
      py::arg("last"), py::arg("activation"), py::arg("threshold"));
  m.def(
      "add_partials",
      [](Format format, const Floats& partials, float scale, const Floats& x) {
        Check(partials.ndim() == 2 && x.ndim() == 1, "partials must be (pieces, padded), x (n,)");
        const int32_t n = static_cast<int32_t>(x.shape(0));
        Check(partials.shape(0) > 0 && partials.shape(1) == hybrid::PaddedCols(format, n),
              "partials must be padded");
        Floats out(n);
        std::copy(x.data(), x.data() + n, out.mutable_data());
        hybrid::ActiveKernels().add_partials(format, partials.data(), partials.shape(1),
                                             static_cast<int32_t>(partials.shape(0)), 0, n, scale,
                                             out.mutable_data());
        return out;
      },
      py::arg("format"), py::arg("partials"), py::arg("scale"), py::arg("x"));
  m.def(
      "rms_norm",
      [](const Floats& x, const Floats& weight, float eps, float scale) {
        Check(x.ndim() == 1 && weight.ndim() == 1 && x.shape(0) == weight.shape(0),
              "x and weight must be (n,)");
        Floats out(x.shape(0));
        hybrid::ActiveKernels().rms_norm(x.data(), weight.data(), static_cast<int32_t>(x.shape(0)),
                                         eps, scale, out.mutable_data());
        return out;
      },
      py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("scale"));
  m.def(
      "attend_span",
      [](const Floats& q, const Halves& k, const Halves& v, int32_t first, int32_t last) {
        Check(q.ndim() == 2 && k.ndim() == 2 && v.ndim() == 2, "q, k and v must be matrices");
        Check(q.shape(1) % hybrid::kHeadAlign == 0 && k.shape(1) == q.shape(1) &&
                  v.shape(1) == q.shape(1),
              "head_stride");
        Check(0 <= first && first < last && last <= k.shape(0) && last <= v.shape(0) &&
                  last - first <= hybrid::kSpan,
              "span");
        Floats max(q.shape(0)), sum(q.shape(0)), out({q.shape(0), q.shape(1)});
        float scores[hybrid::kSpan];
        hybrid::ActiveKernels().attend_span(
            {q.data(), k.data(), v.data(), static_cast<int32_t>(q.shape(0)),
             static_cast<int32_t>(q.shape(1)), first, last, scores, max.mutable_data(),
             sum.mutable_data(), out.mutable_data()});
        return py::make_tuple(max, sum, out);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("first"), py::arg("last"));
  m.def(
      "to_fp16",
      [](const Floats& x) {
        Halves out(x.size());
        hybrid::ActiveKernels().to_fp16(x.data(), static_cast<int32_t>(x.size()),
                                        out.mutable_data());
        return out;
      },
      py::arg("x"));
}

void BindProgram(py::module_& m) {
  py::class_<PyRows>(m, "Rows")
      .def(py::init<Format, Bytes, std::optional<Bytes>, int32_t, int32_t, int64_t, int64_t,
                    int64_t, int64_t>(),
           py::kw_only(), py::arg("format"), py::arg("values"), py::arg("scales"),
           py::arg("n_rows"), py::arg("n_cols"), py::arg("values_stride"),
           py::arg("scales_stride") = 0, py::arg("values_offset") = 0, py::arg("scales_offset") = 0)
      .def_property_readonly("n_rows", [](const PyRows& r) { return r.rows.n_rows; })
      .def_property_readonly("n_cols", [](const PyRows& r) { return r.rows.n_cols; });

  py::class_<hybrid::ThreadPool>(m, "ThreadPool")
      .def(py::init<int32_t>(), py::arg("n_threads"))
      .def_property_readonly("n_threads", &hybrid::ThreadPool::n_threads);

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
             Activation activation, float threshold, float scale, int32_t layer) {
            Op op{OpKind::kFfn};
            op.activation = activation;
            op.threshold = threshold;
            op.scale = scale;
            op.layer = layer;
            p.Add(op, {gate, up, down}, norm);
          },
          py::arg("norm"), py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("activation"),
          py::arg("threshold"), py::arg("scale"), py::arg("layer"))
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
      .def(py::init<py::object, py::object, int32_t>(), py::arg("program"), py::arg("pool"),
           py::arg("n_context"))
      .def(
          "prefill",
          [](PySession& s, const Tokens& tokens, bool all_logits) -> py::object {
            Check(tokens.ndim() == 1 && tokens.shape(0) > 0, "tokens must be (n,), n > 0");
            const int32_t n = static_cast<int32_t>(tokens.shape(0));
            s.CheckTokens(tokens.data(), n);
            py::object logits = py::none();
            float* out = nullptr;
            if (all_logits) {
              Floats array({py::ssize_t{n}, py::ssize_t{s.program.vocab_size()}});
              out = array.mutable_data();
              logits = array;
            }
            py::gil_scoped_release release;
            s.session.Prefill(tokens.data(), n, out);
            return logits;
          },
          py::arg("tokens"), py::arg("all_logits") = false)
      .def(
          "decode",
          [](PySession& s, int32_t token) {
            s.CheckTokens(&token, 1);
            py::gil_scoped_release release;
            s.session.Decode(token);
          },
          py::arg("token"))
      .def(
          "truncate",
          [](PySession& s, int32_t position) {
            Check(position >= 0 && position <= s.session.position(),
                  "position is beyond the session's");
            s.session.Truncate(position);
          },
          py::arg("position"))
      // A view of the session's own memory: overwritten by the next call.
      .def_property_readonly("logits",
                             [](py::object self) {
                               const PySession& s = self.cast<const PySession&>();
                               Floats view({py::ssize_t{s.program.vocab_size()}},
                                           s.session.logits(), self);
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
      .def("reset_active_counts", [](PySession& s) { s.session.ResetActiveCounts(); });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled half of hybrid: kernels, thread pool, recorded programs.";
  py::native_enum<Format>(m, "Format", "enum.Enum")
      .value("bf16", Format::kBf16)
      .value("q8", Format::kQ8)
      .finalize();
  py::native_enum<Activation>(m, "Activation", "enum.Enum")
      .value("relu", Activation::kRelu)
      .value("fatrelu", Activation::kFatRelu)
      .value("silu", Activation::kSilu)
      .finalize();
  m.attr("BLOCK") = hybrid::kBlock;
  m.attr("GROUP") = hybrid::kGroup;
  m.attr("SPAN") = hybrid::kSpan;
  m.attr("PREFILL_CHUNK") = hybrid::kPrefillChunk;
  BindKernels(m);
  BindProgram(m);
}
