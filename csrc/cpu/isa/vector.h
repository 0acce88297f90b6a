// Vectors of fp32 of the width that this translation unit's flags allow, and conversions from and to the input types.
// Everything in this folder lies in unnamed namespaces: see problem.h.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../problem.h"

namespace trimix {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

constexpr float kMinusInfinity = -__builtin_inff();

inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }
inline Vec splat(float x) { return x - Vec{}; }
inline IntVec splat(int32_t x) { return x - IntVec{}; }

inline IntVec lane_numbers() {
  IntVec x;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = lane;
  return x;
}

// b where either is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline float max_lane(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int lane = 1; lane < kLanes; ++lane) most = x[lane] > most ? x[lane] : most;
  return most;
#endif
}

inline float sum_lanes(Vec x) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += x[lane];
  return sum;
}

// 2**x for x <= 0, relative error 1e-7; 0 for -infinity, NaN for NaN.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0x01);  // x - floor(x)
  Vec p = splat(0.00021702254889532924f);
  p = p * f + 0.0012439688434824347f;
  p = p * f + 0.009678840637207031f;
  p = p * f + 0.055483341217041016f;
  p = p * f + 0.24022983014583588f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const Vec clamped = max(splat(-126.0f), x);
  // Adding 1.5 * 2**23 leaves the nearest integer in the low bits.
  const Vec shifted = clamped + 12582912.0f;
  const Vec f = clamped - (shifted - 12582912.0f);
  Vec p = splat(0.00015345810970757157f);
  p = p * f + 0.0013399930903688073f;
  p = p * f + 0.009618489071726799f;
  p = p * f + 0.05550328642129898f;
  p = p * f + 0.24022646248340607f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  const Vec power = (Vec)((IntVec)p + ((IntVec)shifted << 23));
  return x < -126.0f ? Vec{} : power;
#endif
}

inline float exp2_one(float x) { return exp2(splat(x))[0]; }

inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }

inline uint16_t to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x != x ? 0x7fc0 : uint16_t(rounded);
}

inline float from_fp16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x & 0x8000) << 16;
  // Scaling by 2**112 moves the exponent's bias and normalises denormals; infinity and NaN are set right after.
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000);
  const uint32_t bits = float_to_bits(scaled) | ((x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
  return bits_to_float(bits | sign);
}

inline uint16_t to_fp16(float x) {
  const uint32_t sign = float_to_bits(x) & 0x80000000;
  const uint32_t magnitude = float_to_bits(x) & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000 + 0x0fff + (magnitude >> 13 & 1)) >> 13;
  // Below 2**-14 the sum with 0.5 rounds to the denormal's bits.
  const uint32_t denormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t bits = magnitude >= 0x477ff000 ? infinite : magnitude < 0x38800000 ? denormal : normal;
  return uint16_t(bits | sign >> 16);
}

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace trimix
