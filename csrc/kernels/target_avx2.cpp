#define HYBRID_SIMD "simd_avx2.h"
#include "kernels/kernels.inl.h"

namespace hybrid {
extern const KernelTable kAvx2Kernels;
const KernelTable kAvx2Kernels = MakeTable("avx2");
}  // namespace hybrid
