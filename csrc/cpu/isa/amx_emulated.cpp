// The AMX kernel with its tile operations written out: tests run it where there is no AMX. Never chosen by itself.
#include "amx_products.h"
#include "attend.h"

namespace trimix {
namespace {

struct EmulatedTiles {
  float sums[4][16][16];
  Pair a[2][16][16], b[2][16][16];

  void zero() { memset(sums, 0, sizeof sums); }
  void load_sums(const float* from, int64_t row) {
    for (int tile = 0; tile < 4; ++tile)
      for (int i = 0; i < 16; ++i) memcpy(sums[tile][i], from + (tile / 2 * 16 + i) * row + tile % 2 * 16, 64);
  }
  void store_sums(float* to, int64_t row) {
    for (int tile = 0; tile < 4; ++tile)
      for (int i = 0; i < 16; ++i) memcpy(to + (tile / 2 * 16 + i) * row + tile % 2 * 16, sums[tile][i], 64);
  }
  void load_a(const Pair* from, int64_t row) {
    for (int i = 0; i < 32; ++i) memcpy(a[i / 16][i % 16], from + i * row, 64);
  }
  void load_b(const Pair* from, int64_t row) {
    for (int i = 0; i < 32; ++i) memcpy(b[i % 2][i / 2], from + i / 2 * row + i % 2 * 16, 64);
  }
  void multiply() {
    for (int tile = 0; tile < 4; ++tile) product(sums[tile], a[tile / 2], b[tile % 2]);
  }

  // TDPBF16PS: pairs in turn, first then second.
  static void product(float (&to)[16][16], const Pair (&left)[16][16], const Pair (&right)[16][16]) {
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 16; ++n) {
          to[m][n] += from_bf16(left[m][k].first) * from_bf16(right[k][n].first);
          to[m][n] += from_bf16(left[m][k].second) * from_bf16(right[k][n].second);
        }
  }
};

}  // namespace

const Kernel kAmxEmulatedKernel = kernel_of<AmxProducts<EmulatedTiles>>(true);
}  // namespace trimix
