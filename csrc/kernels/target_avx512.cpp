#define HYBRID_SIMD "simd_avx512.h"
#include "kernels/kernels.inl.h"

namespace hybrid {
extern const KernelTable kAvx512Kernels;
const KernelTable kAvx512Kernels = MakeTable("avx512");
}  // namespace hybrid
