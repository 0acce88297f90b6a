"""The CPU kernel against fp64 masked softmax, by error budget."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.cpu_steps import ATTENDS, TriangleStep, check_triangle_step
from tests.kernels.step import DTYPES, Scheduled, Shape
from vllm_trimix.kernels import torch_cpu
from vllm_trimix.kernels.torch_cpu import known_layouts, layout_from_index
from vllm_trimix.patterns.triangle import Triangle


def check(
    *,
    requests: list[tuple[int, int]],
    dtype: str = "fp32",
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_size: int = 32,
    n_init: int = 8,
    n_local: int = 100,
    layout: int = 1,
    attend: str = "",
    threads: int = 1,
) -> None:
    """Runs chunks (position, rows) of several prompts, all rows by the triangle kernel."""
    num_heads, num_kv_heads = heads
    shape = Shape(dtype, num_kv_heads, num_heads // num_kv_heads, head_size, block_size, (layout, layout + 1))
    # A prompt that goes on: none of its last rows is here.
    scheduled = tuple(Scheduled(n_init + n_local + position + rows, position, rows) for position, rows in requests)
    pattern = Triangle(n_init, n_local, last_n=0)
    check_triangle_step(TriangleStep(shape, scheduled, pattern, attend=attend, threads=threads))


SHAPES = {
    "one": [(0, 1)],
    "odd": [(0, 63)],
    "chunk": [(300, 113)],
    "straddling": [(90, 70)],
    "batch": [(0, 130), (257, 64), (1000, 1), (64, 65)],
    "long": [(0, 700)],
}


@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tile_kernels(shape: str, dtype: str, attend: str) -> None:
    check(dtype=dtype, requests=SHAPES[shape], attend=attend)


@pytest.mark.parametrize(
    ("heads", "head_size"),
    [(heads, size) for heads, size in itertools.product([(4, 4), (8, 2), (8, 1), (16, 1)], [32, 64, 96, 128, 256])],
    ids=lambda value: str(value),
)
def test_heads(heads: tuple[int, int], head_size: int) -> None:
    for dtype in ("fp32", "bf16"):
        check(dtype=dtype, requests=[(200, 90)], heads=heads, head_size=head_size, layout=2)


@pytest.mark.parametrize("block_size", [16, 32, 96, 128])
@pytest.mark.parametrize("layout", range(4))
def test_pages(block_size: int, layout: int) -> None:
    check(requests=[(0, 200), (301, 150)], block_size=block_size, layout=layout)


@pytest.mark.parametrize(("n_init", "n_local"), [(0, 1), (0, 100), (8, 1), (8, 16), (40, 16), (200, 33), (1, 512)])
def test_parameters(n_init: int, n_local: int) -> None:
    check(requests=[(0, 260), (190, 70), (640, 129)], n_init=n_init, n_local=n_local)


def test_threads_batch_tiles() -> None:
    check(requests=[(0, 700), (513, 450)], threads=9)


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
    check(requests=[(0, 1500)], n_local=100)
    assert torch_cpu._bias.cache_info().currsize <= 6
