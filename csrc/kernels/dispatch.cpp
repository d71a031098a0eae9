#include "kernels/dispatch.h"

#include <atomic>
#include <stdexcept>

#include "platform.h"

namespace hybrid {

extern const KernelTable kScalarKernels;
#ifdef HYBRID_HAS_AVX2
extern const KernelTable kAvx2Kernels;
#endif
#ifdef HYBRID_HAS_AVX2_VNNI
extern const KernelTable kAvx2VnniKernels;
#endif
#ifdef HYBRID_HAS_AVX512
extern const KernelTable kAvx512Kernels;
#endif
#ifdef HYBRID_HAS_AVX512_VNNI_BF16
extern const KernelTable kAvx512VnniBf16Kernels;
#endif

namespace {

// Every ISA that the project knows, slowest first. A table is null if the compiler could not build
// it.
struct Target {
  const char* name;
  const KernelTable* table;
  bool (*runs_here)();
};

const Target kTargets[] = {
    {"scalar", &kScalarKernels, [] { return true; }},
#ifdef HYBRID_HAS_AVX2
    {"avx2", &kAvx2Kernels, platform::HasAvx2},
#else
    {"avx2", nullptr, nullptr},
#endif
#ifdef HYBRID_HAS_AVX2_VNNI
    {"avx2_vnni", &kAvx2VnniKernels, platform::HasAvx2Vnni},
#else
    {"avx2_vnni", nullptr, nullptr},
#endif
#ifdef HYBRID_HAS_AVX512
    {"avx512", &kAvx512Kernels, platform::HasAvx512},
#else
    {"avx512", nullptr, nullptr},
#endif
#ifdef HYBRID_HAS_AVX512_VNNI_BF16
    {"avx512_vnni_bf16", &kAvx512VnniBf16Kernels, platform::HasAvx512VnniBf16},
#else
    {"avx512_vnni_bf16", nullptr, nullptr},
#endif
};

std::atomic<const KernelTable*> active{&kScalarKernels};

bool IsAvailable(const Target& target) { return target.table != nullptr && target.runs_here(); }

}  // namespace

std::vector<std::string> AvailableIsas() {
  std::vector<std::string> names;
  for (const Target& target : kTargets)
    if (IsAvailable(target)) names.emplace_back(target.name);
  return names;
}

const KernelTable& ActiveKernels() { return *active.load(std::memory_order_relaxed); }

void SetIsa(const std::string& name) {
  for (const Target& target : kTargets) {
    if (name == target.name && IsAvailable(target)) {
      active.store(target.table, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument(name);
}

void SetBestIsa(const std::string& cap) {
  const KernelTable* best = nullptr;
  for (const Target& target : kTargets) {
    if (IsAvailable(target)) best = target.table;
    if (cap == target.name) {
      active.store(best, std::memory_order_relaxed);
      return;
    }
  }
  if (!cap.empty()) throw std::invalid_argument(cap);
  active.store(best, std::memory_order_relaxed);
}

}  // namespace hybrid
