// The words of the vocabulary that always have eight lanes of 32 bits: a group's eight blocks at
// once. They are the same for AVX2 and AVX-512. See simd_scalar.h for what each word means.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace hybrid {
namespace {

using F32x8 = __m256;
using I32x8 = __m256i;

inline F32x8 Load8(const float* p) { return _mm256_loadu_ps(p); }
inline void Store8(float* p, F32x8 x) { _mm256_storeu_ps(p, x); }
inline void Store8(void* p, I32x8 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline F32x8 Add8(F32x8 a, F32x8 b) { return _mm256_add_ps(a, b); }
inline I32x8 Add8(I32x8 a, I32x8 b) { return _mm256_add_epi32(a, b); }
inline F32x8 Mul8(F32x8 a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }

inline F32x8 LargerMagnitude(F32x8 a, F32x8 b) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a), magnitude),
                                              _mm256_and_si256(_mm256_castps_si256(b), magnitude)));
}

inline void Transpose(F32x8 (&rows)[8]) {
  F32x8 pairs[8], fours[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}
inline void Transpose(I32x8 (&rows)[8]) {
  F32x8 floats[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) floats[i] = _mm256_castsi256_ps(rows[i]);
  Transpose(floats);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) rows[i] = _mm256_castps_si256(floats[i]);
}

constexpr int32_t kWordOfLane[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // the order that packs leaves
inline I32x8 RoundBlock(const float* x, float factor, I32x8* sums) {
  const __m256 limit = _mm256_set1_ps(127.0f),
               magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256i integers[4];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const __m256 rounded = _mm256_round_ps(Mul8(Load8(x + 8 * i), factor),
                                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 fits = _mm256_cmp_ps(_mm256_and_ps(rounded, magnitude), limit, _CMP_LE_OQ);
    integers[i] = _mm256_cvtps_epi32(_mm256_and_ps(rounded, fits));
  }
  *sums = Add8(Add8(integers[0], integers[1]), Add8(integers[2], integers[3]));
  return _mm256_packs_epi16(_mm256_packs_epi32(integers[0], integers[1]),
                            _mm256_packs_epi32(integers[2], integers[3]));
}

}  // namespace
}  // namespace hybrid
