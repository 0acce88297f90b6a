"""What chunking a prompt changes, pattern by pattern: what docs/patterns.md promises."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.patterns.chunks import SCALE, Prompt, random_prompt
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.flexprefill import FlexPrefill
from vllm_trimix.patterns.selection import Chunk
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.patterns.xattention import XAttention

LENGTH, LAST_N = 900, 100

ODD = [1, 77, 300, 555]
BLOCKS = [64, 320, 512]
LARGE_BLOCKS = [128, 512]


def in_chunks(prompt: Prompt, pattern: DynamicPattern, borders: list[int]) -> torch.Tensor:
    """The mask over a prompt whose last rows stay dense, put together of chunks."""
    masks = []
    for start, end in itertools.pairwise([0, *borders, LENGTH]):
        sparse_end = min(end, LENGTH - LAST_N)
        if start < sparse_end:
            chunk = prompt.chunk(start, sparse_end - start, end)
            masks.append(pattern.select([pattern] * len(prompt.q), chunk).mask(LENGTH))
    return torch.cat(masks, 1)


@pytest.mark.parametrize(
    ("pattern", "borders"),
    [
        (Dense(), ODD),
        (AShape(5, 70), ODD),
        (AShape(130, 129, 128), ODD),
        (BlockSparse(4), BLOCKS),
        (BlockSparse(3, 128), LARGE_BLOCKS),
        (XAttention(0.6, 8, 64), BLOCKS),
        (XAttention(0.6), LARGE_BLOCKS),
    ],
    ids=str,
)
def test_chunks_give_the_mask_of_the_whole(pattern: DynamicPattern, borders: list[int]) -> None:
    prompt = random_prompt(LENGTH)
    whole = in_chunks(prompt, pattern, [])
    assert torch.equal(in_chunks(prompt, pattern, borders), whole)
    assert isinstance(pattern, Dense) or not torch.equal(whole, in_chunks(prompt, Dense(), []))


@pytest.mark.parametrize(
    ("pattern", "borders"),
    [
        (BlockSparse(4), ODD),
        (XAttention(0.6, 8, 64), ODD),
        (VerticalSlash(40, 110), BLOCKS),
        (FlexPrefill(0.5), BLOCKS),
    ],
    ids=str,
)
def test_where_chunking_changes_the_choice(pattern: DynamicPattern, borders: list[int]) -> None:
    """The documented exceptions are real: these masks do depend on the chunks."""
    prompt = random_prompt(LENGTH)
    assert not torch.equal(in_chunks(prompt, pattern, borders), in_chunks(prompt, pattern, []))


def needle(asked_at: int) -> tuple[Prompt, int]:
    """One early key, outside the forced ones, that only the row ``asked_at`` looks for; the others look everywhere."""
    prompt, key = random_prompt(LENGTH, num_heads=1, num_kv_heads=1), 201
    prompt.q.mul_(0.01)
    prompt.k[..., 0] = 0
    prompt.k[0, key, 0] = 100
    prompt.q[0, asked_at, 0] = 100
    prompt.q[0, :asked_at, 0] = 0
    prompt.q[0, asked_at + 1 :, 0] = 0
    return prompt, key


# Budgets for one column, and one diagonal, more than what is forced.
FINDERS = [VerticalSlash(31, 101), FlexPrefill(0.005, 0.0)]


@pytest.mark.parametrize("pattern", FINDERS, ids=str)
def test_a_needle_of_an_earlier_chunk_is_found_by_the_last_rows(pattern: DynamicPattern) -> None:
    position, end = 500, 780
    for asked_at, found in ((end - 1, True), (end - pattern.last_rows, True), (end - pattern.last_rows - 1, False)):
        prompt, key = needle(asked_at)
        mask = pattern.select([pattern], prompt.chunk(position, end - position)).mask(end)
        # A column: every row of the chunk sees it, not only those near the one that asked.
        assert mask[0, :, key].all().item() is found


@pytest.mark.parametrize("pattern", FINDERS, ids=str)
def test_dense_last_rows_take_part_in_the_estimate(pattern: DynamicPattern) -> None:
    """The question often stands in the prompt's last rows, which are dense: the sparse rows have to keep its keys."""
    prompt, key = needle(LENGTH - 1)
    mask = pattern.select([pattern], prompt.chunk(500, LENGTH - LAST_N - 500, LENGTH)).mask(LENGTH)
    assert mask[0, :, key].all()
    without = pattern.select([pattern], prompt.chunk(500, LENGTH - LAST_N - 500)).mask(LENGTH)
    assert not without[0, :, key].all()


def test_keys_after_the_chunk_change_nothing() -> None:
    """What a cache holds beyond the keys so far can't be asked for: the chunk ends where its keys end."""
    prompt = random_prompt(LENGTH)
    heads = [XAttention(0.6, 8, 64)] * 4
    one = prompt.chunk(77, 200)
    spoilt = prompt.k.clone()
    spoilt[:, 277:] = torch.nan
    other = Chunk(one.q, one.q_last, spoilt[:, :277], 77, SCALE)
    assert torch.equal(heads[0].select(heads, one).blocks, heads[0].select(heads, other).blocks)
