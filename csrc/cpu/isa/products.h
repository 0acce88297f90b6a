// The two matrix products of attention over a step of keys, register-blocked: fp32 multiply-adds, or bf16 pairs.
#pragma once

#include "unit.h"

namespace trimix {
namespace {

// A run of packed keys within one panel.
template <class Unit>
struct Segment {
  const Unit* k;   // First key's place in its panel.
  const Unit* v;   // Its row of values, [count / depth][padded head size][depth].
  int64_t count;   // Keys, a multiple of 16.
  int64_t loaded;  // Of them real; the rest are zeros.
  int64_t offset;  // Place of the first in the step.
  int64_t key;     // Absolute position of the first, or -1 for gathered columns.
};

inline Vec broadcast(const float* x) { return splat(*x); }
inline Vec accumulate(Vec sum, Vec a, const float* b) { return sum + a * load(b); }

#ifdef __AVX512BF16__
inline Vec broadcast(const Pair* x) {
  int32_t both;
  memcpy(&both, x, sizeof both);
  return (Vec)_mm512_set1_epi32(both);
}
inline Vec accumulate(Vec sum, Vec a, const Pair* b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_loadu_si512(b));
}
#endif

// sums[row][vector] += a[row] times the columns of b; a [kRows][steps], b [steps][columns] in units.
template <int kRows, int kVectors, class Unit>
inline __attribute__((always_inline)) void multiply(Vec (&sums)[kRows][kVectors], const Unit* a, int64_t a_row,
                                                    const Unit* b, int64_t b_row, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    for (int row = 0; row < kRows; ++row) {
      const Vec x = broadcast(a + row * a_row + step);
      for (int i = 0; i < kVectors; ++i) sums[row][i] = accumulate(sums[row][i], x, b + step * b_row + i * kLanes);
    }
  }
}

// Products of whole registers. Scratch and tile state are for products that need them.
template <class UnitType>
struct VectorProducts {
  using Unit = UnitType;
  static constexpr int kRows = 4;
  // What fits the registers: 32 with AVX-512, else 16.
  static constexpr int kVectors = kLanes == 16 ? 4 : 2;
  static constexpr int64_t kHeadMultiple = 16;
  static constexpr int64_t kKeyMultiple = 16;
  // Products summed in one go: the rounding of fp32 sums grows with their length.
  static constexpr int64_t kSumSteps = 32 * kDepth<Unit> * kDepth<Unit>;

  // scores [rows][score_row] of q [rows][padded] with a segment's keys, from its offset on.
  void scores(const Unit* q, int64_t rows, int64_t padded, const Segment<Unit>& segment, float* scores,
              int64_t score_row) {
    const int64_t steps = padded / kDepth<Unit>;
    for (int64_t row = 0; row < rows; row += kRows) {
      int64_t key = 0;
      for (; key + kVectors * kLanes <= segment.count; key += kVectors * kLanes)
        score_panel<kVectors>(q + row * steps, steps, segment.k + key, scores + row * score_row + key, score_row);
      for (; key < segment.count; key += kLanes)
        score_panel<1>(q + row * steps, steps, segment.k + key, scores + row * score_row + key, score_row);
    }
  }

  // sums [rows][padded] = alpha [rows] * sums + p [rows][p_row] times the segments' values.
  void values(const Unit* p, int64_t p_row, int64_t rows, int64_t padded, const Segment<Unit>* segments,
              int64_t num_segments, const float* alpha, float* sums) {
    int64_t column = 0;
    for (; column + kVectors * kLanes <= padded; column += kVectors * kLanes)
      for (int64_t row = 0; row < rows; row += kRows)
        value_panel<kVectors>(p + row * p_row, p_row, padded, segments, num_segments, column, alpha + row,
                              sums + row * padded);
    for (; column < padded; column += kLanes)
      for (int64_t row = 0; row < rows; row += kRows)
        value_panel<1>(p + row * p_row, p_row, padded, segments, num_segments, column, alpha + row,
                       sums + row * padded);
  }

 private:
  template <int kColumns>
  static void score_panel(const Unit* q, int64_t steps, const Unit* k, float* scores, int64_t score_row) {
    for (int64_t step = 0; step < steps; step += kSumSteps) {
      Vec sums[kRows][kColumns] = {};
      multiply(sums, q + step, steps, k + step * kPanel, kPanel, min(kSumSteps, steps - step));
      for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kColumns; ++i) {
          float* to = scores + row * score_row + i * kLanes;
          store(to, step == 0 ? sums[row][i] : load(to) + sums[row][i]);
        }
      }
    }
  }

  template <int kColumns>
  static void value_panel(const Unit* p, int64_t p_row, int64_t padded, const Segment<Unit>* segments,
                          int64_t num_segments, int64_t column, const float* alpha, float* out) {
    Vec sums[kRows][kColumns] = {};
    for (int64_t s = 0; s < num_segments; ++s) {
      const Segment<Unit>& segment = segments[s];
      multiply(sums, p + segment.offset / kDepth<Unit>, p_row, segment.v + column, padded,
               segment.count / kDepth<Unit>);
    }
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kColumns; ++i) {
        float* to = out + row * padded + column + i * kLanes;
        store(to, alpha[row] * load(to) + sums[row][i]);
      }
    }
  }
};

}  // namespace
}  // namespace trimix
