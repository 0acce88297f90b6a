"""Triangle prefill on CPUs: per tile of query rows, one softmax over [sinks | window].

The scores are fp32 whatever the input, as in flash kernels; the probabilities take the input's precision
where the CPU multiplies it natively.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from vllm_trimix.plan import Span

# Rows of one tile; measured on AVX-512 without AMX: 64 and 128 are within 10%, 256 costs 40% more.
TILE_ROWS = 64

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class PageLayout:
    """How one head's K (or V) page stores its tokens.

    Attributes:
        shape: The page as stored, innermost last.
        permutation: Axes of ``shape`` that give [block_size, head_size] when flattened pairwise.
        index: Where each element of [block_size * head_size] lies, when no shape describes it; else None.
        head_size: Elements of a token.
    """

    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    index: torch.Tensor | None
    head_size: int

    def tokens(self, pages: torch.Tensor) -> torch.Tensor:
        """Unpacks pages into tokens.

        Args:
            pages: [num_pages, num_kv_heads, block_size * head_size].

        Returns:
            [num_kv_heads, num_pages * block_size, head_size].
        """
        num_pages, num_kv_heads, _ = pages.shape
        if self.index is not None:
            tokens = pages[:, :, self.index].transpose(0, 1)
        else:
            axes = (1, 0, *(axis + 2 for axis in self.permutation))
            tokens = pages.view(num_pages, num_kv_heads, *self.shape).permute(axes)
        return tokens.reshape(num_kv_heads, -1, self.head_size)


def known_layouts(block_size: int, head_size: int) -> list[PageLayout]:
    """The page layouts of vLLM's CPU kernels: rows, columns (vec), and the two AMX tilings."""
    candidates: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((block_size, head_size), (0, 1)),
        ((head_size, block_size), (1, 0)),
    ]
    if block_size % 16 == 0 and head_size % 16 == 0:
        candidates.append(((block_size // 16, head_size // 2, 16, 2), (0, 2, 1, 3)))
        candidates.append(((head_size // 16, block_size // 2, 16, 2), (1, 3, 0, 2)))
    return [PageLayout(shape, permutation, None, head_size) for shape, permutation in candidates]


def layout_from_index(index: torch.Tensor, *, block_size: int, head_size: int) -> PageLayout:
    """The layout whose element (token, dim) lies at ``index[token * head_size + dim]`` of the page."""
    page = torch.arange(block_size * head_size)
    for layout in known_layouts(block_size, head_size):
        if torch.equal(layout.tokens(page.view(1, 1, -1)).flatten(), index):
            return layout
    return PageLayout((block_size * head_size,), (0,), index, head_size)


def triangle_prefill(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    spans: Sequence[Span],
    *,
    k_layout: PageLayout,
    v_layout: PageLayout,
    block_size: int,
    n_init: int,
    n_local: int,
    scale: float,
    out: torch.Tensor,
    attend: Attend | None = None,
) -> None:
    """Causal attention of each span's queries over ``n_init`` sink keys and a trailing window, into ``out``.

    Args:
        q: Queries, [num_tokens, num_heads, head_size], bf16/fp16/fp32.
        k_pages: Key pages as stored, [num_blocks, num_kv_heads, block_size * head_size], ``q``'s dtype.
        v_pages: Value pages, likewise.
        block_table: Page ids, [num_requests, max_blocks], int32.
        spans: Query rows to compute; other rows of ``out`` are left alone.
        k_layout: How a key page stores its tokens.
        v_layout: How a value page stores its tokens.
        block_size: Tokens of a page.
        n_init: Sink keys.
        n_local: Window in tokens, counting the query's own position.
        scale: Softmax scale.
        out: Output, shaped and typed like ``q``.
        attend: The tile kernel; None picks by what this CPU multiplies natively.
    """
    attend = attend or default_attend(q.dtype)
    for span in spans:
        end = span.position + span.num_rows
        base = max(0, span.position - n_local + 1) // block_size * block_size
        pages = block_table[span.request, base // block_size : -(-end // block_size)].long()
        num_sinks = min(n_init, base)
        sink_pages = block_table[span.request, : -(-num_sinks // block_size)].long()
        k, v = (
            torch.cat((layout.tokens(cache[sink_pages])[:, :num_sinks], layout.tokens(cache[pages])), dim=1)
            for cache, layout in ((k_pages, k_layout), (v_pages, v_layout))
        )
        rows = slice(span.first_row, span.first_row + span.num_rows)
        # Buffer column c holds position c for the sinks, then c + (base - num_sinks).
        _span(q[rows], k, v, out[rows], span.position, base - num_sinks, n_init, n_local, scale, attend)


def _span(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    position: int,
    shift: int,
    n_init: int,
    n_local: int,
    scale: float,
    attend: Attend,
) -> None:
    """One span; ``k``/``v`` are [num_kv_heads, num_keys, head_size], sinks first, window keys shifted by ``shift``."""
    num_rows, num_heads, head_size = q.shape
    num_kv_heads = k.shape[0]
    group = num_heads // num_kv_heads
    # Enough tiles at once to give every thread a matrix of its own.
    batch = max(1, torch.get_num_threads() // num_kv_heads)
    steady = n_init + n_local - 1
    row = 0
    while row < num_rows:
        first = position + row
        rows = min(TILE_ROWS, num_rows - row)
        tiles = 1
        if first >= steady and rows == TILE_ROWS:
            tiles = min(batch, (num_rows - row) // TILE_ROWS)
        window = max(0, first - n_local + 1)
        num_sinks = min(n_init, window)
        keys = first + rows - window
        columns = [slice(window - shift + tile * rows, window - shift + tile * rows + keys) for tile in range(tiles)]
        k_tile, v_tile = (
            torch.stack([torch.cat((x[:, :num_sinks], x[:, column]), dim=1) for column in columns])
            if tiles > 1
            else torch.cat((x[:, :num_sinks], x[:, columns[0]]), dim=1).unsqueeze(0)
            for x in (k, v)
        )
        q_tile = q[row : row + tiles * rows].view(tiles, rows, num_kv_heads, group, head_size)
        q_tile = q_tile.permute(0, 2, 3, 1, 4).reshape(tiles * num_kv_heads, group * rows, head_size)
        bias = _bias(min(first, steady), rows, n_init, n_local, group)
        result = attend(q_tile, k_tile.flatten(0, 1), v_tile.flatten(0, 1), bias, scale)
        result = result.view(tiles, num_kv_heads, group, rows, head_size).permute(0, 3, 1, 2, 4)
        out[row : row + tiles * rows].view(tiles, rows, num_kv_heads, group, head_size).copy_(result)
        row += tiles * rows


@lru_cache(maxsize=32)
def _bias(first: int, rows: int, n_init: int, n_local: int, group: int) -> torch.Tensor:
    """0 where the key is visible, -inf where not: fp32 [group * rows, num_sinks + num_window_keys].

    Every tile past the first ``n_init + n_local`` positions shares one matrix.
    """
    window = max(0, first - n_local + 1)
    i = torch.arange(first, first + rows)[:, None]
    j = torch.cat((torch.arange(min(n_init, window)), torch.arange(window, first + rows)))[None]
    visible = (j <= i) & ((j < n_init) | (i - j < n_local))
    return torch.zeros(visible.shape).masked_fill_(~visible, -math.inf).repeat(group, 1)


def attend_bmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 scores; probabilities in ``v``'s dtype. [batch, rows, head_size] against [batch, keys, head_size]."""
    scores = torch.baddbmm(bias, q.float(), k.float().transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v)


def attend_fp32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """Everything in fp32, for CPUs without native low-precision products."""
    return attend_bmm(q, k, v.float(), bias, scale)


def attend_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """PyTorch's own CPU flash kernel: the fastest where it reaches AMX tiles."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias.to(q.dtype), scale=scale)[0]


def default_attend(dtype: torch.dtype) -> Attend:
    """The fastest tile kernel measured for this CPU and dtype."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return attend_sdpa
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return attend_bmm
    return attend_fp32
