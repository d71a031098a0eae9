// Single kernels, for tests and benchmarks, and memory for packed weights.

#include <errno.h>

#include <algorithm>
#include <vector>

#include "bindings/bindings.h"
#include "checksum.h"
#include "kernels/dispatch.h"
#include "platform.h"

namespace hybrid {

namespace {

constexpr int32_t kMaxCols = 1 << 24;  // so that no product of sizes overflows

struct Allocation {
  void* pages;
  size_t size;
};

template <void kFree(Allocation)>
Bytes OwnedBytes(Allocation allocation) {
  py::capsule owner(new Allocation(allocation), [](void* p) {
    auto* a = static_cast<Allocation*>(p);
    kFree(*a);
    delete a;
  });
  return Bytes({static_cast<py::ssize_t>(allocation.size)}, {py::ssize_t{1}},
               static_cast<uint8_t*>(allocation.pages), owner);
}

void FreeAllocation(Allocation a) { platform::FreePages(a.pages, a.size); }
void UnmapAllocation(Allocation a) { platform::UnmapFile(a.pages, a.size); }

Bytes AllocateBytes(int64_t n_bytes) {
  Check(n_bytes > 0, "n_bytes must be positive");
  const size_t size = static_cast<size_t>(n_bytes);
  return OwnedBytes<FreeAllocation>({platform::AllocatePages(size, true), size});
}

[[noreturn]] void ThrowOsError(int error) {
  errno = error;
  PyErr_SetFromErrno(PyExc_OSError);
  throw py::error_already_set();
}

Bytes MapFile(int file, int64_t n_bytes) {
  Check(n_bytes > 0, "n_bytes must be positive");
  const size_t size = static_cast<size_t>(n_bytes);
  const void* mapped = platform::MapFile(file, size);
  if (mapped == nullptr) ThrowOsError(errno);
  Bytes bytes = OwnedBytes<UnmapAllocation>({const_cast<void*>(mapped), size});
  bytes.attr("flags").attr("writeable") = false;
  return bytes;
}

void MoveIntoMemory(const Bytes& mapped, int64_t first, int64_t n_bytes, int file) {
  Check(first >= 0 && first % (int64_t{2} << 20) == 0 && n_bytes > 0 &&
            n_bytes <= mapped.nbytes() - first,
        "the bytes must be part of the mapping and begin at a huge page (2 MiB)");
  int error = 0;
  WithoutGil([&] {
    error = platform::MoveIntoMemory(mapped.data(), static_cast<size_t>(first),
                                     static_cast<size_t>(n_bytes), file);
  });
  if (error != 0) ThrowOsError(error);
}

// (n_rows, n_cols) fp32 -> tiles of interleaved rows. Rows that are missing in the last tile are
// zeros.
void PackInterleaved(Format format, const float* w, int32_t n_rows, int32_t n_cols, uint8_t* out) {
  const int64_t value_bytes = ValueBytes(format, n_cols), scale_bytes = ScaleBytes(format, n_cols);
  const int64_t group_values = GroupValueBytes(format), group_scales = GroupScaleBytes(format);
  const int64_t n_groups = value_bytes / group_values;
  const std::vector<float> zeros(static_cast<size_t>(n_cols));
  std::vector<uint8_t> packed(static_cast<size_t>(value_bytes + scale_bytes));
  for (int32_t row = 0; row < RoundUp(n_rows, kRowTile); ++row) {
    const uint8_t *values = packed.data(), *scales = values + value_bytes;
    ActiveKernels().pack_row(format, row < n_rows ? w + int64_t{row} * n_cols : zeros.data(),
                             n_cols, packed.data(), packed.data() + value_bytes);
    uint8_t* group = out + row / kRowTile * kRowTile * (value_bytes + scale_bytes);
    const int64_t in_tile = row % kRowTile;
    for (int64_t i = 0; i < n_groups; ++i, group += TileGroupBytes(format)) {
      std::copy_n(scales + i * group_scales, group_scales, group + in_tile * group_scales);
      std::copy_n(values + i * group_values, group_values,
                  group + kRowTile * group_scales + in_tile * group_values);
    }
  }
}

}  // namespace

PyRows::PyRows(Format format, Bytes memory, int32_t n_rows, int32_t n_cols, int64_t offset,
               std::optional<int64_t> row_stride, int64_t scales_offset, bool is_bit_reversed)
    : format(format), memory(memory) {
  Check(n_rows > 0 && n_cols > 0 && n_cols <= kMaxCols,
        "sizes out of range: n_rows must be positive, n_cols from 1 to 16777216");
  const auto check = [&](int64_t first, int64_t n, int64_t stride, int64_t n_bytes) {
    Check(first >= 0 && first <= memory.nbytes(), "offset out of range");
    Check(stride >= n_bytes && stride <= memory.nbytes(), "stride out of range");
    Check(first + (n - 1) * stride + n_bytes <= memory.nbytes(),
          "the rows extend beyond the array");
    Check(IsAligned(memory.data() + first, 2) && stride % 2 == 0, "rows must be 2-byte aligned");
    return memory.data() + first;
  };
  const int64_t value_bytes = ValueBytes(format, n_cols), scale_bytes = ScaleBytes(format, n_cols);
  if (row_stride) {
    const uint8_t* values = check(offset, n_rows, *row_stride, value_bytes);
    const uint8_t* scales = check(scales_offset, n_rows, *row_stride, scale_bytes);
    rows = {values,
            scales,
            *row_stride,
            *row_stride,
            n_rows,
            n_cols,
            is_bit_reversed ? RowLayout::kBitReversed : RowLayout::kRowMajor};
  } else {
    const int64_t tile_bytes = kRowTile * (value_bytes + scale_bytes);
    const uint8_t* tiles =
        check(offset, RoundUp(n_rows, kRowTile) / kRowTile, tile_bytes, tile_bytes);
    const int64_t scales_of_group = kRowTile * GroupScaleBytes(format);
    rows = {tiles + scales_of_group, tiles, tile_bytes, tile_bytes, n_rows, n_cols,
            RowLayout::kInterleaved};
  }
}

PyPredictor::PyPredictor(Format format, int32_t n_neurons, Bytes tiles, const PyRows& first_matrix)
    : format(format),
      predictor{first_matrix.rows.n_rows, tiles.data()},
      n_neurons(n_neurons),
      rows(first_matrix.rows),
      rows_format(first_matrix.format) {
  keep_alive.append(tiles);
  keep_alive.append(first_matrix.memory);
  Check(rows.n_rows % kRowTile == 0 && rows.n_rows <= kMaxCols &&
            first_matrix.format == PredictorFormat(format),
        "the first matrix must be (rank, hidden), with a rank that is a multiple of 4 and at most "
        "16777216; bf16 for a bf16 model, f16 for an f16 model, otherwise q4");
  Check(n_neurons > 0, "n_neurons must be positive");
  Check(tiles.ndim() == 1 && IsAligned(tiles.data(), 4) &&
            tiles.shape(0) ==
                (n_neurons + kPredictTile - 1) / kPredictTile * PredictTileBytes(predictor),
        "tiles must be (bytes of all tiles,)");
}

PyPredictor::PyPredictor(const PyRows& first_matrix, const PyRows& second_matrix, float threshold,
                         PredictorInput input, std::optional<Floats> first_biases,
                         std::optional<Floats> second_biases)
    : format(Format::kQ8),
      predictor{first_matrix.rows.n_rows, second_matrix.rows.scales, second_matrix.rows, nullptr,
                threshold},
      n_neurons(second_matrix.rows.n_rows),
      rows(first_matrix.rows),
      rows_format(Format::kQ8),
      input(input) {
  Check(first_matrix.format == Format::kQ8 && second_matrix.format == Format::kQ8 &&
            rows.layout == RowLayout::kInterleaved &&
            second_matrix.rows.layout == RowLayout::kInterleaved &&
            second_matrix.rows.n_cols == rows.n_rows,
        "the matrices must be interleaved q8: (rank, hidden) and (n_neurons, rank)");
  const auto take = [&](const std::optional<Floats>& biases, int64_t n) -> const float* {
    if (!biases) return nullptr;
    Check(biases->ndim() == 1 && biases->shape(0) == n, "one bias per row of its matrix");
    keep_alive.append(*biases);
    return biases->data();
  };
  biases = take(first_biases, rows.n_rows);
  predictor.biases = take(second_biases, n_neurons);
  keep_alive.append(first_matrix.memory);
  keep_alive.append(second_matrix.memory);
}

PyPreview::PyPreview(int32_t n_rows, int32_t n_cols, Bytes tiles)
    : preview{tiles.data(), n_rows, n_cols}, tiles(tiles) {
  Check(n_rows > 0 && n_cols > 0 && n_cols <= kMaxCols,
        "preview sizes: n_rows must be positive, n_cols from 1 to 16777216");
  Check(tiles.ndim() == 1 && IsAligned(tiles.data(), 4) &&
            tiles.shape(0) == CountTiles(preview) * PreviewTileBytes(preview),
        "tiles must be (bytes of all tiles,)");
}

std::vector<uint8_t> PyPredictor::MakeInputs(Format x_format, const Bytes& x,
                                             int32_t n_cols) const {
  Check(!IsMlp(predictor) && x_format == format,
        "the predictor and the gate rows must have the same format");
  Check(rows.n_cols == n_cols, "the predictor and the gate rows must have the same width");
  const int64_t n = x.shape(0), n_bytes = PredictorInputBytes(predictor);
  std::vector<float> z(static_cast<size_t>(n * predictor.rank));
  std::vector<uint8_t> inputs(static_cast<size_t>(n * n_bytes));
  const KernelTable& kernels = ActiveKernels();
  kernels.gemm({rows_format, rows, 0, predictor.rank, x.data(), x.shape(1), static_cast<int32_t>(n),
                z.data(), predictor.rank});
  for (int64_t t = 0; t < n; ++t)
    kernels.make_predictor_input(predictor, z.data() + t * predictor.rank,
                                 inputs.data() + t * n_bytes);
  return inputs;
}

void BindKernels(py::module_& m) {
  m.def("available_isas", &AvailableIsas);
  m.def("active_isa", [] { return std::string(ActiveKernels().name); });
  m.def("set_isa", &SetIsa, py::arg("name"));
  m.def("set_best_isa", &SetBestIsa, py::arg("cap"));
  m.def("allocate_bytes", &AllocateBytes, py::arg("n_bytes"));
  // Throws OSError.
  m.def(
      "lock_bytes",
      [](const Bytes& memory) {
        int error = 0;
        WithoutGil([&] {
          error = platform::LockPages(memory.data(), static_cast<size_t>(memory.nbytes()));
        });
        if (error != 0) ThrowOsError(error);
      },
      py::arg("memory"));
  // These two throw OSError too. platform.h says when.
  m.def("map_file", &MapFile, py::arg("file"), py::arg("n_bytes"));
  m.def("move_into_memory", &MoveIntoMemory, py::arg("mapped"), py::arg("first"),
        py::arg("n_bytes"), py::arg("file"));
  m.def(
      "crc32",
      [](const Bytes& data, uint32_t crc, bool portable) {
        Check(data.ndim() == 1, "data must be (n_bytes,)");
        const size_t size = static_cast<size_t>(data.nbytes());
        WithoutGil([&] {
          crc = portable ? Crc32Portable(crc, data.data(), size) : Crc32(crc, data.data(), size);
        });
        return crc;
      },
      py::arg("data").noconvert(), py::arg("crc") = 0, py::arg("portable") = false);
  m.def(
      "padded_cols",
      [](Format format, int32_t n_cols) {
        Check(n_cols > 0 && n_cols <= kMaxCols, "n_cols must be from 1 to 16777216");
        return PaddedCols(format, n_cols);
      },
      py::arg("format"), py::arg("n_cols"));

  // The places of the groups of a bit-reversed row, in natural order of the groups.
  m.def(
      "group_places",
      [](Format format, int32_t n_cols) {
        Check(n_cols > 0 && n_cols <= kMaxCols, "n_cols must be from 1 to 16777216");
        std::vector<int32_t> places(static_cast<size_t>(CountGroups(format, n_cols)));
        for (size_t i = 1; i < places.size(); ++i)
          places[i] = NextPlace(places[i - 1], static_cast<int32_t>(places.size()));
        return places;
      },
      py::arg("format"), py::arg("n_cols"));
  m.def(
      "head_stride", [](int32_t head_dim) { return RoundUp(head_dim, kHeadAlign); },
      py::arg("head_dim"));
  m.def(
      "pack_rows",
      [](Format format, const Floats& w, py::array_t<uint8_t> values,
         std::optional<py::array_t<uint8_t>> scales) {
        Check(w.ndim() == 2 && w.shape(0) > 0 && w.shape(1) > 0 && w.shape(1) <= kMaxCols,
              "w must be (rows, n), n from 1 to 16777216");
        const int32_t n_cols = static_cast<int32_t>(w.shape(1));
        const auto check = [&](const py::array_t<uint8_t>& out, int64_t row_bytes) {
          Check(out.ndim() == 2 && out.shape(0) == w.shape(0) && out.shape(1) == row_bytes &&
                    out.strides(1) == 1 && out.strides(0) >= row_bytes,
                "values and scales must be (rows, bytes of a row)");
        };
        check(values, ValueBytes(format, n_cols));
        Check(scales.has_value() == HasBlocks(format), "q8 and q4 have scales, bf16 and f16 none");
        if (scales) check(*scales, ScaleBytes(format, n_cols));
        uint8_t* value_row = values.mutable_data();
        uint8_t* scale_row = scales ? scales->mutable_data() : nullptr;
        const int64_t value_stride = values.strides(0),
                      scale_stride = scales ? scales->strides(0) : 0;
        WithoutGil([&] {
          for (int64_t row = 0; row < w.shape(0); ++row)
            ActiveKernels().pack_row(format, w.data() + row * n_cols, n_cols,
                                     value_row + row * value_stride,
                                     scale_row + row * scale_stride);
        });
      },
      py::arg("format"), py::arg("w"), py::arg("values").noconvert(),
      py::arg("scales").noconvert());
  m.def(
      "pack_interleaved",
      [](Format format, const Floats& w, py::array_t<uint8_t> tiles) {
        Check(w.ndim() == 2 && w.shape(0) > 0 && w.shape(1) > 0 && w.shape(1) <= kMaxCols,
              "w must be (rows, n), n from 1 to 16777216");
        const int32_t n_rows = static_cast<int32_t>(w.shape(0)),
                      n_cols = static_cast<int32_t>(w.shape(1));
        const int64_t row_bytes = ValueBytes(format, n_cols) + ScaleBytes(format, n_cols);
        Check(tiles.ndim() == 1 && tiles.strides(0) == 1 &&
                  tiles.shape(0) == RoundUp(n_rows, kRowTile) * row_bytes,
              "tiles must be (bytes of all tiles,)");
        uint8_t* out = tiles.mutable_data();
        WithoutGil([&] { PackInterleaved(format, w.data(), n_rows, n_cols, out); });
      },
      py::arg("format"), py::arg("w"), py::arg("tiles").noconvert());
  m.def(
      "quantize",
      [](Format format, const Floats& x) {
        Check(x.ndim() == 1 && x.shape(0) > 0, "x must be (n,)");
        const int32_t n = static_cast<int32_t>(x.shape(0));
        Bytes out(VectorBytes(format, n));
        ActiveKernels().quantize(format, x.data(), n, out.mutable_data());
        return out;
      },
      py::arg("format"), py::arg("x"));
  m.def(
      "dequantize",
      [](const PyRows& rows, int32_t row, float scale) {
        Check(row >= 0 && row < rows.rows.n_rows, "row out of range");
        Check(rows.rows.layout != RowLayout::kBitReversed,
              "bit-reversed rows cannot be dequantised");
        Floats out(rows.rows.n_cols);
        ActiveKernels().dequantize(rows.format, rows.rows, row, scale, out.mutable_data());
        return out;
      },
      py::arg("rows"), py::arg("row"), py::arg("scale") = 1.0f);
  m.def(
      "gemm",
      [](const PyRows& rows, const Bytes& x, int32_t first, int32_t last) {
        Check(0 <= first && first <= last && last <= rows.rows.n_rows,
              "row range: 0 <= first <= last <= n_rows must hold");
        Check(x.ndim() == 2 && x.shape(1) == VectorBytes(rows.format, rows.rows.n_cols) &&
                  IsAligned(x.data(), 4),
              "x must be quantised vectors");
        Floats out({x.shape(0), py::ssize_t{last - first}});
        const GemmArgs args = {rows.format,
                               rows.rows,
                               first,
                               last,
                               x.data(),
                               x.shape(1),
                               static_cast<int32_t>(x.shape(0)),
                               out.mutable_data(),
                               last - first};
        WithoutGil([&] { ActiveKernels().gemm(args); });
        return out;
      },
      py::arg("rows"), py::arg("x"), py::arg("first"), py::arg("last"));
  // Returns (logits, the largest logit of each tile).
  m.def(
      "preview_logits",
      [](const PyPreview& p, const Floats& x) {
        const Preview& preview = p.preview;
        Check(x.ndim() == 1 && x.shape(0) == preview.n_cols, "x must be (n_cols,)");
        std::vector<uint8_t> input(static_cast<size_t>(PreviewInputBytes(preview.n_cols)));
        const int32_t n_tiles = CountTiles(preview);
        Floats logits(preview.n_rows), maxima(n_tiles);
        const KernelTable& kernels = ActiveKernels();
        kernels.make_preview_input(x.data(), preview.n_cols, input.data());
        kernels.preview(preview, 0, n_tiles, input.data(), logits.mutable_data(),
                        maxima.mutable_data());
        return py::make_tuple(logits, maxima);
      },
      py::arg("preview"), py::arg("x"));
  // Returns (n_rows,) dot products of the given rows, and zeros for the others.
  m.def(
      "gather_dots",
      [](const PyRows& rows, const std::vector<int32_t>& indices, const Bytes& x) {
        Check(rows.rows.layout == RowLayout::kRowMajor, "rows must be row-major");
        for (const int32_t row : indices)
          Check(row >= 0 && row < rows.rows.n_rows, "row range: an index is beyond the rows");
        Check(x.ndim() == 1 && x.shape(0) == VectorBytes(rows.format, rows.rows.n_cols) &&
                  IsAligned(x.data(), 4),
              "x must be a quantised vector");
        Floats out(rows.rows.n_rows);
        std::fill_n(out.mutable_data(), out.size(), 0.0f);
        ActiveKernels().gather_dots(rows.format, rows.rows, indices.data(),
                                    static_cast<int32_t>(indices.size()), x.data(),
                                    out.mutable_data());
        return out;
      },
      py::arg("rows"), py::arg("indices"), py::arg("x"));
  m.def(
      "sparse_ffn",
      [](const PyRows& gate, const PyRows& up, const PyRows& down, const Bytes& x, int32_t first,
         int32_t last, Activation activation, float threshold, bool computes_all,
         const PyPredictor* predictor) {
        const Format format = gate.format;
        Check(0 <= first && first <= last && last <= gate.rows.n_rows,
              "neuron range: 0 <= first <= last <= n_neurons must hold");
        Check(up.format == format && down.format == format,
              "gate, up and down must have the same format");
        Check(up.rows.n_rows == gate.rows.n_rows && down.rows.n_rows == gate.rows.n_rows,
              "gate, up and down must have the same number of rows");
        Check(up.rows.n_cols == gate.rows.n_cols,
              "gate and up must have the same number of columns");
        Check(up.rows.layout == RowLayout::kRowMajor && down.rows.layout == RowLayout::kRowMajor,
              "up and down rows must be row-major");
        Check(x.ndim() == 2 && x.shape(0) <= kTokenTile,
              "x must be (tokens, bytes) of at most 64 tokens");
        Check(x.shape(1) == VectorBytes(format, gate.rows.n_cols) && IsAligned(x.data(), 4),
              "x must be quantised vectors");
        const int64_t padded = PaddedCols(format, down.rows.n_cols);
        Floats out({x.shape(0), static_cast<py::ssize_t>(padded)});
        const int64_t n_pairs = int64_t{last - first} * x.shape(0);
        std::vector<Active> active(static_cast<size_t>(n_pairs) + 1);
        SparseFfnArgs args = {format,
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
                              padded,
                              computes_all,
                              active.data()};
        std::vector<uint8_t> inputs;
        std::vector<int32_t> predicted(static_cast<size_t>(last - first + 1));
        if (predictor != nullptr) {
          Check(!computes_all && predictor->n_neurons == gate.rows.n_rows,
                "a predictor needs one score per gate row and excludes computes_all");
          Check(gate.rows.layout == RowLayout::kBitReversed,
                "gate rows that a predictor selects must be bit-reversed");
          inputs = predictor->MakeInputs(format, x, gate.rows.n_cols);
          args.predictor = &predictor->predictor;
          args.predictor_inputs = inputs.data();
          args.predictor_input_stride = PredictorInputBytes(predictor->predictor);
          args.predicted = predicted.data();
        }
        ActiveCounts counts{};
        WithoutGil([&] {
          const KernelTable& kernels = ActiveKernels();
          counts = kernels.find_active(args);
          kernels.add_active(args, counts);
        });
        return py::make_tuple(out, counts.n_active, counts.n_predicted);
      },
      py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("x"), py::arg("first"),
      py::arg("last"), py::arg("activation"), py::arg("threshold"), py::arg("computes_all") = false,
      py::arg("predictor") = py::none());
  m.def(
      "add_partials",
      [](Format format, const Floats& partials, float scale, const Floats& x) {
        Check(partials.ndim() == 2 && x.ndim() == 1, "partials must be (pieces, padded), x (n,)");
        const int32_t n = static_cast<int32_t>(x.shape(0));
        Check(partials.shape(0) > 0 && partials.shape(1) == PaddedCols(format, n),
              "partials must have n columns, padded to whole groups");
        const auto n_pieces = static_cast<int32_t>(partials.shape(0));
        Check(n_pieces <= kMaxPieces && (n_pieces & (n_pieces - 1)) == 0,
              "partials must be of 1, 2, 4, 8 or 16 pieces");
        Floats out(n);
        std::copy(x.data(), x.data() + n, out.mutable_data());
        ActiveKernels().add_partials(format, partials.data(), partials.shape(1), n_pieces, n, scale,
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
        ActiveKernels().rms_norm(x.data(), weight.data(), static_cast<int32_t>(x.shape(0)), eps,
                                 scale, out.mutable_data());
        return out;
      },
      py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("scale"));
  m.def(
      "attend_span",
      [](const Floats& q, const Halves& k, const Halves& v, KvFormat kv) {
        Check(q.ndim() == 2 && k.ndim() == 3 && v.ndim() == 2,
              "q and v must have 2 dimensions, k must have 3");
        Check(q.shape(1) % kHeadAlign == 0 && k.shape(1) == q.shape(1) && v.shape(1) == q.shape(1),
              "q, k and v must have the same head_stride, a multiple of 16");
        const py::ssize_t n = v.shape(0);
        Check(n > 0 && n <= kSpan && k.shape(2) == kKeyTile &&
                  k.shape(0) == (n + kKeyTile - 1) / kKeyTile,
              "v must have from 1 to 256 positions, and k as many in tiles of 64");
        Floats max(q.shape(0)), sum(q.shape(0)), out({q.shape(0), q.shape(1)});
        float scores[kHeadTile * kSpan];
        ActiveKernels().attend_span(
            {kv, q.data(), k.data(), v.data(), static_cast<int32_t>(q.shape(0)),
             static_cast<int32_t>(q.shape(1)), static_cast<int32_t>(n), nullptr, scores,
             max.mutable_data(), sum.mutable_data(), out.mutable_data()});
        return py::make_tuple(max, sum, out);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("kv") = KvFormat::kFp16);
  // Returns (the elements as the KV cache stores them, the largest magnitude).
  m.def(
      "to_kv",
      [](KvFormat kv, const Floats& x) {
        Halves out(x.size());
        const float largest =
            ActiveKernels().to_kv(kv, x.data(), static_cast<int32_t>(x.size()), out.mutable_data());
        return py::make_tuple(out, largest);
      },
      py::arg("kv"), py::arg("x"));
  m.def(
      "to_fp16",
      [](const Floats& x) {
        Halves out(x.size());
        ActiveKernels().to_fp16(x.data(), static_cast<int32_t>(x.size()), out.mutable_data());
        return out;
      },
      py::arg("x"));
}

}  // namespace hybrid
