#define HYBRID_SIMD "simd_avx512.h"
#include "kernels/kernels.inl.h"

namespace hybrid {
extern const KernelTable kAvx512VnniBf16Kernels;
const KernelTable kAvx512VnniBf16Kernels = MakeTable("avx512_vnni_bf16");
}  // namespace hybrid
