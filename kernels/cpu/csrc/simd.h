// Eight floats at a time, written once: compiler vectors everywhere, intrinsics where the translation unit's flags allow.
// Everything is static so that no function compiled for one instruction set can be linked into another's code.
#pragma once

#include <cstdint>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define AWQ_SIMD_AVX2 1
#else
#define AWQ_SIMD_AVX2 0
#endif

#define AWQ_INLINE static inline __attribute__((always_inline))
#define AWQ_NOINLINE static __attribute__((noinline))

namespace {

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef double D4 __attribute__((vector_size(32)));

constexpr int kLanes = 8;

AWQ_INLINE F8 load8(const float* p) {
  F8 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
AWQ_INLINE void store8(float* p, F8 v) { __builtin_memcpy(p, &v, sizeof v); }
AWQ_INLINE void prefetch_line(const char* p) { __builtin_prefetch(p, 0, 3); }
AWQ_INLINE F8 set8(float x) { return F8{x, x, x, x, x, x, x, x}; }
AWQ_INLINE F8 select8(I8 mask, F8 yes, F8 no) { return mask ? yes : no; }

AWQ_INLINE F8 fma8(F8 a, F8 b, F8 c) {
#if AWQ_SIMD_AVX2
  return (F8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The second operand where either is NaN, as vmaxps has it.
AWQ_INLINE F8 max8(F8 a, F8 b) {
#if AWQ_SIMD_AVX2
  return (F8)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

AWQ_INLINE F8 swap_halves8(F8 v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3); }
AWQ_INLINE F8 swap_pairs8(F8 v) { return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5); }
AWQ_INLINE F8 swap_neighbours8(F8 v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6); }

// Lanes are always summed in this order: halves, then pairs, then neighbours.
AWQ_INLINE float sum8(F8 v) {
  v = v + swap_halves8(v);
  v = v + swap_pairs8(v);
  v = v + swap_neighbours8(v);
  return v[0];
}
AWQ_INLINE float max_lane8(F8 v) {
  v = max8(v, swap_halves8(v));
  v = max8(v, swap_pairs8(v));
  v = max8(v, swap_neighbours8(v));
  return v[0];
}

// To nearest even; past the range to Inf.
AWQ_INLINE uint16_t scalar_float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;
  if (bits < 0x38800000u) {  // subnormal: let fp32 addition round at the right place
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>(bits >> 13);
}

AWQ_INLINE F8 load_half8(const uint16_t* p) {
#if AWQ_SIMD_AVX2
  return (F8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Exponents are rebased by a multiplication, which handles subnormals; Inf and NaN need theirs set.
  U8 bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = p[i];
  const U8 magnitude = (bits & 0x7fffu) << 13;
  const U8 value = (U8)((F8)magnitude * set8(0x1p112f));
  const U8 special = (U8)((bits & 0x7c00u) == 0x7c00u);
  return (F8)(((special & (magnitude | 0x7f800000u)) | (~special & value)) | ((bits & 0x8000u) << 16));
#endif
}
AWQ_INLINE void store_half8(uint16_t* p, F8 v) {
#if AWQ_SIMD_AVX2
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = scalar_float_to_half(v[i]);
#endif
}
AWQ_INLINE F8 load_bfloat8(const uint16_t* p) {
  I8 bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return (F8)bits;
}
AWQ_INLINE F8 load_int8(const int8_t* p) {
#if AWQ_SIMD_AVX2
  return (F8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  F8 v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// 2^f for |f| a little over 1/2 at most: a polynomial after Cephes' exp2f (2 ulp), exactly 1 at 0.
AWQ_INLINE F8 exp2_fraction8(F8 f) {
  F8 p = set8(1.535336188319500e-4f);
  p = fma8(p, f, set8(1.339887440266574e-3f));
  p = fma8(p, f, set8(9.618437357674640e-3f));
  p = fma8(p, f, set8(5.550332471162809e-2f));
  p = fma8(p, f, set8(2.402264791363012e-1f));
  p = fma8(p, f, set8(6.931472028550421e-1f));
  return fma8(p, f, set8(1.0f));
}

// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
constexpr float kRoundingMagic = 12582912.0f;

// 2^n from n + kRoundingMagic. To be multiplied, not added to an exponent, so that NaN cannot turn into a number.
AWQ_INLINE F8 power_of_two8(F8 shifted) { return (F8)(((U8)shifted << 23) + 0x3f800000u); }

// 2^x; 0 below -126, Inf from 128 on, NaN stays NaN.
AWQ_INLINE F8 exp2_8(F8 x) {
  const F8 shifted = x + set8(kRoundingMagic);
  const F8 value = exp2_fraction8(x - (shifted - set8(kRoundingMagic))) * power_of_two8(shifted);
  return select8(x < -126.0f, set8(0.0f), select8(x >= 128.0f, set8(__builtin_inff()), value));
}

// The same for x <= 0 or NaN, as a softmax has it.
AWQ_INLINE F8 exp2_nonpositive8(F8 x) {
  const F8 shifted = x + set8(kRoundingMagic);
  const F8 value = exp2_fraction8(x - (shifted - set8(kRoundingMagic))) * power_of_two8(shifted);
  return select8(x < -126.0f, set8(0.0f), value);
}

// e^x: the same polynomial after a reduction in two parts, so that large |x| lose nothing.
AWQ_INLINE F8 exp_8(F8 x) {
  const F8 shifted = fma8(x, set8(1.44269504f), set8(kRoundingMagic)), n = shifted - set8(kRoundingMagic);
  const F8 r = fma8(n, set8(2.12194440e-4f), fma8(n, set8(-0.693359375f), x));
  const F8 value = exp2_fraction8(r * set8(1.44269504f)) * power_of_two8(shifted);
  return select8(x < -87.3f, set8(0.0f), select8(x > 88.0f, set8(__builtin_inff()), value));
}

// tanh x = 1 - 2 / (e^2x + 1)
AWQ_INLINE F8 tanh_8(F8 x) { return set8(1.0f) - set8(2.0f) / (exp_8(x + x) + set8(1.0f)); }

}  // namespace
