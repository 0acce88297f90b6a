"""The CPU kernel against fp64 masked softmax, by error budget."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.budget import assert_within_budget
from vllm_trimix.kernels import torch_cpu
from vllm_trimix.kernels.reference import gather_pages, masked_attention
from vllm_trimix.kernels.torch_cpu import PageLayout, known_layouts, layout_from_index
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Span

ATTENDS = {
    "bmm": torch_cpu.attend_bmm,
    "fp32": torch_cpu.attend_fp32,
    "sdpa": torch_cpu.attend_sdpa,
}


def pack(tokens: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Stores token-major pages [num_blocks, heads, block_size, head_size] as the layout says."""
    num_blocks, heads, block_size, head_size = tokens.shape
    order = layout.tokens(torch.arange(block_size * head_size).view(1, 1, -1)).flatten()
    pages = torch.empty(num_blocks, heads, block_size * head_size, dtype=tokens.dtype)
    pages[:, :, order] = tokens.reshape(num_blocks, heads, -1)
    return pages


def check(
    *,
    dtype: torch.dtype,
    requests: list[tuple[int, int]],
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 32,
    n_init: int = 8,
    n_local: int = 100,
    layout: int = 1,
    attend: str | None = None,
    seed: int = 0,
) -> None:
    """Runs chunks (position, rows) of several requests, with permuted pages and NaN wherever nothing may be read."""
    torch.manual_seed(seed)
    pattern = Triangle(n_init, n_local, last_n=0)
    scale = head_size**-0.5
    max_blocks = max(-(-(position + rows) // block_size) for position, rows in requests)
    num_blocks = 1 + max_blocks * len(requests)
    k = torch.full((num_blocks, num_kv_heads, block_size, head_size), torch.nan, dtype=dtype)
    v = k.clone()
    block_table = (torch.randperm(num_blocks - 1) + 1).view(len(requests), max_blocks).to(torch.int32)
    spans, first_row = [], 3
    for index, (position, rows) in enumerate(requests):
        end = position + rows
        for j in range(end):
            block = block_table[index, j // block_size]
            k[block, :, j % block_size] = torch.randn(num_kv_heads, head_size).to(dtype)
            v[block, :, j % block_size] = torch.randn(num_kv_heads, head_size).to(dtype)
        spans.append(Span(index, first_row, rows, position))
        first_row += rows + 2
    q = torch.randn(first_row, num_heads, head_size).to(dtype)
    out = torch.full_like(q, torch.nan)
    layouts = known_layouts(block_size, head_size)
    k_layout, v_layout = layouts[layout % len(layouts)], layouts[(layout + 1) % len(layouts)]
    torch_cpu.triangle_prefill(
        q,
        pack(k, k_layout),
        pack(v, v_layout),
        block_table,
        spans,
        k_layout=k_layout,
        v_layout=v_layout,
        block_size=block_size,
        n_init=n_init,
        n_local=n_local,
        scale=scale,
        out=out,
        attend=ATTENDS[attend] if attend else None,
    )
    touched = torch.zeros(len(q), dtype=torch.bool)
    for span in spans:
        rows = slice(span.first_row, span.first_row + span.num_rows)
        touched[rows] = True
        end = span.position + span.num_rows
        mask = pattern.mask(torch.arange(span.position, end), torch.arange(end), end)
        keys, values = (gather_pages(x, block_table[span.request], end) for x in (k, v))
        truth = masked_attention(q[rows].double(), keys.double(), values.double(), mask, scale=scale)
        plain = masked_attention(q[rows], keys, values, mask, scale=scale)
        assert_within_budget(out[rows], truth, plain)
    assert out[~touched].isnan().all(), "rows outside the spans were written"


SHAPES = {
    "one": [(0, 1)],
    "odd": [(0, 63)],
    "chunk": [(300, 113)],
    "straddling": [(90, 70)],
    "batch": [(0, 130), (257, 64), (1000, 1), (64, 65)],
    "long": [(0, 700)],
}


@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tile_kernels(shape: str, dtype: torch.dtype, attend: str) -> None:
    check(dtype=dtype, requests=SHAPES[shape], attend=attend)


@pytest.mark.parametrize(
    ("heads", "head_size"),
    [(heads, size) for heads, size in itertools.product([(4, 4), (8, 2), (8, 1), (16, 1)], [32, 64, 96, 128, 256])],
    ids=lambda value: str(value),
)
def test_heads(heads: tuple[int, int], head_size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(
            dtype=dtype, requests=[(200, 90)], num_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, layout=2
        )


@pytest.mark.parametrize("block_size", [16, 32, 96, 128])
@pytest.mark.parametrize("layout", range(4))
def test_pages(block_size: int, layout: int) -> None:
    check(dtype=torch.float32, requests=[(0, 200), (301, 150)], block_size=block_size, layout=layout)


@pytest.mark.parametrize(("n_init", "n_local"), [(0, 1), (0, 100), (8, 1), (8, 16), (40, 16), (200, 33), (1, 512)])
def test_parameters(n_init: int, n_local: int) -> None:
    check(dtype=torch.float32, requests=[(0, 260), (190, 70), (640, 129)], n_init=n_init, n_local=n_local)


def test_threads_batch_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    check(dtype=torch.float32, requests=[(0, 700), (513, 450)])


def test_unknown_layouts_are_read_by_index() -> None:
    block_size, head_size = 32, 16
    index = torch.randperm(block_size * head_size)
    layout = layout_from_index(index, block_size=block_size, head_size=head_size)
    assert layout.index is not None
    tokens = torch.randn(3, 2, block_size, head_size)
    pages = torch.empty(3, 2, block_size * head_size)
    pages[:, :, index] = tokens.reshape(3, 2, -1)
    assert torch.equal(layout.tokens(pages), tokens.transpose(0, 1).reshape(2, -1, head_size))


@pytest.mark.parametrize("number", range(4))
def test_known_layouts_are_recognised(number: int) -> None:
    layout = known_layouts(64, 32)[number]
    index = layout.tokens(torch.arange(64 * 32).view(1, 1, -1)).flatten()
    assert layout_from_index(index, block_size=64, head_size=32) == layout


def test_tiles_share_few_biases() -> None:
    """However long the prompt, the visibility matrices stay a bounded handful."""
    torch_cpu._bias.cache_clear()
    check(dtype=torch.float32, requests=[(0, 1500)], n_local=100)
    assert torch_cpu._bias.cache_info().currsize <= 6
