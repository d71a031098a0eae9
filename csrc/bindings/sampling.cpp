#include "sampling.h"

#include <math.h>

#include "bindings/bindings.h"
#include "kernels/dispatch.h"

namespace hybrid {

void BindSampling(py::module_& m) {
  py::class_<Sampler>(m, "Sampler")
      .def(py::init<>())
      .def(
          "draw",
          [](Sampler& sampler, const Floats& logits, float top, float temperature, double top_p,
             float min_p, double uniform) {
            Check(logits.ndim() == 1 && logits.size() > 0 && logits.size() <= INT32_MAX,
                  "logits must be (vocab,)");
            Check(isfinite(top) && temperature > 0.0f && isfinite(1.0f / temperature),
                  "top must be finite, and temperature above 0");
            Check(top_p >= 0.0 && min_p >= 0.0f && min_p <= 1.0f && uniform >= 0.0 && uniform < 1.0,
                  "top_p, min_p and uniform must be from 0 to 1");
            const Distribution distribution = {
                logits.data(), static_cast<int32_t>(logits.size()), top, temperature, top_p, min_p};
            sampler.Reserve(distribution.n);
            int32_t drawn = 0;
            WithoutGil([&] { drawn = sampler.Draw(ActiveKernels(), distribution, uniform); });
            return drawn;
          },
          py::arg("logits"), py::arg("top"), py::arg("temperature"), py::arg("top_p"),
          py::arg("min_p"), py::arg("uniform"));
  m.def(
      "log_sum_exp",
      [](const Floats& logits, float top) {
        Check(logits.ndim() == 1 && logits.size() > 0 && logits.size() <= INT32_MAX,
              "logits must be (vocab,)");
        Check(isfinite(top), "top must be finite");
        const float* data = logits.data();
        const auto n = static_cast<int32_t>(logits.size());
        double sum = 0.0;
        WithoutGil([&] { sum = LogSumExp(ActiveKernels(), data, n, top); });
        return sum;
      },
      py::arg("logits"), py::arg("top"));
}

}  // namespace hybrid
