#include "platform.h"

#include <stdlib.h>
#include <string.h>

#include <new>

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hybrid {
namespace platform {

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool HasAvx512VnniBf16() {
  return HasAvx512() && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16");
}
void Pause() { _mm_pause(); }
#else
bool HasAvx2() { return false; }
bool HasAvx512() { return false; }
bool HasAvx512VnniBf16() { return false; }
void Pause() {}
#endif

#if defined(_WIN32)
void* AllocatePages(size_t bytes, bool) {
  void* pages = VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (pages == nullptr) throw std::bad_alloc();
  return pages;
}
void FreePages(void* pages, size_t) { VirtualFree(pages, 0, MEM_RELEASE); }
int ProcessId() { return static_cast<int>(GetCurrentProcessId()); }
#else
namespace {
constexpr size_t kHugePage = size_t{2} << 20;
[[maybe_unused]] size_t MappedBytes(size_t bytes) {
  // Whole huge pages where the memory is large enough for one, so that its tail is covered too.
  const size_t page = bytes >= kHugePage ? kHugePage : 4096;
  return (bytes + page - 1) / page * page;
}
}  // namespace

#ifdef HYBRID_SANITIZE
// Exactly the bytes asked for, from the heap, so that the sanitizer sees their bounds.
void* AllocatePages(size_t bytes, bool) {
  void* pages = nullptr;
  if (posix_memalign(&pages, 64, bytes) != 0) throw std::bad_alloc();
  memset(pages, 0, bytes);
  return pages;
}
void FreePages(void* pages, size_t) { free(pages); }
#else
void* AllocatePages(size_t bytes, bool huge) {
  void* pages = mmap(nullptr, MappedBytes(bytes), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge) madvise(pages, MappedBytes(bytes), MADV_HUGEPAGE);
#endif
  return pages;
}
void FreePages(void* pages, size_t bytes) { munmap(pages, MappedBytes(bytes)); }
#endif
int ProcessId() { return getpid(); }
#endif

}  // namespace platform
}  // namespace hybrid
