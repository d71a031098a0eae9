// The Python module: enumerations, constants, and what the other bindings/*.cpp add.

#include <pybind11/native_enum.h>

#include "bindings/bindings.h"
#include "session/session.h"

namespace py = pybind11;
using hybrid::Activation;
using hybrid::Format;
using hybrid::KvFormat;
using hybrid::PredictorInput;

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled half of hybrid: kernels, thread pool, recorded programs.";
  py::native_enum<Format>(m, "Format", "enum.Enum")
      .value("bf16", Format::kBf16)
      .value("q8", Format::kQ8)
      .value("q4", Format::kQ4)
      .value("f16", Format::kF16)
      .finalize();
  py::native_enum<Activation>(m, "Activation", "enum.Enum")
      .value("relu", Activation::kRelu)
      .value("fatrelu", Activation::kFatRelu)
      .value("silu", Activation::kSilu)
      .finalize();
  py::native_enum<KvFormat>(m, "KvFormat", "enum.Enum")
      .value("fp16", KvFormat::kFp16)
      .value("bf16", KvFormat::kBf16)
      .finalize();
  py::native_enum<PredictorInput>(m, "PredictorInput", "enum.Enum")
      .value("normed", PredictorInput::kNormed)
      .value("residual", PredictorInput::kResidual)
      .value("previous", PredictorInput::kPrevious)
      .finalize();
  m.attr("BLOCK") = hybrid::kBlock;
  m.attr("GROUP") = hybrid::kGroup;
  m.attr("ROW_TILE") = hybrid::kRowTile;
  m.attr("SPAN") = hybrid::kSpan;
  m.attr("KEY_TILE") = hybrid::kKeyTile;
  m.attr("PREFILL_CHUNK") = hybrid::kPrefillChunk;
  m.attr("PREDICT_TILE") = hybrid::kPredictTile;
  hybrid::BindKernels(m);
  hybrid::BindProgram(m);
  hybrid::BindSampling(m);
  hybrid::BindDevice(m);
}
