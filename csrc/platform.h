// Everything that differs by operating system or CPU vendor: memory, waiting, CPU features.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace hybrid {
namespace platform {

bool HasAvx2();            // AVX2, FMA and F16C
bool HasAvx2Vnni();        // and AVX-VNNI
bool HasAvx512();          // AVX-512 F, BW, DQ, VL
bool HasAvx512VnniBf16();  // and VNNI, BF16

// Zeroed anonymous memory, page-aligned, touched only as used. `huge` asks for huge pages where the
// system has them. Throws std::bad_alloc. Not thread-bound; release with FreePages and the same
// size.
void* AllocatePages(size_t bytes, bool huge);
void FreePages(void* pages, size_t bytes);

// Keeps pages in memory: never swapped out, read in now. Returns 0, or the system's error number.
// Undone by giving the pages back.
int LockPages(const void* pages, size_t bytes);

// A file mapped for reading, beginning where a huge page may begin; null and errno where that
// fails, on other systems than Linux always.
const void* MapFile(int file, size_t bytes);
void UnmapFile(const void* mapped, size_t bytes);

// Bytes [first, first + bytes) of a mapped file, whole huge pages but for the end of the file,
// become memory of our own with the same content at the same address; who reads them meanwhile
// notices nothing. Returns 0, or an error number and leaves the file there; EIO where it has become
// shorter.
int MoveIntoMemory(const void* mapped, size_t first, size_t bytes, int file);

// Nanoseconds of a clock that only rises.
int64_t Nanoseconds();

// One polite iteration of a spinning wait.
void Pause();
// Asks for the cache line of an address, which need not be valid, into L2.
void Prefetch(const void* p);

// Shared libraries, by name or path. Null where there is none, or no such symbol.
void* OpenLibrary(const char* name);
void* FindSymbol(void* library, const char* name);
void CloseLibrary(void* library);

// Tells a forked child from its parent.
int ProcessId();

}  // namespace platform
}  // namespace hybrid
