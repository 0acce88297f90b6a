"""What dynamic patterns read of a CUDA cache: a request's keys, in order, whatever the cache's layout and precision."""

from __future__ import annotations

import pytest
import torch

from vllm_trimix.backend.dynamic import CudaPages
from vllm_trimix.backend.prefill import Scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("heads_first", [False, True], ids=["NHD", "HND"])
def test_keys_of_a_request(heads_first: bool, dtype: torch.dtype) -> None:
    pages, kv_heads, page_size, head_size = 7, 4, 16, 32
    keys = torch.randn(pages, kv_heads, page_size, head_size).to(dtype)
    order = (0, 1, 2, 3) if heads_first else (0, 2, 1, 3)
    cache = keys.permute(order).contiguous().permute(order)
    block_table = torch.tensor([[0, 0, 0], [3, 1, 6]], dtype=torch.int32)
    scale = None if dtype == torch.bfloat16 else torch.tensor(0.5)
    read = CudaPages(cache, cache, block_table, 1.0, 0.0, Scales(None, scale, None), torch.bfloat16, 1, {})
    found = read.gather(1, 40, 1, 2).k
    expected = torch.cat([keys[page] for page in (3, 1, 6)], dim=1)[1:3, :40].to(torch.bfloat16)
    assert torch.equal(found, expected if scale is None else expected / 2)
