// Everything that differs by operating system or CPU vendor: memory, waiting, CPU features.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace hybrid {
namespace platform {

bool HasPclmul();          // carry-less products
bool HasAvx2();            // AVX2, FMA and F16C
bool HasAvx2Vnni();        // HasAvx2 and AVX-VNNI
bool HasAvx512();          // HasAvx2 and AVX-512 F, BW, DQ, VL
bool HasAvx512VnniBf16();  // HasAvx512 and AVX-512 VNNI, BF16

// Allocates zeroed anonymous memory, page-aligned. The system provides each page when it is first
// touched. `huge` requests huge pages if the system has them. Any thread may release the memory,
// with FreePages and the same size. Throws std::bad_alloc.
void* AllocatePages(size_t bytes, bool huge);
void FreePages(void* pages, size_t bytes);

// Reads pages into memory now and keeps them from being swapped out. Returns 0, or the system's
// error number. FreePages and UnmapFile undo it.
int LockPages(const void* pages, size_t bytes);

// Maps a file for reading, at an address where a huge page may begin. On failure it returns null
// and sets errno. It always fails on systems other than Linux.
const void* MapFile(int file, size_t bytes);
void UnmapFile(const void* mapped, size_t bytes);

// Replaces bytes [first, first + bytes) of a mapped file by memory of this process with the same
// content at the same address. The range is whole huge pages, except at the end of the file.
// Threads that read the bytes meanwhile notice nothing. Returns 0. On failure it returns an error
// number and leaves the file mapped; EIO means that the file has become shorter.
int MoveIntoMemory(const void* mapped, size_t first, size_t bytes, int file);

// Nanoseconds of a monotonic clock.
int64_t Nanoseconds();

// One iteration of a spinning wait: tells the CPU to pause, if it can.
void Pause();
// Prefetches the cache line of an address, which need not be valid, into L2.
void Prefetch(const void* p);

// Shared libraries, by name or path. The result is null if there is no such library or symbol.
void* OpenLibrary(const char* name);
void* FindSymbol(void* library, const char* name);
void CloseLibrary(void* library);

// Distinguishes a forked child from its parent.
int ProcessId();

}  // namespace platform
}  // namespace hybrid
