#include <immintrin.h>

#include "amx_products.h"
#include "attend.h"

namespace trimix {
namespace {

struct alignas(64) Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == 64, "as LDTILECFG reads it");
constexpr Configuration kConfiguration;

// GCC's tile loads don't tell the compiler that they read memory: without this, earlier stores may come after them.
inline void memory_is_written() { __asm__ volatile("" ::: "memory"); }

// Tiles 0-3 are the sums, 4-5 the left and 6-7 the right operands. Configured from construction to destruction.
struct HardwareTiles {
  HardwareTiles() {
    memory_is_written();
    _tile_loadconfig(&kConfiguration);
  }
  ~HardwareTiles() { _tile_release(); }

  void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  void load_sums(const float* sums, int64_t row) {
    memory_is_written();
    _tile_loadd(0, sums, row * 4);
    _tile_loadd(1, sums + 16, row * 4);
    _tile_loadd(2, sums + 16 * row, row * 4);
    _tile_loadd(3, sums + 16 * row + 16, row * 4);
  }
  void store_sums(float* sums, int64_t row) {
    _tile_stored(0, sums, row * 4);
    _tile_stored(1, sums + 16, row * 4);
    _tile_stored(2, sums + 16 * row, row * 4);
    _tile_stored(3, sums + 16 * row + 16, row * 4);
  }
  void load_a(const Pair* a, int64_t row) {
    memory_is_written();
    _tile_loadd(4, a, row * 4);
    _tile_loadd(5, a + 16 * row, row * 4);
  }
  void load_b(const Pair* b, int64_t row) {
    memory_is_written();
    _tile_loadd(6, b, row * 4);
    _tile_loadd(7, b + 16, row * 4);
  }
  void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

}  // namespace

const Kernel kAmxKernel = kernel_of<AmxProducts<HardwareTiles>>(true);
}  // namespace trimix
