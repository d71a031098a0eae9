// The vocabulary in portable C++: eight lanes in an array, no intrinsics. It is slow and plain, and
// gives the same results everywhere. Its comments define what each word means on every ISA.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/bf16.h"

namespace hybrid {
namespace {

constexpr int32_t kLanes = 8;
constexpr int32_t kLine = 32;  // bytes of q8 values per step

struct F32 {
  float v[kLanes];
};
struct I32 {
  int32_t v[kLanes];
};
struct XBytes {
  uint8_t v[kLine];
};
using Q8Weights = XBytes;
struct Nibbles {
  XBytes low, high;
};
struct TwoBits {
  XBytes fields[4];
};
struct Bf16s {
  uint16_t v[2 * kLanes];
};

#define HYBRID_LANES(expression)                          \
  F32 y;                                                  \
  for (int i = 0; i < kLanes; ++i) y.v[i] = (expression); \
  return y

inline float Fp16ToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u, mantissa = half & 1023u;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float x = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -x : x;
  }
  const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t FloatToFp16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds beyond 65504
  if (bits < 0x38800000u) {  // subnormal in fp16: let the FPU round at 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(rintf(magnitude * 16777216.0f)));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

inline F32 Zero() { HYBRID_LANES(0.0f); }
inline F32 Set(float x) { HYBRID_LANES(x); }
inline F32 Load(const float* p) { HYBRID_LANES(p[i]); }
inline void Store(float* p, F32 x) { memcpy(p, x.v, sizeof(x.v)); }
inline F32 LoadFp16(const uint16_t* p) { HYBRID_LANES(Fp16ToFloat(p[i])); }
inline void StoreFp16(uint16_t* p, F32 x) {
  for (int i = 0; i < kLanes; ++i) p[i] = FloatToFp16(x.v[i]);
}
inline F32 LoadBf16(const uint16_t* p) { HYBRID_LANES(WidenBf16(p[i])); }
inline F32 Add(F32 a, F32 b) { HYBRID_LANES(a.v[i] + b.v[i]); }
inline F32 Mul(F32 a, F32 b) { HYBRID_LANES(a.v[i] * b.v[i]); }
inline F32 Fma(F32 a, F32 b, F32 c) { HYBRID_LANES(a.v[i] * b.v[i] + c.v[i]); }
inline F32 Max(F32 a, F32 b) { HYBRID_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F32 Round(F32 a) { HYBRID_LANES(rintf(a.v[i])); }
inline F32 Pow2(F32 n) {
  HYBRID_LANES(n.v[i] == n.v[i] ? ldexpf(1.0f, static_cast<int>(n.v[i])) : n.v[i]);
}
inline float ReduceAdd(F32 a) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += a.v[i];
  return sum;
}
inline float ReduceMax(F32 a) {
  float max = a.v[0];
  for (int i = 1; i < kLanes; ++i) max = a.v[i] > max ? a.v[i] : max;
  return max;
}

// bf16 rows: 2 * kLanes weights per step.
inline Bf16s LoadBf16s(const uint16_t* p) {
  Bf16s y;
  memcpy(y.v, p, sizeof(y.v));
  return y;
}
inline F32 DotBf16(F32 sum, Bf16s w, Bf16s x) {
  for (int i = 0; i < kLanes; ++i) {
    sum.v[i] += WidenBf16(w.v[2 * i]) * WidenBf16(x.v[2 * i]);
    sum.v[i] += WidenBf16(w.v[2 * i + 1]) * WidenBf16(x.v[2 * i + 1]);
  }
  return sum;
}

// q8 rows: kLine bytes per step, eight blocks at a time. Lane b sums block b.
inline XBytes LoadX(const uint8_t* p) {
  XBytes y;
  memcpy(y.v, p, kLine);
  return y;
}
// The initial value of a block's sum. It is 0, or, on ISAs that use weights as they are stored, the
// value that undoes their offset. `corrections` holds -128 times each block's sum of x.
inline I32 StartQ8(const int32_t*) {
  I32 y;
  for (int i = 0; i < kLanes; ++i) y.v[i] = 0;
  return y;
}
inline I32 StartQ4(const int32_t* corrections) {
  I32 y;
  for (int i = 0; i < kLanes; ++i) y.v[i] = corrections[i] / 16;  // -8 times the sum
  return y;
}
inline Q8Weights UnpackQ8(XBytes bytes) { return bytes; }
inline I32 DotQ8(I32 sum, Q8Weights w, XBytes x) {
  for (int i = 0; i < kLine; ++i)
    sum.v[i / 4] += (static_cast<int32_t>(w.v[i]) - 128) * static_cast<int8_t>(x.v[i]);
  return sum;
}
// Four 2-bit fields of each byte, from the lowest. On some ISAs LoadTwoBits leaves the fields in
// their positions, so that field f counts 4^f-fold. SumOfFields corrects this: it returns the sum
// of the dot products of the fields themselves.
inline I32 SumOfFields(const I32 (&dots)[4]) {
  I32 sum = dots[0];
  for (int field = 1; field < 4; ++field)
    for (int i = 0; i < kLanes; ++i) sum.v[i] += dots[field].v[i];
  return sum;
}
inline TwoBits LoadTwoBits(const uint8_t* p) {
  TwoBits y;
  for (int field = 0; field < 4; ++field)
    for (int i = 0; i < kLine; ++i) y.fields[field].v[i] = p[i] >> 2 * field & 3;
  return y;
}
inline Nibbles UnpackQ4(XBytes bytes) {
  Nibbles y;
  for (int i = 0; i < kLine; ++i) {
    y.low.v[i] = bytes.v[i] & 15;
    y.high.v[i] = bytes.v[i] >> 4;
  }
  return y;
}
inline I32 DotQ4(I32 sum, XBytes w, XBytes x) {
  for (int i = 0; i < kLine; ++i)
    sum.v[i / 4] += static_cast<int32_t>(w.v[i]) * static_cast<int8_t>(x.v[i]);
  return sum;
}
inline F32 LoadWeightScales(const uint16_t* p) { return LoadFp16(p); }

// The sums of a group's eight blocks, one float lane per block, whatever the width of I32.
using Blocks = F32;
inline Blocks ZeroBlocks() { return Zero(); }
inline Blocks BlockSums(I32 a) { HYBRID_LANES(static_cast<float>(a.v[i])); }
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

// kLanes little-endian words of four bytes. HighHalf shifts each word right by 16 bits.
inline I32 LoadWords(const uint8_t* p) {
  I32 y;
  memcpy(y.v, p, sizeof(y.v));
  return y;
}
inline I32 HighHalf(I32 a) {
  for (int i = 0; i < kLanes; ++i)
    a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> 16);
  return a;
}
// 2^23 + (a & mask) - bias. This is exact: the mask has at most 16 low bits, which are the low bits
// of that float.
inline F32 Field(I32 a, int32_t mask, float bias) {
  HYBRID_LANES(static_cast<float>((1 << 23) + (a.v[i] & mask)) - bias);
}

// For predictors, in which lanes are neurons. BroadcastX loads four bytes of x into every lane.
// StartWords is the initial value of sums of products with weights that are 128 too large;
// `correction` is -128 times the sum of x.
inline XBytes BroadcastX(const uint8_t* p) {
  XBytes y;
  for (int i = 0; i < kLine; i += 4) memcpy(y.v + i, p, 4);
  return y;
}
inline I32 StartWords(int32_t) { return StartQ8(nullptr); }
inline F32 ToFloat(I32 a) { HYBRID_LANES(static_cast<float>(a.v[i])); }
// Bit i: lane i is 0 or more, or NaN.
inline uint32_t NotNegative(F32 a) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(!(a.v[i] < 0.0f)) << i;
  return bits;
}
inline I32 ZeroWords() { return StartQ8(nullptr); }
inline I32 AddWords(I32 a, I32 b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
inline I32 BroadcastWord(const uint8_t* p) {
  I32 y;
  for (int i = 0; i < kLanes; ++i) memcpy(y.v + i, p, 4);
  return y;
}

// Eight lanes, whatever the ISA: a group's eight blocks at once, or eight elements of one block.
using F32x8 = F32;
using I32x8 = I32;
static_assert(kLanes == 8, "a register is eight lanes");
inline F32x8 Load8(const float* p) { return Load(p); }
inline void Store8(float* p, F32x8 x) { Store(p, x); }
inline void Store8(void* p, I32x8 x) { memcpy(p, x.v, sizeof(x.v)); }
inline F32x8 Add8(F32x8 a, F32x8 b) { return Add(a, b); }
inline I32x8 Add8(I32x8 a, I32x8 b) { return AddWords(a, b); }
inline F32x8 Mul8(F32x8 a, float b) { return Mul(a, Set(b)); }
// Lane by lane, the larger of |a| and |b|. They are compared as integers, so that a NaN counts as
// the largest of all.
inline F32x8 LargerMagnitude(F32x8 a, F32x8 b) {
  for (int i = 0; i < kLanes; ++i) {
    uint32_t bits[2];
    memcpy(bits, a.v + i, 4);
    memcpy(bits + 1, b.v + i, 4);
    for (uint32_t& magnitude : bits) magnitude &= 0x7fffffffu;
    memcpy(a.v + i, bits + (bits[1] > bits[0]), 4);
  }
  return a;
}
// Lane j of row i becomes lane i of row j.
template <typename X8>
inline void Transpose(X8 (&rows)[8]) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < i; ++j) {
      const auto value = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = value;
    }
}
// The values x[i] * factor of a block, rounded to int8. A value beyond 127, or a NaN, becomes 0.
// Lane l holds the bytes of the elements from 4 * kWordOfLane[l] on. The lanes of `sums` add up to
// the sum of the integers.
constexpr int32_t kWordOfLane[8] = {0, 1, 2, 3, 4, 5, 6, 7};
inline I32x8 RoundBlock(const float* x, float factor, I32x8* sums) {
  I32x8 words;
  int8_t bytes[32];
  for (int l = 0; l < 8; ++l) {
    sums->v[l] = 0;
    for (int i = 4 * l; i < 4 * l + 4; ++i) {
      const float rounded = rintf(x[i] * factor);
      bytes[i] = static_cast<int8_t>(rounded >= -127.0f && rounded <= 127.0f ? rounded : 0.0f);
      sums->v[l] += bytes[i];
    }
  }
  memcpy(words.v, bytes, sizeof(bytes));
  return words;
}

inline void PrefetchL1(const void*) {}
inline void PrefetchL2(const void*) {}

#undef HYBRID_LANES

}  // namespace
}  // namespace hybrid
