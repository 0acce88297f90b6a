"""The PyTorch kernel of sparse indices against fp64 masked softmax, by error budget."""

from __future__ import annotations

import pytest
import torch

from tests.budget import assert_within_budget
from vllm_trimix.kernels.reference import masked_attention
from vllm_trimix.kernels.sparse_index import build_index
from vllm_trimix.kernels.torch_sparse import sparse_prefill
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.flexprefill import FlexPrefill
from vllm_trimix.patterns.selection import Chunk, Selection
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.patterns.xattention import XAttention

PATTERNS: dict[str, DynamicPattern] = {
    "dense": Dense(),
    "a_shape": AShape(5, 70),
    "vertical_slash": VerticalSlash(40, 110),
    "block_sparse": BlockSparse(3),
    "flexprefill": FlexPrefill(0.5, 0.0),
    "xattention": XAttention(0.5),
}
# Position, sparse rows, keys.
CHUNKS = {"whole": (0, 300, 300), "odd": (77, 223, 300), "one-row": (299, 1, 300), "dense-last-rows": (130, 90, 300)}


def run(
    pattern: DynamicPattern,
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    size: int = 64,
) -> tuple[torch.Tensor, Selection]:
    """Checks one chunk; what no row may read is NaN. Returns the output and the selection."""
    position, num_rows, num_keys = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(num_heads, num_keys - position, size, generator=generator).to(dtype)
    k, v = torch.randn(2, num_kv_heads, num_keys, size, generator=generator).to(dtype)
    scale = 2 * size**-0.5
    chunk = Chunk(q[:, :num_rows], q[:, -128:], k, position, scale)
    selection = pattern.select([pattern] * num_heads, chunk)
    index = build_index(selection)
    end = position + num_rows
    k[:, end:], v[:, end:] = torch.nan, torch.nan
    rows = q[:, :num_rows].transpose(0, 1).contiguous()
    out = torch.full_like(rows, torch.nan)
    keys_read = torch.full(selection.blocks.shape[:2], -1, dtype=torch.int32)
    sparse_prefill(rows, k, v, index, scale=scale, out=out, keys_read=keys_read)
    assert torch.equal(keys_read, index.keys_read())
    mask = selection.mask(num_keys)
    for head in range(num_heads):
        keys, values = (x[head // (num_heads // num_kv_heads), :, None] for x in (k, v))
        one = rows[:, head, None]
        truth = masked_attention(one.double(), keys.double(), values.double(), mask[head], scale=scale)
        plain = masked_attention(one, keys, values, mask[head], scale=scale)
        assert_within_budget(out[:, head, None], truth, plain, what=f"head {head}")
    return out, selection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", CHUNKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_within_budget(pattern: str, shape: str, dtype: torch.dtype) -> None:
    run(PATTERNS[pattern], CHUNKS[shape], dtype=dtype)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (4, 1), (8, 2)])
@pytest.mark.parametrize("size", [32, 96, 128])
def test_heads(num_heads: int, num_kv_heads: int, size: int) -> None:
    for pattern in (VerticalSlash(40, 110), AShape(5, 70)):
        run(pattern, CHUNKS["odd"], dtype=torch.bfloat16, num_heads=num_heads, num_kv_heads=num_kv_heads, size=size)


@pytest.mark.parametrize(
    "pattern",
    [AShape(0, 300), VerticalSlash(), BlockSparse(), FlexPrefill(1.0, 0.0, 64), XAttention(1.0, 8, 64)],
    ids=str,
)
def test_everything_selected_is_dense_bit_by_bit(pattern: DynamicPattern) -> None:
    for shape in CHUNKS.values():
        dense, everything = run(Dense(), shape, dtype=torch.bfloat16)
        out, selection = run(pattern, shape, dtype=torch.bfloat16)
        assert torch.equal(selection.mask(300), everything.mask(300))
        assert torch.equal(out, dense)
