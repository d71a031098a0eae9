// The vocabulary for AVX-512 F/BW/DQ/VL. It uses VNNI and BF16 instructions if the target has them.
// See simd_scalar.h for what each word means.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels/simd_eight_x86.h"

namespace hybrid {
namespace {

constexpr int32_t kLanes = 16;
// Two 32-byte steps of a group. Until BlockSums, even steps sum in lanes 0-7, odd steps in lanes
// 8-15.
constexpr int32_t kLine = 64;

using F32 = __m512;
using I32 = __m512i;
using Bf16s = __m512i;
using XBytes = __m512i;
struct Nibbles {
  __m512i low, high;
};
struct TwoBits {
  __m512i fields[4];
};

inline F32 Zero() { return _mm512_setzero_ps(); }
inline F32 Set(float x) { return _mm512_set1_ps(x); }
inline F32 Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline F32 LoadFp16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void StoreFp16(uint16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 LoadBf16(const uint16_t* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F32 Add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 Mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 Fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 Max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 Round(F32 a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 Pow2(F32 n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
inline float ReduceAdd(F32 a) { return _mm512_reduce_add_ps(a); }
inline float ReduceMax(F32 a) { return _mm512_reduce_max_ps(a); }

inline Bf16s LoadBf16s(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline F32 DotBf16(F32 sum, Bf16s w, Bf16s x) {
#ifdef __AVX512BF16__
  __m512bh w_pairs, x_pairs;
  memcpy(&w_pairs, &w, sizeof(w));
  memcpy(&x_pairs, &x, sizeof(x));
  return _mm512_dpbf16_ps(sum, w_pairs, x_pairs);
#else
  const __m512i odd = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
                        _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, odd)),
                         _mm512_castsi512_ps(_mm512_and_si512(x, odd)), sum);
#endif
}

#ifdef __AVX512VNNI__
using Q8Weights = __m512i;
inline Q8Weights UnpackQ8(XBytes bytes) { return bytes; }
// Weights are used as they are stored, 128 too large. The sum starts at the correction instead.
inline I32 StartQ8(const int32_t* corrections) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(corrections)));
}
inline I32 DotQ8(I32 sum, Q8Weights w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline I32 DotQ4(I32 sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
#else
struct Q8Weights {
  __m512i magnitude;
  __mmask64 negative;
};
inline Q8Weights UnpackQ8(XBytes bytes) {
  const __m512i w = _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
  return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
}
inline I32 StartQ8(const int32_t*) { return _mm512_setzero_si512(); }
// |w| <= 128 and |x| <= 127, so a pair's sum of at most 32512 does not saturate.
inline I32 DotQ8(I32 sum, Q8Weights w, __m512i x) {
  const __m512i signed_x = _mm512_mask_sub_epi8(x, w.negative, _mm512_setzero_si512(), x);
  const __m512i pairs = _mm512_maddubs_epi16(w.magnitude, signed_x);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
inline I32 DotQ4(I32 sum, __m512i w, __m512i x) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
}
#endif
inline I32 StartQ4(const int32_t* corrections) {
  const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(corrections));
  return _mm512_zextsi256_si512(_mm256_srai_epi32(sums, 4));
}
inline Nibbles UnpackQ4(XBytes bytes) {
  const __m512i mask = _mm512_set1_epi8(15);
  return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
}
#ifdef __AVX512VNNI__
inline TwoBits LoadTwoBits(const uint8_t* p) {
  const __m512i bytes = _mm512_loadu_si512(p);
  const auto field = [&](int bits) {
    return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(bits)));
  };
  return {{field(0x03), field(0x0c), field(0x30), field(0xc0)}};
}
inline I32 SumOfFields(const I32 (&dots)[4]) {
  return _mm512_add_epi32(
      _mm512_add_epi32(dots[0], _mm512_srai_epi32(dots[1], 2)),
      _mm512_add_epi32(_mm512_srai_epi32(dots[2], 4), _mm512_srai_epi32(dots[3], 6)));
}
#else
inline TwoBits LoadTwoBits(const uint8_t* p) {
  const __m512i bytes = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(3);
  return {{_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 2), mask),
           _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask),
           _mm512_and_si512(_mm512_srli_epi16(bytes, 6), mask)}};
}
inline I32 SumOfFields(const I32 (&dots)[4]) {
  return _mm512_add_epi32(_mm512_add_epi32(dots[0], dots[1]), _mm512_add_epi32(dots[2], dots[3]));
}
#endif
inline __m512i LoadX(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline F32 LoadWeightScales(const uint16_t* p) {
  return _mm512_broadcast_f32x8(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Half a register. The sums of the even and the odd steps of a block are added as integers, so that
// one float operation serves a whole group.
using Blocks = __m256;
inline Blocks ZeroBlocks() { return _mm256_setzero_ps(); }
inline Blocks BlockSums(I32 a) {
  const __m256i odd = _mm512_extracti64x4_epi64(a, 1);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm512_castsi512_si256(a), odd));
}
inline Blocks LoadBlockScales(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Blocks LoadXScales(const float* p) { return _mm256_loadu_ps(p); }
inline Blocks FmaBlocks(Blocks dots, Blocks w_scale, Blocks x_scale, Blocks sum) {
  return _mm256_fmadd_ps(dots, _mm256_mul_ps(w_scale, x_scale), sum);
}
inline float AddBlocks(Blocks a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  x = _mm_add_ss(x, _mm_movehdup_ps(x));
  return _mm_cvtss_f32(x);
}

// Rows that are summed together: row `a` in the lower half of a register, row `b` in the upper one.
// So both halves take the same step of x. Every lane of RowBlocks has the bits that it has in
// Blocks.
constexpr int kSumRows = 2;
struct RowSteps {
  XBytes step[kSumRows];
};
inline RowSteps LoadRowSteps(const uint8_t* a, const uint8_t* b) {
  const auto load = [](const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  return {{_mm512_inserti64x4(_mm512_castsi256_si512(load(a)), load(b), 1),
           _mm512_inserti64x4(_mm512_castsi256_si512(load(a + 32)), load(b + 32), 1)}};
}
inline XBytes LoadRowX(const uint8_t* p) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline I32 ForAllRows(I32 start) {
  return _mm512_inserti64x4(start, _mm512_castsi512_si256(start), 1);
}

using RowBlocks = __m512;
inline RowBlocks ZeroRowBlocks() { return _mm512_setzero_ps(); }
inline RowBlocks RowBlockSums(I32 a) { return _mm512_cvtepi32_ps(a); }
inline RowBlocks LoadRowBlockScales(const uint16_t* a, const uint16_t* b) {
  return _mm512_cvtph_ps(_mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1));
}
inline RowBlocks LoadRowXScales(const float* p) {
  return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
}
inline RowBlocks FmaBlocks(RowBlocks dots, RowBlocks w_scale, RowBlocks x_scale, RowBlocks sum) {
  return _mm512_fmadd_ps(dots, _mm512_mul_ps(w_scale, x_scale), sum);
}
inline void AddRowBlocks(RowBlocks sums, float* a, float* b) {
  *b = AddBlocks(_mm512_extractf32x8_ps(sums, 1));
  *a = AddBlocks(_mm512_castps512_ps256(sums));
}

inline I32 LoadWords(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline I32 HighHalf(I32 a) { return _mm512_srli_epi32(a, 16); }
inline F32 Field(I32 a, int32_t mask, float bias) {
  // (a & mask) | the bits of 2^23
  const __m512i bits =
      _mm512_ternarylogic_epi32(a, _mm512_set1_epi32(mask), _mm512_set1_epi32(0x4b000000), 0xea);
  return _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(bias));
}

inline XBytes BroadcastX(const uint8_t* p) {
  int32_t word;
  memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}
#ifdef __AVX512VNNI__
inline I32 StartWords(int32_t correction) { return _mm512_set1_epi32(correction); }
#else
inline I32 StartWords(int32_t) { return _mm512_setzero_si512(); }
#endif
inline F32 ToFloat(I32 a) { return _mm512_cvtepi32_ps(a); }
inline uint32_t NotNegative(F32 a) {
  return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NLT_UQ);
}
inline I32 ZeroWords() { return _mm512_setzero_si512(); }
inline I32 AddWords(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 BroadcastWord(const uint8_t* p) { return BroadcastX(p); }

inline void PrefetchL1(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void PrefetchL2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace hybrid
