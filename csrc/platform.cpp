#include "platform.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <new>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace hybrid {
namespace platform {

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
namespace {
// The features are read from the CPU itself, since the names that __builtin_cpu_supports knows
// differ from compiler to compiler. Source: Intel's Software Developer's Manual, CPUID and XGETBV.
struct Cpu {
  bool pclmul = false;
  bool avx2 = false, avx2_vnni = false, avx512 = false, avx512_vnni_bf16 = false;

  Cpu() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return;
    pclmul = Bit(ecx, 1);
    const bool has_xsave = Bit(ecx, 27), has_fma = Bit(ecx, 12), has_f16c = Bit(ecx, 29);
    if (!has_xsave) return;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    // Whether the operating system saves the YMM registers, and whether it also saves the ZMM and
    // mask registers.
    const bool saves_ymm = (low & 0x06) == 0x06, saves_zmm = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return;
    avx2 = saves_ymm && has_fma && has_f16c && Bit(ebx, 5);
    const bool has_f_dq_bw_vl = Bit(ebx, 16) && Bit(ebx, 17) && Bit(ebx, 30) && Bit(ebx, 31);
    const bool has_vnni = Bit(ecx, 11);
    avx512 = avx2 && saves_zmm && has_f_dq_bw_vl;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return;
    avx2_vnni = avx2 && Bit(eax, 4);
    avx512_vnni_bf16 = avx512 && has_vnni && Bit(eax, 5);
  }
  static bool Bit(unsigned value, int bit) { return (value >> bit & 1) != 0; }
};

const Cpu& ThisCpu() {
  static const Cpu cpu;
  return cpu;
}
}  // namespace

bool HasPclmul() { return ThisCpu().pclmul; }
bool HasAvx2() { return ThisCpu().avx2; }
bool HasAvx2Vnni() { return ThisCpu().avx2_vnni; }
bool HasAvx512() { return ThisCpu().avx512; }
bool HasAvx512VnniBf16() { return ThisCpu().avx512_vnni_bf16; }
void Pause() { _mm_pause(); }
void Prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
#else
bool HasPclmul() { return false; }
bool HasAvx2() { return false; }
bool HasAvx2Vnni() { return false; }
bool HasAvx512() { return false; }
bool HasAvx512VnniBf16() { return false; }
void Pause() {}
void Prefetch(const void*) {}
#endif

int64_t Nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

#if defined(_WIN32)
void* AllocatePages(size_t bytes, bool) {
  void* pages = VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (pages == nullptr) throw std::bad_alloc();
  return pages;
}
void FreePages(void* pages, size_t) { VirtualFree(pages, 0, MEM_RELEASE); }
int LockPages(const void* pages, size_t bytes) {
  // A process may lock no more than its minimum working set.
  SIZE_T least, most;
  if (!GetProcessWorkingSetSize(GetCurrentProcess(), &least, &most) ||
      !SetProcessWorkingSetSize(GetCurrentProcess(), least + bytes, most + bytes) ||
      !VirtualLock(const_cast<void*>(pages), bytes))
    return ENOMEM;
  return 0;
}
int ProcessId() { return static_cast<int>(GetCurrentProcessId()); }
#else
namespace {
constexpr size_t kHugePage = size_t{2} << 20;
size_t WholePages(size_t bytes, size_t page) { return (bytes + page - 1) / page * page; }
}  // namespace
#ifdef HYBRID_SANITIZE
// Allocates exactly the requested bytes from the heap, so that the sanitizer sees their bounds.
void* AllocatePages(size_t bytes, bool) {
  void* pages = nullptr;
  if (posix_memalign(&pages, 64, bytes) != 0) throw std::bad_alloc();
  memset(pages, 0, bytes);
  return pages;
}
void FreePages(void* pages, size_t) { free(pages); }
#else
namespace {
// Whole huge pages if the memory is large enough for one, so that they cover its tail too.
size_t MappedBytes(size_t bytes) {
  return WholePages(bytes, bytes >= kHugePage ? kHugePage : 4096);
}
}  // namespace

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
int LockPages(const void* pages, size_t bytes) { return mlock(pages, bytes) == 0 ? 0 : errno; }
int ProcessId() { return getpid(); }
#endif

#if defined(__linux__) && !defined(HYBRID_SANITIZE)
namespace {
// Reserves address space that begins where a huge page may begin. Returns null on failure.
uint8_t* ReserveAligned(size_t bytes, int protection) {
  const size_t size = bytes + kHugePage;
  void* pages = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  uint8_t* start = static_cast<uint8_t*>(pages);
  uint8_t* aligned =
      start + (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (aligned > start) munmap(start, static_cast<size_t>(aligned - start));
  const size_t after = size - static_cast<size_t>(aligned - start) - bytes;
  if (after > 0) munmap(aligned + bytes, after);
  return aligned;
}
}  // namespace

const void* MapFile(int file, size_t bytes) {
  uint8_t* pages = ReserveAligned(WholePages(bytes, 4096), PROT_NONE);
  if (pages == nullptr) return nullptr;
  if (mmap(pages, bytes, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 0) == MAP_FAILED) {
    const int error = errno;
    UnmapFile(pages, bytes);
    errno = error;
    return nullptr;
  }
  return pages;
}

void UnmapFile(const void* mapped, size_t bytes) {
  munmap(const_cast<void*>(mapped), WholePages(bytes, 4096));
}

int MoveIntoMemory(const void* mapped, size_t first, size_t bytes, int file) {
  const size_t size = WholePages(bytes, 4096);
  uint8_t* pages = ReserveAligned(size, PROT_READ | PROT_WRITE);
  if (pages == nullptr) return errno;
  madvise(pages, size, MADV_HUGEPAGE);
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = pread(file, pages + done, bytes - done, static_cast<off_t>(first + done));
    if (n <= 0) {
      const int error = n == 0 ? EIO : errno;
      if (error == EINTR) continue;
      munmap(pages, size);
      return error;
    }
    done += static_cast<size_t>(n);
  }
  // While mremap runs, the system blocks threads that touch the old pages until the new ones are
  // there.
  uint8_t* target = static_cast<uint8_t*>(const_cast<void*>(mapped)) + first;
  if (mremap(pages, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, target) != MAP_FAILED) return 0;
  const int error = errno;
  munmap(pages, size);
  mmap(target, size, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, static_cast<off_t>(first));
  return error;
}
#else
const void* MapFile(int, size_t) {
  errno = ENOSYS;
  return nullptr;
}
void UnmapFile(const void*, size_t) {}
int MoveIntoMemory(const void*, size_t, size_t, int) { return ENOSYS; }
#endif

#if defined(_WIN32)
void* OpenLibrary(const char* name) { return LoadLibraryA(name); }
void* FindSymbol(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}
void CloseLibrary(void* library) { FreeLibrary(static_cast<HMODULE>(library)); }
#else
void* OpenLibrary(const char* name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }
void* FindSymbol(void* library, const char* name) { return dlsym(library, name); }
void CloseLibrary(void* library) { dlclose(library); }
#endif

}  // namespace platform
}  // namespace hybrid
