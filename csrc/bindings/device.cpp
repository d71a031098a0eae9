// The CUDA driver and the link between its streams and a session.

#include <string>

#include "bindings/session.h"
#include "device/device_link.h"

namespace hybrid {

namespace {

// The CUDA driver, held by Python. Its library stays open as long as this object lives.
struct PyDriver {
  explicit PyDriver(const std::string& library) : driver(library) {}
  CudaDriver driver;
};

[[noreturn]] void ThrowCuda(const CudaDriver& driver, int error, const char* what) {
  throw std::runtime_error(std::string(what) + ": " + driver.ErrorName(error));
}

float* Rows2(Floats& array, py::ssize_t n, py::ssize_t width, const char* what) {
  Check(array.ndim() == 2 && array.shape(0) == n && array.shape(1) == width, what);
  return array.mutable_data();
}

// A link and the arrays that it works in.
struct PyLink {
  PyLink(Bytes flags, int32_t n_slots, Floats x, Floats h, Floats gates, Floats y,
         double patience_s)
      : flags(flags),
        x(x),
        h(h),
        gates(gates),
        y(y),
        link(CheckFlags(this->flags, n_slots), n_slots, MakeExchange(),
             static_cast<int32_t>(x.shape(1)), static_cast<int32_t>(x.shape(0)),
             CheckPatience(patience_s)) {}

  static uint8_t* CheckFlags(Bytes& flags, int32_t n_slots) {
    Check(n_slots > 0 && n_slots < (1 << 16), "n_slots must be from 1 to 65535");
    Check(flags.size() >= DeviceLink::FlagBytes(n_slots),
          "flags are too short: each slot needs 128 bytes");
    Check(IsAligned(flags.data(), kFlagStride), "flags must begin at a multiple of 64 bytes");
    return flags.mutable_data();
  }
  static double CheckPatience(double seconds) {
    Check(seconds > 0 && seconds < 3600, "patience_s must be positive and below 3600");
    return seconds;
  }
  Exchange MakeExchange() {
    Check(x.ndim() == 2 && x.shape(0) > 0 && gates.ndim() == 2, "x must be (tokens, hidden)");
    const py::ssize_t n = x.shape(0), hidden = x.shape(1);
    return {x.mutable_data(), Rows2(h, n, hidden, "h must be (tokens, hidden)"),
            Rows2(gates, n, gates.shape(1), "gates must be (tokens, n_neurons)"),
            Rows2(y, n, hidden, "y must be (tokens, hidden)"),
            static_cast<int32_t>(gates.shape(1))};
  }
  void CheckSlot(int32_t slot) const {
    Check(slot >= 0 && slot < link.n_slots(), "there is no such slot");
  }

  Bytes flags;
  Floats x, h, gates, y;
  DeviceLink link;
};

}  // namespace

void BindDevice(py::module_& m) {
  m.attr("FLAG_BYTES") = DeviceLink::FlagBytes(1);

  py::class_<PyDriver>(m, "CudaDriver")
      .def(py::init<const std::string&>(), py::arg("library") = "libcuda.so.1")
      .def_property_readonly("version", [](const PyDriver& d) { return d.driver.version(); })
      .def_property_readonly("has_memory_operations",
                             [](const PyDriver& d) { return d.driver.has_memory_operations(); });

  py::class_<PyLink>(m, "DeviceLink")
      .def(py::init<Bytes, int32_t, Floats, Floats, Floats, Floats, double>(), py::kw_only(),
           py::arg("flags").noconvert(), py::arg("n_slots"), py::arg("x").noconvert(),
           py::arg("h").noconvert(), py::arg("gates").noconvert(), py::arg("y").noconvert(),
           py::arg("patience_s") = 2.0)
      .def_property_readonly("n_slots", [](const PyLink& l) { return l.link.n_slots(); })
      .def_property_readonly("error",
                             [](const PyLink& l) { return static_cast<int32_t>(l.link.error()); })
      .def("arm", [](PyLink& l) { l.link.Arm(); })
      .def("abandon", [](PyLink& l) { l.link.Abandon(DeviceLink::Error::kAbandoned); })
      .def(
          "request",
          [](PyLink& l, int32_t slot) {
            l.CheckSlot(slot);
            l.link.Request(slot);
          },
          py::arg("slot"))
      .def(
          "await_answer",
          [](PyLink& l, int32_t slot) {
            l.CheckSlot(slot);
            WithoutGil([&] { l.link.AwaitAnswer(slot); });
          },
          py::arg("slot"))
      .def(
          "enqueue_request",
          [](PyLink& l, const PyDriver& driver, uint64_t stream, int32_t slot, bool by_host) {
            l.CheckSlot(slot);
            Check(by_host || driver.driver.has_memory_operations(),
                  "this driver has no memory operations: use by_host=True");
            int error = 0;
            WithoutGil(
                [&] { error = l.link.EnqueueRequest(driver.driver, stream, slot, by_host); });
            if (error != 0) ThrowCuda(driver.driver, error, "enqueueing a request");
          },
          py::arg("driver"), py::arg("stream"), py::arg("slot"), py::arg("by_host"))
      .def(
          "enqueue_wait",
          [](PyLink& l, const PyDriver& driver, uint64_t stream, int32_t slot, bool by_host) {
            l.CheckSlot(slot);
            Check(by_host || driver.driver.has_memory_operations(),
                  "this driver has no memory operations: use by_host=True");
            int error = 0;
            WithoutGil([&] { error = l.link.EnqueueWait(driver.driver, stream, slot, by_host); });
            if (error != 0) ThrowCuda(driver.driver, error, "enqueueing a wait");
          },
          py::arg("driver"), py::arg("stream"), py::arg("slot"), py::arg("by_host"))
      // Answers all slots of one token with the session's segments. Returns false if the link
      // failed.
      .def(
          "serve",
          [](PyLink& l, PySession& s, int64_t token) {
            ExclusiveUse use(s);
            s.Admit(&token, 1);
            Check(l.link.n_slots() == static_cast<int32_t>(s.program.segments().size()),
                  "the link must have one slot for every segment");
            Check(s.session.runner().exchange().x == l.link.exchange().x,
                  "the session is connected to another link: call meet first");
            bool is_served = false;
            WithoutGil([&] {
              const int32_t id = static_cast<int32_t>(token);
              s.session.Begin(&id, 1, true, nullptr);
              is_served = l.link.Serve(s.session);
              if (is_served) s.session.End();
            });
            return is_served;
          },
          py::arg("session"), py::arg("token"));

  m.def(
      "meet",
      [](py::object session, py::object link) {
        PySession& s = session.cast<PySession&>();
        const Exchange& exchange = link.cast<PyLink&>().link.exchange();
        ExclusiveUse use(s);
        const PyLink& l = link.cast<const PyLink&>();
        Check(l.x.shape(0) >= kPrefillChunk,
              "the link's arrays must have at least PREFILL_CHUNK rows");
        Check(l.x.shape(1) == s.program.shape().hidden_size,
              "the link's x must have hidden_size columns");
        Check(exchange.n_neurons >= s.program.n_neurons(),
              "the link's gates must have at least n_neurons columns");
        s.session.runner().SetExchange(exchange);
        s.keep_link = link;
      },
      py::arg("session"), py::arg("link"));
}

}  // namespace hybrid
