// The two matrix products by AMX tiles: 2 x 2 tiles of 16 x 16 sums. TILES does the tile operations.
#pragma once

#include "products.h"

namespace trimix {
namespace {

template <class Tiles>
struct AmxProducts {
  using Unit = Pair;
  static constexpr int kRows = 32;
  // A tile holds 16 rows of 32 bf16 numbers, or of 16 fp32 sums.
  static constexpr int64_t kHeadMultiple = 32;
  static constexpr int64_t kKeyMultiple = 32;
  static constexpr int64_t kTile = 16;

  void scores(const Pair* q, int64_t rows, int64_t padded, const Segment<Pair>& segment, float* scores,
              int64_t score_row) {
    const int64_t steps = padded / 2;
    for (int64_t row = 0; row < rows; row += kRows) {
      for (int64_t key = 0; key < segment.count; key += 2 * kTile) {
        tiles_.zero();
        multiply(q + row * steps, steps, segment.k + key, kPanel, steps);
        tiles_.store_sums(scores + row * score_row + key, score_row);
      }
    }
  }

  void values(const Pair* p, int64_t p_row, int64_t rows, int64_t padded, const Segment<Pair>* segments,
              int64_t num_segments, const float* alpha, float* sums) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t d = 0; d < padded; d += kLanes)
        store(sums + row * padded + d, alpha[row] * load(sums + row * padded + d));
    for (int64_t row = 0; row < rows; row += kRows) {
      for (int64_t column = 0; column < padded; column += 2 * kTile) {
        tiles_.load_sums(sums + row * padded + column, padded);
        for (int64_t s = 0; s < num_segments; ++s) {
          const Segment<Pair>& segment = segments[s];
          multiply(p + row * p_row + segment.offset / 2, p_row, segment.v + column, padded, segment.count / 2);
        }
        tiles_.store_sums(sums + row * padded + column, padded);
      }
    }
  }

 private:
  // Sums += a [32][steps] times b [steps][32], in pairs.
  void multiply(const Pair* a, int64_t a_row, const Pair* b, int64_t b_row, int64_t steps) {
    for (int64_t step = 0; step < steps; step += kTile) {
      tiles_.load_a(a + step, a_row);
      tiles_.load_b(b + step * b_row, b_row);
      tiles_.multiply();
    }
  }

  Tiles tiles_;
};

}  // namespace
}  // namespace trimix
