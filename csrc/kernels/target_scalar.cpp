#define HYBRID_SIMD "simd_scalar.h"
#include "kernels/kernels.inl.h"

namespace hybrid {
extern const KernelTable kScalarKernels;
const KernelTable kScalarKernels = MakeTable("scalar");
}  // namespace hybrid
