// What the operator hands to the kernel of one instruction set. Plain data and function pointers: translation units with
// their own -m flags share nothing that the linker could merge, so no instruction reaches a CPU that lacks it.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trimix {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

// Key panels: the packed K of one KV head is [panel][head_size / depth][kPanel][depth].
constexpr int64_t kPanel = 64;
constexpr int64_t kMinHeadSize = 16;
constexpr int64_t kMaxHeadSize = 256;
constexpr int64_t kMaxBlockSize = 256;

// Strides are in elements.
struct Problem {
  const void* q;  // [num_rows, num_heads, head_size]
  const void* k;  // [num_kv_heads, num_keys, head_size]
  const void* v;
  void* out;  // Like q.
  int64_t q_row, q_head, k_head, k_key, v_head, v_key, out_row, out_head;
  Dtype dtype;
  int64_t num_rows, num_heads, num_kv_heads, num_keys, head_size;

  const int32_t* block_count;  // [num_heads, num_tiles]
  const int32_t* block_index;  // [num_heads, num_tiles, max_blocks]
  int64_t block_count_head, block_count_tile, block_index_head, block_index_tile, block_index_place;
  const int32_t* column_count;  // Like block_count, or null.
  const int32_t* column_index;
  int64_t column_count_head, column_count_tile, column_index_head, column_index_tile, column_index_place;
  const int32_t* band;  // [num_heads, 2] or null.
  int64_t band_head, band_side;

  int64_t block_size, position, num_tiles;
  float scale;
};

// Without linkage, like all that is compiled with more than one set of flags.
namespace {
// Keys from here on belong to no row.
inline int64_t key_end(const Problem& p) { return p.position + p.num_rows; }
// Number of the first tile, also of its own block.
inline int64_t first_tile(const Problem& p) { return p.position / p.block_size; }
}  // namespace

// One instruction set's kernel.
struct Kernel {
  bool bf16_only;
  // Block sizes must be a multiple of this.
  int64_t block_multiple;
  // Bytes that the packed K, and as much again the packed V, of one KV head take.
  int64_t (*packed_bytes)(const Problem&);
  // Bytes of working memory per thread.
  int64_t (*scratch_bytes)(const Problem&);
  // Packs one block of keys and values of a KV head; keys from key_end(p) on are not read.
  void (*pack_block)(const Problem&, int64_t kv_head, int64_t block, void* packed_k, void* packed_v);
  // Attention of one tile of one head, written to `out`; returns the number of keys that it loaded.
  int64_t (*attend_tile)(const Problem&, const void* packed_k, const void* packed_v, int64_t head, int64_t tile,
                         void* scratch);
};

extern const Kernel kPortableKernel;
#ifdef TRIMIX_WITH_X86
extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;
extern const Kernel kAvx512Bf16Kernel;
extern const Kernel kAmxKernel;
extern const Kernel kAmxEmulatedKernel;
#endif

}  // namespace trimix
