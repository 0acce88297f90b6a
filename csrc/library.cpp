// The operators of torch.ops.vllm_trimix; their fake kernels are beside the Python functions that call them.
#include <torch/csrc/stable/library.h>

#include "cpu/dispatch.h"
#include "cpu/sparse_prefill.h"

STABLE_TORCH_LIBRARY(vllm_trimix, m) {
  m.def(
      "sparse_prefill(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor block_count, Tensor block_index, "
      "Tensor? column_count, Tensor? column_index, Tensor? band, int block_size, int position, float scale, "
      "Tensor(b!)? keys_read, str isa) -> ()");
  m.def("cpu_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_trimix, CPU, m) { m.impl("sparse_prefill", TORCH_BOX(&trimix::sparse_prefill)); }

STABLE_TORCH_LIBRARY_IMPL(vllm_trimix, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&trimix::available_isas));
}
