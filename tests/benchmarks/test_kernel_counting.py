"""The kernel benchmark's counting, block masks and sampled rows, against the mask."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import flex
from benchmarks.kernels.counting import count_work, dense_pattern, visible_keys
from benchmarks.kernels.reference import sample_rows
from tests.benchmarks.kernel_settings import settings, whole_mask
from vllm_trimix.patterns.triangle import Triangle

PATTERNS = {
    "published": Triangle(),
    "small": Triangle(4, 10, 8),
    "no-sinks": Triangle(0, 7, 5),
    "no-last-rows": Triangle(3, 1, 0),
    "sinks-beyond-window": Triangle(40, 3, 9),
    "beyond-the-prompt": Triangle(500, 2000, 3000),
    "dense": dense_pattern(700),
}


@pytest.mark.parametrize("length", [1, 2, 13, 63, 128, 700])
@pytest.mark.parametrize("name", PATTERNS)
def test_counts_are_the_masks(name: str, length: int) -> None:
    pattern, mask = PATTERNS[name], whole_mask(PATTERNS[name], length)
    assert pattern.visible_pairs(length) == int(mask.sum())
    for chunk in (1, 50, 256, 700):
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            assert visible_keys(pattern, length, start, end) == int(mask[start:end].any(0).sum()), (start, end)


def test_dense_counts_every_pair() -> None:
    assert dense_pattern(1000).visible_pairs(1000) == 1000 * 1001 // 2
    # The published bound at 128K.
    assert round(dense_pattern(131072).visible_pairs(131072) / Triangle().visible_pairs(131072)) == 101


def test_flops_and_bytes() -> None:
    work = count_work(
        Triangle(2, 3, 0),
        6,
        [(0, 4), (4, 6)],
        num_heads=4,
        num_kv_heads=2,
        head_size=64,
        q_bytes=1,
        kv_bytes=1,
        out_bytes=2,
    )
    # Rows see 1, 2, 3, 4, 5, 5 keys; the chunks see keys 0-3 and 0-5.
    assert work.pairs == 20
    assert work.flops == 20 * 4 * 64 * 4
    assert work.bytes == 6 * 4 * 64 * (1 + 2) + (4 + 6) * 2 * 2 * 64


@pytest.mark.parametrize("length", [1, 128, 700, 1024])
@pytest.mark.parametrize("name", PATTERNS)
def test_flex_blocks_are_the_masks(name: str, length: int) -> None:
    """Every visible pair lies in a listed block, and a block without a mask is wholly visible."""
    blocks = -(-length // flex.BLOCK)
    mask = torch.zeros(blocks * flex.BLOCK, blocks * flex.BLOCK, dtype=torch.bool)
    mask[:length, :length] = whole_mask(PATTERNS[name], length)
    tiles = mask.view(blocks, flex.BLOCK, blocks, flex.BLOCK)
    some, whole = flex.visible_blocks(PATTERNS[name], length, torch.device("cpu"))
    assert torch.equal(some | whole, tiles.any(3).any(1))
    assert not (some & whole).any()
    assert (tiles.all(3).all(1) | ~whole).all()
    block_mask = flex.make_block_mask(PATTERNS[name], length, torch.device("cpu"))
    i = torch.arange(length)
    assert torch.equal(block_mask.mask_mod(0, 0, i[:, None], i[None]), mask[:length, :length])


def test_sampled_rows_hold_the_edges() -> None:
    pattern = Triangle(8, 100, 30)
    rows = sample_rows(5000, settings(pattern=pattern).chunks(5000), pattern)
    assert len(rows) == 48
    assert rows == sorted(set(rows))
    assert {0, 7, 8, 99, 100, 107, 108, 4969, 4970, 4999} <= set(rows)
    assert {255, 256} <= set(rows)
    assert sample_rows(3, [(0, 3)], pattern) == [0, 1, 2]
