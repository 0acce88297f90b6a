#include "sparse_prefill.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <vector>

#include "dispatch.h"

namespace trimix {
namespace {

using torch::headeronly::ScalarType;

// Packed keys and values are kept for as many KV heads at once as fit in this, and for one at least.
constexpr int64_t kPackedBudget = int64_t(256) << 20;

std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

Dtype dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "q has scalar type ", int(q.scalar_type()), "; it must be float32, bfloat16 or float16");
  }
}

void check_numbers(const char* name, const Tensor& tensor, const Tensor& q) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 3, name, " has shape ", shape(tensor), "; it must have 3 dimensions");
  STD_TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), name, " and q have different scalar types, ",
                  int(tensor.scalar_type()), " and ", int(q.scalar_type()));
  STD_TORCH_CHECK(tensor.stride(2) == 1, name, " of shape ", shape(tensor), " has stride ", tensor.stride(2),
                  " in its last dimension; it must be 1");
}

void check_list(const char* name, const Tensor& tensor, int64_t dim, int64_t num_heads, int64_t second) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, " has scalar type ", int(tensor.scalar_type()),
                  "; it must be int32");
  STD_TORCH_CHECK(tensor.dim() == dim && tensor.size(0) == num_heads && tensor.size(1) == second, name, " has shape ",
                  shape(tensor), "; it must be [", num_heads, ", ", second, dim == 3 ? ", *]" : "]");
}

struct AlignedFree {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, AlignedFree>;

int64_t line_multiple(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Memory allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(64, line_multiple(bytes));
  STD_TORCH_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes of packed keys and values");
  return Memory(static_cast<char*>(memory));
}

struct Item {
  int64_t head, tile, keys;
};

int64_t num_columns(const Problem& p, int64_t head, int64_t tile) {
  return p.column_count ? p.column_count[head * p.column_count_head + tile * p.column_count_tile] : 0;
}

int64_t num_blocks(const Problem& p, int64_t head, int64_t tile) {
  return p.block_count[head * p.block_count_head + tile * p.block_count_tile];
}

// What is wrong with the lists of a tile, or nothing; marks its blocks in `listed`.
std::string check_tile(const Problem& p, int64_t head, int64_t tile, int64_t max_blocks, int64_t max_columns,
                       char* listed) {
  const int64_t own = first_tile(p) + tile;
  const int64_t blocks = num_blocks(p, head, tile), columns = num_columns(p, head, tile);
  std::ostringstream problem;
  if (blocks < 1 || blocks > max_blocks) problem << "block_count is " << blocks << ", outside 1.." << max_blocks;
  if (columns < 0 || columns > max_columns) problem << "column_count is " << columns << ", outside 0.." << max_columns;
  if (problem.tellp() > 0) return problem.str();
  int64_t previous = -1;
  const int32_t* list = p.block_index + head * p.block_index_head + tile * p.block_index_tile;
  for (int64_t place = 0; place < blocks; ++place) {
    const int64_t block = list[place * p.block_index_place];
    if (block <= previous || block > own) {
      problem << "block_index holds " << block << " after " << previous << "; blocks must ascend to the tile's own, "
              << own;
      return problem.str();
    }
    listed[block] = 1;
    previous = block;
  }
  if (previous != own) {
    problem << "block_index ends with " << previous << ", not with the tile's own block " << own;
    return problem.str();
  }
  previous = -1;
  list = p.column_index + head * p.column_index_head + tile * p.column_index_tile;
  for (int64_t place = 0; place < columns; ++place) {
    const int64_t column = list[place * p.column_index_place];
    if (column <= previous || column >= own * p.block_size) {
      problem << "column_index holds " << column << " after " << previous << "; columns must ascend and lie before "
              << own * p.block_size;
      return problem.str();
    }
    previous = column;
  }
  return {};
}

// Blocks that some tile lists, [num_kv_heads][blocks].
std::vector<char> check_lists(const Problem& p, int64_t max_blocks, int64_t max_columns) {
  const int64_t blocks = first_tile(p) + p.num_tiles, group = p.num_heads / p.num_kv_heads;
  std::vector<char> listed(p.num_kv_heads * blocks);
  std::vector<std::string> problems(p.num_kv_heads);
  torch::stable::parallel_for(0, p.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t kv_head = begin; kv_head < end; ++kv_head) {
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t tile = 0; tile < p.num_tiles; ++tile) {
          const std::string problem = check_tile(p, head, tile, max_blocks, max_columns, &listed[kv_head * blocks]);
          if (problem.empty() || !problems[kv_head].empty()) continue;
          problems[kv_head] = "head " + std::to_string(head) + ", tile " + std::to_string(tile) + ": " + problem;
        }
      }
    }
  });
  for (const std::string& problem : problems) STD_TORCH_CHECK(problem.empty(), problem);
  return listed;
}

// Work items of some KV heads, the longest first, so that threads end together.
std::vector<Item> make_items(const Problem& p, int64_t first_kv_head, int64_t last_kv_head) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  std::vector<Item> items;
  for (int64_t head = first_kv_head * group; head < last_kv_head * group; ++head)
    for (int64_t tile = 0; tile < p.num_tiles; ++tile)
      items.push_back({head, tile, num_blocks(p, head, tile) * p.block_size + num_columns(p, head, tile)});
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.keys > b.keys; });
  return items;
}

struct KeysRead {
  int32_t* counts = nullptr;  // [num_heads, num_tiles] or null.
  int64_t head = 0, tile = 0;
};

void run(const Problem& p, const Kernel& kernel, const std::vector<char>& listed, KeysRead keys_read) {
  const int64_t blocks = first_tile(p) + p.num_tiles, group = p.num_heads / p.num_kv_heads;
  const int64_t bytes = line_multiple(kernel.packed_bytes(p)), scratch_bytes = line_multiple(kernel.scratch_bytes(p));
  const int64_t at_once = std::clamp(kPackedBudget / (2 * bytes), int64_t(1), p.num_kv_heads);
  const Memory packed = allocate(2 * bytes * at_once);
  const int64_t num_threads = torch::stable::get_num_threads();
  const Memory scratch = allocate(scratch_bytes * num_threads);
  for (int64_t first = 0; first < p.num_kv_heads; first += at_once) {
    const int64_t last = std::min(first + at_once, p.num_kv_heads);
    const auto packed_k = [&](int64_t kv_head) { return packed.get() + 2 * bytes * (kv_head - first); };
    const auto packed_v = [&](int64_t kv_head) { return packed_k(kv_head) + bytes; };
    torch::stable::parallel_for(first * blocks, last * blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t kv_head = i / blocks;
        if (listed[i]) kernel.pack_block(p, kv_head, i % blocks, packed_k(kv_head), packed_v(kv_head));
      }
    });
    const std::vector<Item> items = make_items(p, first, last);
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t) {
      for (size_t i = next++; i < items.size(); i = next++) {
        const Item& item = items[i];
        const int64_t kv_head = item.head / group;
        const int64_t keys = kernel.attend_tile(p, packed_k(kv_head), packed_v(kv_head), item.head, item.tile,
                                                scratch.get() + begin * scratch_bytes);
        if (keys_read.counts) keys_read.counts[item.head * keys_read.head + item.tile * keys_read.tile] = int32_t(keys);
      }
    });
  }
}

const Kernel& choose(const std::string& isa, Dtype dtype, int64_t block_size) {
  if (isa.empty()) return fastest_kernel(dtype, block_size);
  const Kernel* kernel = find_kernel(isa);
  STD_TORCH_CHECK(kernel != nullptr, "isa '", isa, "' can't run here; there are ", available_isas());
  STD_TORCH_CHECK(dtype == Dtype::kBFloat16 || !kernel->bf16_only, "isa '", isa, "' takes bfloat16 only");
  STD_TORCH_CHECK(block_size % kernel->block_multiple == 0, "isa '", isa, "' takes blocks of multiples of ",
                  kernel->block_multiple, ", not of ", block_size);
  return *kernel;
}

}  // namespace

void sparse_prefill(Tensor q, Tensor k, Tensor v, Tensor out, Tensor block_count, Tensor block_index,
                    std::optional<Tensor> column_count, std::optional<Tensor> column_index, std::optional<Tensor> band,
                    int64_t block_size, int64_t position, double scale, std::optional<Tensor> keys_read,
                    std::string isa) {
  Problem p{};
  p.dtype = dtype_of(q);
  check_numbers("q", q, q);
  check_numbers("k", k, q);
  check_numbers("v", v, q);
  check_numbers("out", out, q);
  p.num_rows = q.size(0), p.num_heads = q.size(1), p.head_size = q.size(2);
  p.num_kv_heads = k.size(0), p.num_keys = k.size(1);
  STD_TORCH_CHECK(p.num_rows > 0 && p.num_heads > 0, "q has shape ", shape(q), "; there must be rows and heads");
  STD_TORCH_CHECK(p.head_size >= kMinHeadSize && p.head_size <= kMaxHeadSize && p.head_size % 8 == 0, "q has shape ",
                  shape(q), "; head sizes must be multiples of 8 from ", kMinHeadSize, " to ", kMaxHeadSize);
  STD_TORCH_CHECK(k.size(2) == p.head_size, "k has shape ", shape(k), ", q ", shape(q), "; head sizes differ");
  STD_TORCH_CHECK(std::equal(v.sizes().begin(), v.sizes().end(), k.sizes().begin()), "v has shape ", shape(v), ", k ",
                  shape(k), "; they must be the same");
  STD_TORCH_CHECK(std::equal(out.sizes().begin(), out.sizes().end(), q.sizes().begin()), "out has shape ", shape(out),
                  ", q ", shape(q), "; they must be the same");
  STD_TORCH_CHECK(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0, "q has shape ", shape(q), ", k ", shape(k),
                  "; heads must be a multiple of KV heads");
  STD_TORCH_CHECK(block_size >= 16 && block_size <= kMaxBlockSize && block_size % 16 == 0, "block_size is ", block_size,
                  "; it must be a multiple of 16 from 16 to ", kMaxBlockSize);
  STD_TORCH_CHECK(position >= 0 && position + p.num_rows <= p.num_keys, "rows at positions ", position, "..",
                  position + p.num_rows - 1, " lie outside k of shape ", shape(k));
  STD_TORCH_CHECK(scale > 0, "scale is ", scale, "; it must be above 0");
  p.block_size = block_size, p.position = position, p.scale = float(scale);
  p.num_tiles = (position + p.num_rows - 1) / block_size - first_tile(p) + 1;
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr(), p.out = out.mutable_data_ptr();
  p.q_row = q.stride(0), p.q_head = q.stride(1), p.out_row = out.stride(0), p.out_head = out.stride(1);
  p.k_head = k.stride(0), p.k_key = k.stride(1), p.v_head = v.stride(0), p.v_key = v.stride(1);

  check_list("block_count", block_count, 2, p.num_heads, p.num_tiles);
  check_list("block_index", block_index, 3, p.num_heads, p.num_tiles);
  p.block_count = block_count.const_data_ptr<int32_t>(), p.block_index = block_index.const_data_ptr<int32_t>();
  p.block_count_head = block_count.stride(0), p.block_count_tile = block_count.stride(1);
  p.block_index_head = block_index.stride(0), p.block_index_tile = block_index.stride(1);
  p.block_index_place = block_index.stride(2);
  STD_TORCH_CHECK(column_count.has_value() == column_index.has_value(),
                  "column_count and column_index must be given together");
  if (column_count) {
    check_list("column_count", *column_count, 2, p.num_heads, p.num_tiles);
    check_list("column_index", *column_index, 3, p.num_heads, p.num_tiles);
    p.column_count = column_count->const_data_ptr<int32_t>(), p.column_index = column_index->const_data_ptr<int32_t>();
    p.column_count_head = column_count->stride(0), p.column_count_tile = column_count->stride(1);
    p.column_index_head = column_index->stride(0), p.column_index_tile = column_index->stride(1);
    p.column_index_place = column_index->stride(2);
  }
  if (band) {
    check_list("band", *band, 2, p.num_heads, 2);
    p.band = band->const_data_ptr<int32_t>(), p.band_head = band->stride(0), p.band_side = band->stride(1);
  }
  KeysRead counts;
  if (keys_read) {
    check_list("keys_read", *keys_read, 2, p.num_heads, p.num_tiles);
    counts = {keys_read->mutable_data_ptr<int32_t>(), keys_read->stride(0), keys_read->stride(1)};
  }
  const Kernel& kernel = choose(isa, p.dtype, block_size);
  run(p, kernel, check_lists(p, block_index.size(2), column_index ? column_index->size(2) : 0), counts);
}

}  // namespace trimix
