// The vocabulary for AVX2 + FMA + F16C. It uses AVX-VNNI instructions if the target has them. See
// simd_scalar.h for what each word means.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels/simd_eight_x86.h"

namespace hybrid {
namespace {

constexpr int32_t kLanes = 8;
constexpr int32_t kLine = 32;

using F32 = __m256;
using I32 = __m256i;
using Bf16s = __m256i;
using XBytes = __m256i;
struct Nibbles {
  __m256i low, high;
};
struct TwoBits {
  __m256i fields[4];
};

inline F32 Zero() { return _mm256_setzero_ps(); }
inline F32 Set(float x) { return _mm256_set1_ps(x); }
inline F32 Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
inline F32 LoadFp16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void StoreFp16(uint16_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 LoadBf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F32 Add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 Mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 Fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 Max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 Round(F32 a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 Pow2(F32 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline float ReduceAdd(F32 a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  x = _mm_add_ss(x, _mm_movehdup_ps(x));
  return _mm_cvtss_f32(x);
}
inline float ReduceMax(F32 a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  x = _mm_max_ss(x, _mm_movehdup_ps(x));
  return _mm_cvtss_f32(x);
}

inline Bf16s LoadBf16s(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline F32 DotBf16(F32 sum, Bf16s w, Bf16s x) {
  const __m256i odd = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)),
                        _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), sum);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, odd)),
                         _mm256_castsi256_ps(_mm256_and_si256(x, odd)), sum);
}

#ifdef __AVXVNNI__
using Q8Weights = __m256i;
inline Q8Weights UnpackQ8(XBytes bytes) { return bytes; }
// Weights are used as they are stored, 128 too large. The sum starts at the correction instead.
inline I32 StartQ8(const int32_t* corrections) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(corrections));
}
inline I32 DotQ8(I32 sum, Q8Weights w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
inline I32 DotQ4(I32 sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
// maddubs takes one unsigned operand: |w| as uint8. The sign of w is transferred to x.
struct Q8Weights {
  __m256i magnitude, sign;
};
inline Q8Weights UnpackQ8(XBytes bytes) {
  const __m256i w = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80)));
  return {_mm256_abs_epi8(w), w};
}
inline I32 StartQ8(const int32_t*) { return _mm256_setzero_si256(); }
// |w| <= 128 and |x| <= 127, so a pair's sum of at most 32512 does not saturate.
inline I32 DotQ8(I32 sum, Q8Weights w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.sign));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I32 DotQ4(I32 sum, __m256i w, __m256i x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
#endif
inline __m256i LoadX(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline I32 StartQ4(const int32_t* corrections) {
  return _mm256_srai_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(corrections)), 4);
}
inline Nibbles UnpackQ4(XBytes bytes) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask)};
}
#ifdef __AVXVNNI__
inline TwoBits LoadTwoBits(const uint8_t* p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const auto field = [&](int bits) {
    return _mm256_and_si256(bytes, _mm256_set1_epi8(static_cast<char>(bits)));
  };
  return {{field(0x03), field(0x0c), field(0x30), field(0xc0)}};
}
inline I32 SumOfFields(const I32 (&dots)[4]) {
  return _mm256_add_epi32(
      _mm256_add_epi32(dots[0], _mm256_srai_epi32(dots[1], 2)),
      _mm256_add_epi32(_mm256_srai_epi32(dots[2], 4), _mm256_srai_epi32(dots[3], 6)));
}
#else
inline TwoBits LoadTwoBits(const uint8_t* p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i mask = _mm256_set1_epi8(3);
  return {{_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 2), mask),
           _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask),
           _mm256_and_si256(_mm256_srli_epi16(bytes, 6), mask)}};
}
inline I32 SumOfFields(const I32 (&dots)[4]) {
  return _mm256_add_epi32(_mm256_add_epi32(dots[0], dots[1]), _mm256_add_epi32(dots[2], dots[3]));
}
#endif
inline F32 LoadWeightScales(const uint16_t* p) { return LoadFp16(p); }

using Blocks = F32;
inline Blocks ZeroBlocks() { return Zero(); }
inline Blocks BlockSums(I32 a) { return _mm256_cvtepi32_ps(a); }
inline Blocks LoadBlockScales(const uint16_t* p) { return LoadFp16(p); }
inline Blocks LoadXScales(const float* p) { return Load(p); }
inline Blocks FmaBlocks(Blocks dots, Blocks w_scale, Blocks x_scale, Blocks sum) {
  return Fma(dots, Mul(w_scale, x_scale), sum);
}
inline float AddBlocks(Blocks a) { return ReduceAdd(a); }

// Rows that are summed together: here one row, `a`. See simd_avx512.h.
constexpr int kSumRows = 1;
struct RowSteps {
  XBytes step[kSumRows];
};
inline RowSteps LoadRowSteps(const uint8_t* a, const uint8_t*) { return {{LoadX(a)}}; }
inline XBytes LoadRowX(const uint8_t* p) { return LoadX(p); }
inline I32 ForAllRows(I32 start) { return start; }

using RowBlocks = Blocks;
inline RowBlocks ZeroRowBlocks() { return ZeroBlocks(); }
inline RowBlocks RowBlockSums(I32 a) { return BlockSums(a); }
inline RowBlocks LoadRowBlockScales(const uint16_t* a, const uint16_t*) {
  return LoadBlockScales(a);
}
inline RowBlocks LoadRowXScales(const float* p) { return LoadXScales(p); }
inline void AddRowBlocks(RowBlocks sums, float* a, float*) { *a = AddBlocks(sums); }

inline I32 LoadWords(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline I32 HighHalf(I32 a) { return _mm256_srli_epi32(a, 16); }
inline F32 Field(I32 a, int32_t mask, float bias) {
  const __m256i bits =
      _mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi32(mask)), _mm256_set1_epi32(0x4b000000));
  return _mm256_sub_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(bias));
}

inline XBytes BroadcastX(const uint8_t* p) {
  int32_t word;
  memcpy(&word, p, sizeof(word));
  return _mm256_set1_epi32(word);
}
#ifdef __AVXVNNI__
inline I32 StartWords(int32_t correction) { return _mm256_set1_epi32(correction); }
#else
inline I32 StartWords(int32_t) { return _mm256_setzero_si256(); }
#endif
inline F32 ToFloat(I32 a) { return _mm256_cvtepi32_ps(a); }
inline uint32_t NotNegative(F32 a) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NLT_UQ)));
}
inline I32 ZeroWords() { return _mm256_setzero_si256(); }
inline I32 AddWords(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
inline I32 BroadcastWord(const uint8_t* p) { return BroadcastX(p); }

inline void PrefetchL1(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void PrefetchL2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace hybrid
