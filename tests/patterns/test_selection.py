"""What every selection promises to kernels, for random patterns, chunks and heads; and the lists made of it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.patterns.chunks import random_prompt
from vllm_trimix.kernels.sparse_index import build_index
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.flexprefill import FlexPrefill
from vllm_trimix.patterns.selection import EVERYTHING, Chunk, Selection, merge
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.patterns.xattention import XAttention

BUDGETS = st.sampled_from([0, 1, 20, 90])
MOST = st.sampled_from([None, 90, 200])
SHARES = st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.9, 0.99, 1.0])
PROMPTS = {
    (group, num_kv_heads): random_prompt(640, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads)
    for group in (1, 3)
    for num_kv_heads in (1, 2)
}


def patterns(block_size: int) -> st.SearchStrategy[DynamicPattern]:
    size = st.just(block_size)
    return st.one_of(
        st.builds(Dense, size),
        st.builds(AShape, st.integers(0, 200), st.integers(1, 300), size),
        st.builds(VerticalSlash, st.integers(30, 200), st.integers(50, 300), size),
        st.builds(BlockSparse, st.integers(2, 12), size),
        st.builds(FlexPrefill, SHARES, st.sampled_from([0.0, 0.1, 0.3, 1.0]), size, BUDGETS, MOST),
        st.builds(XAttention, SHARES, st.sampled_from([4, 8, 16]), size),
    )


@st.composite
def calls(draw: st.DrawFn) -> tuple[Chunk, list[DynamicPattern]]:
    """A chunk, and a pattern for each of its query heads, of one block size."""
    group, num_kv_heads = draw(st.sampled_from(sorted(PROMPTS)))
    position = draw(st.integers(0, 400) | st.sampled_from([0, 64, 128, 320]))
    num_rows = draw(st.integers(1, 170) | st.sampled_from([64, 128]))
    num_keys = position + num_rows + draw(st.integers(0, 69) | st.just(0))
    one = patterns(draw(st.sampled_from([64, 128])))
    heads = draw(st.lists(one, min_size=group * num_kv_heads, max_size=group * num_kv_heads))
    return PROMPTS[group, num_kv_heads].chunk(position, num_rows, num_keys), heads


def select(chunk: Chunk, heads: list[DynamicPattern]) -> list[tuple[torch.Tensor, Selection]]:
    """Each kind by itself: its head indices and selection."""
    group = chunk.num_heads // len(chunk.k)
    found = []
    for kind in sorted({pattern.kind for pattern in heads}, key=str):
        numbers = [number for number, pattern in enumerate(heads) if pattern.kind == kind]
        keys = chunk.k[[number // group for number in numbers]]
        part = chunk._replace(q=chunk.q[numbers], q_last=chunk.q_last[numbers], k=keys)
        mine = [heads[number] for number in numbers]
        found.append((torch.tensor(numbers), type(mine[0]).select(mine, part)))
    return found


@settings(max_examples=100, deadline=None)
@given(calls())
def test_what_kernels_rely_on(call: tuple[Chunk, list[DynamicPattern]]) -> None:
    chunk, heads = call
    for numbers, selection in select(chunk, heads):
        tiles, blocks = selection.tiles, selection.blocks
        assert blocks.shape == (len(numbers), tiles.num_tiles, tiles.num_blocks)
        assert blocks.dtype == torch.bool
        own = tiles.numbers(blocks.device)
        assert blocks[:, range(tiles.num_tiles), own].all(), "a tile misses its own block"
        assert not (blocks & (torch.arange(tiles.num_blocks) > own[:, None])).any(), "a block after the tile's own"
        if selection.columns is not None:
            columns = selection.columns
            assert columns.dtype == torch.int64
            ascending = (columns[:, 1:] > columns[:, :-1]) | (columns[:, 1:] == EVERYTHING)
            assert ascending.all()
            assert ((columns >= 0) & ((columns < chunk.num_keys) | (columns == EVERYTHING))).all()
        if selection.band is not None:
            assert selection.band.shape == (len(numbers), 2)
            assert selection.band.dtype == torch.int32
        mask = selection.mask(chunk.num_keys)
        rows = torch.arange(chunk.num_rows)
        assert mask[:, rows, chunk.position + rows].all(), "a row does not see itself"
        assert not mask.triu(chunk.position + 1).any(), "a row sees a key after itself"


@settings(max_examples=50, deadline=None)
@given(calls())
def test_merged_heads_see_what_they_saw_alone(call: tuple[Chunk, list[DynamicPattern]]) -> None:
    chunk, heads = call
    parts = select(chunk, heads)
    merged = merge(parts, len(heads)).mask(chunk.num_keys)
    for numbers, selection in parts:
        assert torch.equal(merged[numbers], selection.mask(chunk.num_keys))


@settings(max_examples=40, deadline=None)
@given(calls(), st.integers(1, 3))
def test_parts_see_what_the_whole_sees(call: tuple[Chunk, list[DynamicPattern]], size: int) -> None:
    chunk, heads = call
    whole = merge(select(chunk, heads), len(heads))
    count = whole.tiles.num_tiles
    parts = [whole.part(first, min(first + size, count)) for first in range(0, count, size)]
    assert torch.equal(torch.cat([part.mask(chunk.num_keys) for part in parts], 1), whole.mask(chunk.num_keys))


@settings(max_examples=60, deadline=None)
@given(calls())
def test_the_lists_hold_the_mask_and_every_key_once(call: tuple[Chunk, list[DynamicPattern]]) -> None:
    chunk, heads = call
    selection = merge(select(chunk, heads), len(heads))
    index, tiles = build_index(selection), selection.tiles
    times = torch.zeros(len(heads), chunk.num_rows, chunk.num_keys, dtype=torch.int32)
    read = torch.zeros(len(heads), tiles.num_tiles, dtype=torch.int32)
    for head in range(len(heads)):
        for tile in range(tiles.num_tiles):
            number = tiles.first + tile
            rows = range(
                max(tiles.position, number * tiles.block_size),
                min(tiles.position + tiles.num_rows, (number + 1) * tiles.block_size),
            )
            blocks = index.block_index[head, tile, : int(index.block_count[head, tile])].tolist()
            assert blocks == sorted(set(blocks))
            assert blocks[-1] == number
            columns: list[int] = []
            if index.column_index is not None and index.column_count is not None:
                columns = index.column_index[head, tile, : int(index.column_count[head, tile])].tolist()
            assert columns == sorted(set(columns))
            assert all(j < number * tiles.block_size and j // tiles.block_size not in blocks for j in columns)
            i = torch.tensor(rows)[:, None]
            here = times[head, rows[0] - tiles.position : rows[-1] + 1 - tiles.position]
            here[:, columns] += 1
            for block in blocks:
                j = torch.arange(block * tiles.block_size, min((block + 1) * tiles.block_size, rows[-1] + 1))
                seen = j <= i
                if index.band is not None:
                    seen &= (j < index.band[head, 0]) | (i - j < index.band[head, 1])
                here[:, j] += seen
                read[head, tile] += len(j)
            read[head, tile] += len(columns)
    assert torch.equal(times, selection.mask(chunk.num_keys).int())
    assert torch.equal(index.keys_read(), read)


def test_lists_wait_for_no_device() -> None:
    """Tensors without values: whatever would read one back fails."""
    chunk = PROMPTS[3, 2].chunk(77, 200, 300)
    nowhere = chunk._replace(q=chunk.q.to("meta"), q_last=chunk.q_last.to("meta"), k=chunk.k.to("meta"))
    for heads in ([VerticalSlash()] * 6, [AShape()] * 6):
        selection = type(heads[0]).select(heads, nowhere)
        index = build_index(selection)
        assert index.block_index.shape == selection.blocks.shape
        assert index.keys_read().is_meta
