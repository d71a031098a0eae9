// CRC-32 of ISO 3309, as in zip files and zlib: it finds damaged bytes, not forged ones.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace hybrid {

// Continues `crc`, which is the result for the bytes before `data`, or 0 if there are none.
uint32_t Crc32(uint32_t crc, const uint8_t* data, size_t n_bytes);

// The same without vector instructions, for CPUs that lack them.
uint32_t Crc32Portable(uint32_t crc, const uint8_t* data, size_t n_bytes);

}  // namespace hybrid
