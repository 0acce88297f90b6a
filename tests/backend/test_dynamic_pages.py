"""What dynamic patterns read of a CUDA cache: a request's keys, in order, whatever the cache's layout and precision."""

from __future__ import annotations

import pytest
import torch

from vllm_trimix.backend.dynamic.cuda_pages import CudaPages, dequantised
from vllm_trimix.kernels.layer_call import LayerCall, Scales


def _pages(cache: torch.Tensor, block_table: torch.Tensor, k_scale: torch.Tensor | None) -> CudaPages:
    """The cache of a layer that computes in bf16."""
    rows = torch.empty(0, cache.shape[1], cache.shape[3], dtype=torch.bfloat16)
    return CudaPages(LayerCall(rows, cache, cache, rows, 1.0, scales=Scales(k=k_scale)), block_table, 1, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("heads_first", [False, True], ids=["NHD", "HND"])
def test_keys_of_a_request(heads_first: bool, dtype: torch.dtype) -> None:
    pages, kv_heads, page_size, head_size = 7, 4, 16, 32
    keys = torch.randn(pages, kv_heads, page_size, head_size).to(dtype)
    order = (0, 1, 2, 3) if heads_first else (0, 2, 1, 3)
    cache = keys.permute(order).contiguous().permute(order)
    block_table = torch.tensor([[0, 0, 0], [3, 1, 6]], dtype=torch.int32)
    scale = None if dtype == torch.bfloat16 else torch.tensor(0.5)
    read = _pages(cache, block_table, scale)
    found = read.gather(1, 40, 1, 2).k
    expected = torch.cat([keys[page] for page in (3, 1, 6)], dim=1)[1:3, :40].to(torch.bfloat16)
    assert torch.equal(found, expected if scale is None else expected / 2)


def test_fp8_keys_count_in_both_precisions() -> None:
    """What is gathered and what it becomes are held at once, and nothing else: a slab's size follows from it."""
    cache = torch.ones(8, 4, 16, 32).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.5)
    read = _pages(cache, torch.zeros(1, 1, dtype=torch.int32), scale)
    with torch.profiler.profile(profile_memory=True) as profile:
        keys = dequantised(cache, scale, torch.bfloat16)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    # The scale in bf16 is the rest.
    assert keys.nbytes <= allocated <= keys.nbytes + 64
    assert read.bytes_per_token * 8 * 4 * 16 == cache.nbytes + keys.nbytes
