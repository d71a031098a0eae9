// All kernels, compiled once per ISA by target_<isa>.cpp, which names that ISA's vocabulary in
// HYBRID_SIMD. Everything here has internal linkage: code inlined into one target must never be
// merged with another's.
#pragma once

#include "attention.inl.h"
#include "dot.inl.h"
#include "pack.inl.h"
#include "predict.inl.h"
#include "preview.inl.h"
#include "sparse_ffn.inl.h"
#include "vectors.inl.h"

namespace hybrid {
namespace {

constexpr KernelTable MakeTable(const char* name) {
  return {name,       PackRow,     Quantize,           Dequantize,       Gemm,         FindActive,
          AddActive,  SumPartials, AddPartials,        RmsNorm,          Rotate,       AttendSpan,
          MergeSpans, ToFp16,      MakePredictorInput, MakePreviewInput, PreviewTiles, GatherDots,
          Read};
}

}  // namespace
}  // namespace hybrid
