// The CPU operator: checks, packing of keys and values, and the schedule of tiles over threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace trimix {

using torch::stable::Tensor;

// Attention of one chunk's rows over the keys of a sparse index, into `out`.
//
// q, out [num_rows, num_heads, head_size]; k, v [num_kv_heads, num_keys, head_size]; block_count, column_count and
// keys_read int32 [num_heads, num_tiles]; block_index, column_index int32 [num_heads, num_tiles, *]; band int32
// [num_heads, 2]. `scale` is above 0; `isa` names a kernel; empty: the fastest.
void sparse_prefill(Tensor q, Tensor k, Tensor v, Tensor out, Tensor block_count, Tensor block_index,
                    std::optional<Tensor> column_count, std::optional<Tensor> column_index, std::optional<Tensor> band,
                    int64_t block_size, int64_t position, double scale, std::optional<Tensor> keys_read,
                    std::string isa);

}  // namespace trimix
