// Both functions keep the remainder of the message modulo P with its bits reversed: bit 31 - d is
// the coefficient of x^d. Source of folding by carry-less products: V. Gopal et al., "Fast CRC
// Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009.
#include "checksum.h"

#include <string.h>

#include "platform.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HYBRID_HAS_PCLMUL
#include <immintrin.h>
#endif

namespace hybrid {

namespace {

constexpr uint32_t kPolynomial = 0xedb88320;

constexpr uint32_t TimesX(uint32_t remainder) {
  return (remainder >> 1) ^ ((remainder & 1) != 0 ? kPolynomial : 0);
}

// table[k][b] is the remainder of byte b with k zero bytes after it, so that eight bytes take one
// step.
struct Tables {
  uint32_t table[8][256];
  Tables() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t remainder = byte;
      for (int bit = 0; bit < 8; ++bit) remainder = TimesX(remainder);
      table[0][byte] = remainder;
    }
    for (int k = 1; k < 8; ++k)
      for (uint32_t byte = 0; byte < 256; ++byte)
        table[k][byte] = (table[k - 1][byte] >> 8) ^ table[0][table[k - 1][byte] & 255];
  }
};

uint32_t Update(uint32_t remainder, const uint8_t* data, size_t n_bytes) {
  static const Tables tables;
  const auto& table = tables.table;
  for (; n_bytes >= 8; data += 8, n_bytes -= 8) {
    uint32_t low = 0, high = 0;
    for (int i = 0; i < 4; ++i) {
      low |= uint32_t{data[i]} << (8 * i);
      high |= uint32_t{data[i + 4]} << (8 * i);
    }
    low ^= remainder;
    remainder = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^
                table[4][low >> 24] ^ table[3][high & 255] ^ table[2][high >> 8 & 255] ^
                table[1][high >> 16 & 255] ^ table[0][high >> 24];
  }
  for (; n_bytes > 0; ++data, --n_bytes)
    remainder = (remainder >> 8) ^ table[0][(remainder ^ *data) & 255];
  return remainder;
}

#ifdef HYBRID_HAS_PCLMUL
#define HYBRID_PCLMUL __attribute__((target("pclmul")))

// x^n modulo P as a factor of a carry-less product: reversed, in the upper half of 64 bits.
constexpr int64_t PowerOfX(int n) {
  uint32_t remainder = uint32_t{1} << 31;
  for (int i = 0; i < n; ++i) remainder = TimesX(remainder);
  return static_cast<int64_t>(uint64_t{remainder} << 32);
}

// Multiplies 128 reversed bits by x^kBits, modulo P. A product of reversed 64-bit halves has 127
// bits, so it stands one power of x too high.
template <int kBits>
HYBRID_PCLMUL inline __m128i Fold(__m128i bits) {
  constexpr int64_t low = PowerOfX(kBits + 63), high = PowerOfX(kBits - 1);
  const __m128i factors = _mm_set_epi64x(high, low);
  return _mm_xor_si128(_mm_clmulepi64_si128(bits, factors, 0x00),
                       _mm_clmulepi64_si128(bits, factors, 0x11));
}

HYBRID_PCLMUL inline __m128i Load(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

HYBRID_PCLMUL uint32_t UpdateFolding(uint32_t remainder, const uint8_t* data, size_t n_bytes) {
  if (n_bytes < 128) return Update(remainder, data, n_bytes);
  __m128i lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = Load(data + 16 * i);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(remainder)));
  for (data += 64, n_bytes -= 64; n_bytes >= 64; data += 64, n_bytes -= 64)
    for (int i = 0; i < 4; ++i) lanes[i] = _mm_xor_si128(Fold<512>(lanes[i]), Load(data + 16 * i));
  __m128i all = lanes[0];
  for (int i = 1; i < 4; ++i) all = _mm_xor_si128(Fold<128>(all), lanes[i]);
  uint8_t bytes[16];
  memcpy(bytes, &all, 16);
  return Update(Update(0, bytes, 16), data, n_bytes);
}
#undef HYBRID_PCLMUL
#endif

}  // namespace

uint32_t Crc32Portable(uint32_t crc, const uint8_t* data, size_t n_bytes) {
  return ~Update(~crc, data, n_bytes);
}

uint32_t Crc32(uint32_t crc, const uint8_t* data, size_t n_bytes) {
#ifdef HYBRID_HAS_PCLMUL
  if (platform::HasPclmul()) return ~UpdateFolding(~crc, data, n_bytes);
#endif
  return Crc32Portable(crc, data, n_bytes);
}

}  // namespace hybrid
