// What the bindings share. Only bindings/*.cpp know Python. They check every argument, so that the
// code below them need not.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "kernels/kernels.h"
#include "program.h"

namespace hybrid {

namespace py = pybind11;

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Halves = py::array_t<uint16_t, py::array::c_style>;

inline void Check(bool ok, const char* what) {
  if (!ok) throw py::value_error(what);
}

inline bool IsAligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Runs `compute`, which must not throw, without the GIL. At interpreter exit Python ends a thread
// that acquires the GIL by unwinding its stack. Here the unwinding passes through; the destructor
// of pybind11's own guard would abort the process.
template <typename Compute>
void WithoutGil(const Compute& compute) {
  PyThreadState* state = PyEval_SaveThread();
  compute();
  PyEval_RestoreThread(state);
}

// Packed rows within a NumPy array. The object keeps the array alive.
struct PyRows {
  // Without `row_stride`, the rows are interleaved, from byte `offset` of `memory` on. With
  // `row_stride` (bytes), they are row-major or bit-reversed: values from `offset` on, scales from
  // `scales_offset` on.
  PyRows(Format format, Bytes memory, int32_t n_rows, int32_t n_cols, int64_t offset,
         std::optional<int64_t> row_stride, int64_t scales_offset, bool is_bit_reversed);
  Format format;
  Rows rows;
  Bytes memory;
};

// A predictor of one layer within NumPy arrays. The object keeps the arrays alive.
struct PyPredictor {
  PyPredictor(Format format, int32_t n_neurons, Bytes tiles, const PyRows& first_matrix);
  // Of another engine's file: with a nonlinearity between two q8 matrices.
  PyPredictor(const PyRows& first_matrix, const PyRows& second_matrix, float threshold,
              PredictorInput input, std::optional<Floats> first_biases,
              std::optional<Floats> second_biases);
  // The predictor's inputs for (n, bytes) quantised vectors.
  std::vector<uint8_t> MakeInputs(Format x_format, const Bytes& x, int32_t n_cols) const;
  Format format;  // of the model's weights
  Predictor predictor;
  int32_t n_neurons;
  Rows rows;  // the first matrix: (rank, hidden)
  Format rows_format;
  PredictorInput input = PredictorInput::kNormed;
  const float* biases = nullptr;  // of the first matrix
  py::list keep_alive;
};

// A preview of the head within a NumPy array. The object keeps the array alive.
struct PyPreview {
  PyPreview(int32_t n_rows, int32_t n_cols, Bytes tiles);
  Preview preview;
  Bytes tiles;
};

void BindDevice(py::module_& m);
void BindKernels(py::module_& m);
void BindProgram(py::module_& m);
void BindSampling(py::module_& m);

}  // namespace hybrid
