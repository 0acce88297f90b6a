// Units: what one lane of a matrix product holds, an fp32 number or a pair of bf16 numbers that are multiplied and summed.
#pragma once

#include "vector.h"

namespace trimix {
namespace {

struct Pair {
  uint16_t first, second;
};

template <class Unit>
constexpr int kDepth = 1;
template <>
constexpr int kDepth<Pair> = 2;

inline const char* element(const void* base, int64_t offset, Dtype dtype) {
  return static_cast<const char*>(base) + offset * (dtype == Dtype::kFloat32 ? 4 : 2);
}

// One row of the input in units, zeros from `size` to `padded`. A null row is all zeros.
inline void load_row(const void* row, Dtype dtype, int64_t size, int64_t padded, float* units) {
  const int64_t filled = row == nullptr ? 0 : size;
  const uint16_t* half = static_cast<const uint16_t*>(row);
  if (dtype == Dtype::kFloat32) {
    if (filled) memcpy(units, row, filled * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    for (int64_t d = 0; d < filled; ++d) units[d] = from_bf16(half[d]);
  } else {
    for (int64_t d = 0; d < filled; ++d) units[d] = from_fp16(half[d]);
  }
  for (int64_t d = filled; d < padded; ++d) units[d] = 0;
}

inline void load_row(const void* row, Dtype, int64_t size, int64_t padded, Pair* units) {
  uint16_t* numbers = &units->first;
  const int64_t filled = row == nullptr ? 0 : size;
  if (filled) memcpy(numbers, row, filled * sizeof(uint16_t));
  memset(numbers + filled, 0, (padded - filled) * sizeof(uint16_t));
}

inline void store_row(const float* values, Dtype dtype, int64_t size, void* row) {
  uint16_t* half = static_cast<uint16_t*>(row);
  if (dtype == Dtype::kFloat32) {
    memcpy(row, values, size * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    for (int64_t d = 0; d < size; ++d) half[d] = to_bf16(values[d]);
  } else {
    for (int64_t d = 0; d < size; ++d) half[d] = to_fp16(values[d]);
  }
}

// dst[column * kPanel + lane] = rows[lane][column], 16 rows of 32-bit units.
template <class Unit>
inline void transpose_rows(const Unit* rows, int64_t row_stride, int64_t columns, Unit* dst) {
  static_assert(sizeof(Unit) == 4, "units are 32 bits wide");
  int64_t first = 0;
#if defined(__AVX512F__)
  for (; first + 16 <= columns; first += 16) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * row_stride + first);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 r + c] holds column 4 l + c of rows 4 r .. 4 r + 3 in its 128-bit lane l.
    for (int c = 0; c < 4; ++c) {
      const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
      const __m512i high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
      const __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
      const __m512i high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
      Unit* column = dst + (first + c) * kPanel;
      _mm512_storeu_si512(column, _mm512_shuffle_i32x4(low01, low23, 0x88));
      _mm512_storeu_si512(column + 4 * kPanel, _mm512_shuffle_i32x4(low01, low23, 0xdd));
      _mm512_storeu_si512(column + 8 * kPanel, _mm512_shuffle_i32x4(high01, high23, 0x88));
      _mm512_storeu_si512(column + 12 * kPanel, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
  }
#endif
  for (int64_t column = first; column < columns; ++column)
    for (int lane = 0; lane < 16; ++lane) dst[column * kPanel + lane] = rows[lane * row_stride + column];
}

// 16 rows of values as [16 / depth][padded][depth].
inline void interleave_rows(const float* rows, int64_t padded, float* dst) {
  memcpy(dst, rows, 16 * padded * sizeof(float));
}

inline void interleave_rows(const Pair* rows, int64_t padded, Pair* dst) {
  const uint16_t* numbers = &rows->first;
  for (int pair = 0; pair < 8; ++pair) {
    const uint16_t* even = numbers + 2 * pair * padded;
    const uint16_t* odd = even + padded;
    Pair* to = dst + pair * padded;
#if defined(__AVX512BW__)
    for (int64_t d = 0; d < padded; d += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + d)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + d)));
      _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
#else
    for (int64_t d = 0; d < padded; ++d) to[d] = Pair{even[d], odd[d]};
#endif
  }
}

// Packs 16 keys and values, each a row of the input or null for zeros.
//
// packed_k points at the first key's place in its panel, [padded / depth][kPanel][depth]; packed_v at its row of values,
// [16 / depth][padded][depth]. `rows` is working memory for 16 rows.
template <class Unit>
void pack_keys(const Problem& p, const void* const* keys, const void* const* values, int64_t padded, Unit* rows,
               Unit* packed_k, Unit* packed_v) {
  const int64_t units = padded / kDepth<Unit>;
  for (int i = 0; i < 16; ++i) load_row(keys[i], p.dtype, p.head_size, padded, rows + i * units);
  transpose_rows(rows, units, units, packed_k);
  for (int i = 0; i < 16; ++i) load_row(values[i], p.dtype, p.head_size, padded, rows + i * units);
  interleave_rows(rows, padded, packed_v);
}

}  // namespace
}  // namespace trimix
