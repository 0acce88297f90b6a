"""Dynamic patterns in a layer: choose keys, list them, attend, in slabs of heads and rows so that memory stays bounded.

All of it runs once a layer for each chunk, on the layer's device and without waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vllm_trimix.backend.dynamic.key_counter import KeyCounter
from vllm_trimix.backend.dynamic.layer_patterns import HeadGroup, LayerPatterns, Slab
from vllm_trimix.backend.dynamic.pages import Pages
from vllm_trimix.kernels.sparse_index import Place, build_index
from vllm_trimix.patterns.estimate import MAX_SCORES
from vllm_trimix.patterns.selection import Chunk, Selection, Tiles, merge
from vllm_trimix.plan import DynamicSpan

MAX_KEY_BYTES = 2**28
"""Keys and values of a request gathered at once, for as many KV heads as fit, at least one."""
MAX_CHOICE_BYTES = 2**28
"""Scores and ranks of key blocks at once, likewise."""
MAX_INDEX_BYTES = 2**26
"""Indices at once, for as many tiles as fit, at least one."""

# Of one block of one tile while it is listed: the choice, its place in two widths, and the list.
_BYTES_PER_ENTRY = 17


def reserve(out: torch.Tensor) -> None:
    """Takes what ``prefill`` may hold at once, and gives it back, so that vLLM's profile run leaves room for it.

    Args:
        out: A layer's output, with as many rows as a step may have: the queries of a step are copied.
    """
    limits = MAX_KEY_BYTES + MAX_CHOICE_BYTES + MAX_INDEX_BYTES + 4 * MAX_SCORES
    torch.empty(limits + out.numel() * out.element_size(), dtype=torch.uint8, device=out.device)


def prefill(
    patterns: LayerPatterns,
    spans: Sequence[DynamicSpan],
    q: torch.Tensor,
    pages: Pages,
    out: torch.Tensor,
    counter: KeyCounter,
) -> None:
    """Computes the rows of dynamic spans in one layer.

    Args:
        patterns: The layer's.
        spans: Rows.
        q: Queries of the step, [num_tokens, num_heads, head_size].
        pages: The layer's keys and values.
        out: Like ``q``; other rows are left alone.
        counter: What was read is added to it.
    """
    for span in spans:
        (_, _, num_rows, position), num_keys = span
        tiles = Tiles(patterns.block_size, position, num_rows)
        num_scores = tiles.num_tiles * tiles.num_blocks
        for slab in patterns.slabs(
            num_keys * pages.bytes_per_token,
            num_scores,
            max_key_bytes=MAX_KEY_BYTES,
            max_choice_bytes=MAX_CHOICE_BYTES,
        ):
            _prefill_slab(patterns, slab, span, q, pages, out, counter)


def _prefill_slab(
    patterns: LayerPatterns,
    slab: Slab,
    span: DynamicSpan,
    q: torch.Tensor,
    pages: Pages,
    out: torch.Tensor,
    counter: KeyCounter,
) -> None:
    """One slab, in a function of its own: what it gathers is gone before the next one gathers."""
    (request, first_row, num_rows, position), num_keys = span
    first_kv, num_kv, groups = slab
    group = patterns.num_heads // patterns.num_kv_heads
    end_row = first_row + num_keys - position
    last_rows = min(patterns.last_rows, num_keys - position)
    heads = slice(first_kv * group, (first_kv + num_kv) * group)
    gathered = pages.gather(request, num_keys, first_kv, num_kv)
    rows = pages.queries(q[first_row:end_row, heads]).transpose(0, 1).contiguous()
    chunk = Chunk(
        rows[:, :num_rows],
        rows[:, rows.shape[1] - last_rows :],
        gathered.k,
        position,
        pages.scale,
        pages.sums(request, num_keys, first_kv, num_kv),
    )
    selection = select(groups, chunk)
    for part in parts(selection):
        index = build_index(part)
        place = Place(request, first_row + part.tiles.position - position, heads.start)
        keys_read = index.block_count.new_empty(index.block_count.shape)
        pages.attend(q, gathered, index, place, out, keys_read)
        counter.add(keys_read, index)


def select(groups: Sequence[HeadGroup], chunk: Chunk) -> Selection:
    """The selection of a slab's heads, each by its own pattern."""
    if len(groups) == 1:
        return groups[0].patterns[0].select(groups[0].patterns, chunk)
    selections = []
    for patterns, heads in groups:
        assert heads is not None
        part = chunk._replace(q=chunk.q[heads], q_last=chunk.q_last[heads], sums=None)
        selections.append((heads, patterns[0].select(patterns, part)))
    return merge(selections, chunk.num_heads)


def parts(selection: Selection) -> Iterator[Selection]:
    """A selection in ranges of tiles whose index stays below ``MAX_INDEX_BYTES``."""
    num_heads, num_tiles, num_blocks = selection.blocks.shape
    entries = num_blocks + (0 if selection.columns is None else selection.columns.shape[1])
    size = max(1, MAX_INDEX_BYTES // (num_heads * entries * _BYTES_PER_ENTRY))
    if size >= num_tiles:
        yield selection
        return
    for first in range(0, num_tiles, size):
        yield selection.part(first, min(first + size, num_tiles))
