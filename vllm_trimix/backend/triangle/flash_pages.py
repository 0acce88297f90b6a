"""The triangle rounded to pages, by planning alone: a tile becomes a request with the sinks' and the window's pages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from vllm_trimix.backend.pseudo_requests import pseudo_requests
from vllm_trimix.backend.triangle.flash_attention import FlashCall, attend, flash_attention_version, flash_layer
from vllm_trimix.backend.triangle.prefill import LayerGroup, TrianglePrefill
from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.plan import Plan, Span

TILE_ROWS = 128
"""Rows that share their pages; tiles start at multiples of this position, so that chunks of a prompt don't matter."""


def visible(
    q_positions: torch.Tensor, k_positions: torch.Tensor, *, n_init: int, n_local: int, block_size: int
) -> torch.Tensor:
    """Which keys a row sees: the definition of this way's mask, a superset of the triangle's.

    The pages of the sinks, and all pages from the one where the window of the tile's first row starts.

    Args:
        q_positions: Absolute query positions, [num_queries], integer.
        k_positions: Absolute key positions, [num_keys], integer.
        n_init: Sink keys.
        n_local: Window in tokens, counting the query itself.
        block_size: Tokens of a page.

    Returns:
        Boolean [num_queries, num_keys], True where the key is visible.
    """
    i, j = q_positions[:, None], k_positions[None, :]
    end_of_sinks = -(-n_init // block_size) * block_size
    first_in_window = (i // TILE_ROWS * TILE_ROWS - n_local + 1).clamp(min=0)
    return (j <= i) & ((j < end_of_sinks) | (j >= first_in_window // block_size * block_size))


class PageLists(NamedTuple):
    """Tiles as pseudo-requests, on the host.

    Attributes:
        tiles: [num_tiles, 4]: request, first row, rows and position of the first row, as ``Span``.
        columns: Each tile's pages as columns of its request's block-table row, [num_tiles, max_pages]; 0 past the last.
        seqused_k: Keys on those pages up to the tile's last row, [num_tiles].
    """

    tiles: np.ndarray
    columns: np.ndarray
    seqused_k: np.ndarray


def list_pages(spans: list[Span], *, n_init: int, n_local: int, block_size: int) -> PageLists:
    """Cuts spans into tiles and lists each tile's pages, as ``visible`` defines them."""
    table = np.array(spans, dtype=np.int64)
    position, end = table[:, 3], table[:, 3] + table[:, 2]
    first_tile = position // TILE_ROWS
    counts = (end - 1) // TILE_ROWS - first_tile + 1
    owner = np.repeat(np.arange(len(table)), counts)
    tile = first_tile[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.maximum(position[owner], tile * TILE_ROWS)
    last = np.minimum(end[owner], (tile + 1) * TILE_ROWS) - 1
    tiles = table[owner]
    tiles[:, 1] += first - position[owner]
    tiles[:, 2] = last - first + 1
    tiles[:, 3] = first

    sink_pages = -(-n_init // block_size)
    window_page = np.maximum(0, tile * TILE_ROWS - n_local + 1) // block_size
    # Pages between the sinks and the window; none where they touch or overlap.
    skipped = np.maximum(0, window_page - sink_pages)
    num_pages = last // block_size + 1 - skipped
    columns = np.arange(num_pages.max())[None, :]
    columns = columns + np.where(columns < sink_pages, 0, skipped[:, None])
    columns[np.arange(columns.shape[1]) >= num_pages[:, None]] = 0
    return PageLists(tiles, columns, last + 1 - skipped * block_size)


class FlashPagesPrefill(TrianglePrefill):
    """Tiles as requests of vLLM's FlashAttention. Not exact: a row sees what ``visible`` says."""

    def __init__(self, group: LayerGroup) -> None:
        """As ``TrianglePrefill``.

        Raises:
            RuntimeError: vLLM has no FlashAttention here.
        """
        super().__init__(group)
        self._version = flash_attention_version(group)

    def arrays(self, plan: Plan) -> list[np.ndarray]:
        if not plan.triangle:
            return []
        tiles, columns, seqused_k = list_pages(
            plan.triangle,
            n_init=self.group.triangle.n_init,
            n_local=self.group.triangle.n_local,
            block_size=self.group.block_size,
        )
        batch = pseudo_requests(tiles)
        return [batch.starts, batch.indices, seqused_k, columns, *([] if batch.rows is None else [batch.rows])]

    def bind(self, plan: Plan, arrays: list[torch.Tensor], block_table: torch.Tensor) -> FlashCall | None:
        if not plan.triangle:
            return None
        starts, requests, seqused_k, columns, *rows = arrays
        batch = pseudo_requests(plan.triangle)
        return FlashCall(
            rows=batch.selection(rows[0] if rows else None),
            cu_seqlens_q=starts,
            max_seqlen_q=min(TILE_ROWS, batch.longest),
            seqused_k=seqused_k,
            max_seqlen_k=columns.shape[1] * self.group.block_size,
            block_table=block_table[requests[:, None], columns],
        )

    def idle(self, block_table: torch.Tensor) -> None:
        """No launch: FlashAttention 2 and 3 have nothing to compile."""

    def run(self, step: FlashCall | None, call: LayerCall) -> None:
        if step is None:
            return
        page_size, block_size = call.k_cache.shape[2], self.group.block_size
        if page_size != block_size:
            raise ValueError(f"k_cache has pages of {page_size} tokens; planned for {block_size}")
        attend(step, flash_layer(call, version=self._version), call.q, out=call.out)
