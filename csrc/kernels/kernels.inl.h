// All kernels. target_<isa>.cpp compiles this file once per ISA and names that ISA's vocabulary in
// HYBRID_SIMD. Everything here has internal linkage: the linker must never merge code that was
// inlined into one target with another target's.
#pragma once

#include "kernels/attention.inl.h"
#include "kernels/dot.inl.h"
#include "kernels/pack.inl.h"
#include "kernels/predict.inl.h"
#include "kernels/preview.inl.h"
#include "kernels/sampling.inl.h"
#include "kernels/sparse_ffn.inl.h"
#include "kernels/vectors.inl.h"

namespace hybrid {
namespace {

constexpr KernelTable MakeTable(const char* name) {
  return {name,
          PackRow,
          Quantize,
          Dequantize,
          Gemm,
          FindActive,
          AddActive,
          SumPartials,
          AddPartials,
          RmsNorm,
          Rotate,
          AttendSpan,
          MergeSpans,
          ToFp16,
          ToKv,
          MakePredictorInput,
          MakePreviewInput,
          PreviewTiles,
          GatherDots,
          WeighLogits,
          FindLikely,
          Read};
}

}  // namespace
}  // namespace hybrid
