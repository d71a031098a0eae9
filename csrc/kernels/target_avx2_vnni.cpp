#define HYBRID_SIMD "simd_avx2.h"
#include "kernels/kernels.inl.h"

namespace hybrid {
extern const KernelTable kAvx2VnniKernels;
const KernelTable kAvx2VnniKernels = MakeTable("avx2_vnni");
}  // namespace hybrid
