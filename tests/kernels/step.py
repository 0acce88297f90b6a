"""One step of several requests over a paged cache, as vLLM's CPU worker sees it: made-up numbers, NaN where none is."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from vllm_trimix.backend.pseudo_requests import pseudo_requests
from vllm_trimix.kernels.torch_cpu import PageLayout, known_layouts
from vllm_trimix.plan import Request, Span

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BY_INDEX = 4
"""A layout that is none of the four known ones."""
STALE = 50.0
"""What an earlier request left in slots that the step's requests haven't filled."""


class Scheduled(NamedTuple):
    """A request's rows of the step.

    Attributes:
        prompt_len: Prompt tokens.
        position: Position of its first row; those before lie in the cache.
        rows: Rows; those at or past ``prompt_len`` are generated tokens.
    """

    prompt_len: int
    position: int
    rows: int

    @property
    def end(self) -> int:
        return self.position + self.rows


@dataclass(frozen=True)
class Shape:
    """Heads and pages.

    Attributes:
        dtype: Of queries and cache, a name in ``DTYPES``.
        num_kv_heads: KV heads.
        group: Query heads of a KV head.
        head_size: Head size.
        page_size: Tokens of a page.
        layouts: Of K pages and of V pages, ``BY_INDEX`` or numbers in ``known_layouts``, which are taken around; None:
            as vLLM's own cache operator writes them.
    """

    dtype: str = "fp32"
    num_kv_heads: int = 2
    group: int = 2
    head_size: int = 64
    page_size: int = 32
    layouts: tuple[int, int] | None = (1, 0)

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def isa(self) -> str:
        """The instruction set that vLLM's operators take; as its ``_get_attn_isa``, whose import takes seconds."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            pytest.skip("vLLM's CPU operators have other instruction sets on this machine")
        if self.page_size % 32 or self.head_size % 32:
            return "vec16"
        return "amx" if self.dtype == "bf16" and torch.cpu._is_amx_tile_supported() else "vec"


@dataclass
class Tensors:
    """A step's tensors.

    Attributes:
        q: Queries, [rows and a few more, num_heads, head_size].
        out: Outputs, all NaN.
        keys: Each request's, [num_keys, num_kv_heads, head_size].
        values: Likewise.
        starts: First row of each request, and the end.
        kv_cache: As vLLM's, [num_blocks, num_kv_heads, page_size, 2 * head_size].
        layouts: Of a K page and of a V page.
        block_table: [num_requests, max_blocks], int32.
    """

    q: torch.Tensor
    out: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    starts: list[int]
    kv_cache: torch.Tensor
    layouts: tuple[PageLayout, PageLayout]
    block_table: torch.Tensor

    @property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages as stored, [num_blocks, num_kv_heads, page_size * head_size]."""
        pages = self.kv_cache.view(*self.kv_cache.shape[:2], 2, -1)
        return pages[:, :, 0], pages[:, :, 1]

    def rows(self, request: int) -> slice:
        """The rows of a request."""
        return slice(self.starts[request], self.starts[request + 1])


def pack(tokens: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Stores token-major pages [num_blocks, heads, page_size, head_size] as the layout says."""
    num_blocks, heads, page_size, head_size = tokens.shape
    order = layout.tokens(torch.arange(page_size * head_size).view(1, 1, -1)).flatten()
    pages = torch.empty(num_blocks, heads, page_size * head_size, dtype=tokens.dtype)
    pages[:, :, order] = tokens.reshape(num_blocks, heads, -1)
    return pages


def planned(requests: Sequence[Scheduled]) -> tuple[list[int], list[int], list[Request]]:
    """What the plans take: first rows and the end, keys, and requests."""
    starts = [0]
    for request in requests:
        starts.append(starts[-1] + request.rows)
    return starts, [request.end for request in requests], [Request(request.prompt_len) for request in requests]


def build(
    shape: Shape, requests: Sequence[Scheduled], *, seed: int, hidden: Sequence[torch.Tensor] | None = None
) -> Tensors:
    """Makes a step's tensors.

    Args:
        shape: Heads and pages.
        requests: The step.
        seed: Of all numbers, and of the order of pages.
        hidden: Each request's keys that nobody may read, bool [num_keys]: never written, and their pages missing from
            the table where they have no other key.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[shape.dtype]
    starts, seq_lens, _ = planned(requests)
    q = torch.randn(starts[-1] + 3, shape.num_heads, shape.head_size, generator=generator).to(dtype)
    max_blocks = -(-max(seq_lens) // shape.page_size)
    num_blocks = 1 + max_blocks * len(requests)
    free = (1 + torch.randperm(num_blocks - 1, generator=generator)).view(len(requests), max_blocks)
    keys, values = (
        [torch.randn(end, shape.num_kv_heads, shape.head_size, generator=generator).to(dtype) for end in seq_lens]
        for _ in range(2)
    )
    block_table = torch.zeros(len(requests), max_blocks, dtype=torch.int32)
    slots: list[torch.Tensor] = []
    written: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for index, end in enumerate(seq_lens):
        read = torch.ones(end, dtype=torch.bool) if hidden is None else ~hidden[index]
        j = torch.arange(end)[read]
        used = (j // shape.page_size).unique()
        block_table[index, used] = free[index, used].int()
        slots.append(free[index, j // shape.page_size] * shape.page_size + j % shape.page_size)
        for tokens, kept in zip((keys[index], values[index]), written, strict=True):
            kept.append(tokens[read])
            tokens[~read] = torch.nan
    store = _store_as_vllm if shape.layouts is None else _store
    k, v = (torch.cat(kept) for kept in written)
    kv_cache, layouts = store(shape, k, v, torch.cat(slots), num_blocks)
    return Tensors(q, torch.full_like(q, torch.nan), keys, values, starts, kv_cache, layouts, block_table)


def _store(
    shape: Shape, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, num_blocks: int
) -> tuple[torch.Tensor, tuple[PageLayout, PageLayout]]:
    """Pages by ``shape.layouts``; NaN in every other slot."""
    assert shape.layouts is not None
    layouts = tuple(_layout(shape, number) for number in shape.layouts)
    parts = []
    for tokens, layout in zip((k, v), layouts, strict=True):
        page = torch.full((num_blocks * shape.page_size, *tokens.shape[1:]), torch.nan, dtype=tokens.dtype)
        page[slots] = tokens
        parts.append(pack(page.view(num_blocks, shape.page_size, *tokens.shape[1:]).transpose(1, 2), layout))
    cache = torch.stack(parts, dim=2).view(num_blocks, shape.num_kv_heads, shape.page_size, -1)
    return cache, (layouts[0], layouts[1])


def _layout(shape: Shape, number: int) -> PageLayout:
    if number == BY_INDEX:
        count = shape.page_size * shape.head_size
        index = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        return PageLayout((count,), (0,), index, shape.head_size)
    known = known_layouts(shape.page_size, shape.head_size)
    return known[number % len(known)]


@functools.cache
def operators() -> Any:
    """vLLM's CPU operators."""
    if torch.cpu._is_amx_tile_supported():
        # Only vLLM's workers ask for AMX tiles.
        torch.cpu._init_amx()
    from vllm import _custom_ops

    return _custom_ops


def _store_as_vllm(
    shape: Shape, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, num_blocks: int
) -> tuple[torch.Tensor, tuple[PageLayout, PageLayout]]:
    """Pages by vLLM's operator; stale numbers beside the requests' keys, because its kernel multiplies them by 0."""
    from vllm_trimix.backend.cpu_layouts import probe_layouts

    cache = torch.full((num_blocks, shape.num_kv_heads, 2 * shape.page_size, shape.head_size), torch.nan, dtype=k.dtype)
    cache[(slots // shape.page_size).unique()] = STALE
    operators().cpu_attn_reshape_and_cache(k, v, *cache.chunk(2, dim=2), slots, shape.isa)
    layouts = probe_layouts(
        block_size=shape.page_size,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        dtype=k.dtype,
        isa=shape.isa,
    )
    return cache.view(num_blocks, shape.num_kv_heads, shape.page_size, -1), layouts


def attend_stock(shape: Shape, tensors: Tensors, spans: Sequence[Span], scale: float) -> None:
    """The dense remainder as the backend runs it: spans as requests of a batch of their own, by vLLM's operator."""
    if not spans:
        return
    pseudo = pseudo_requests(spans)
    rows = pseudo.selection(None if pseudo.rows is None else torch.from_numpy(pseudo.rows))
    starts, ends = torch.from_numpy(pseudo.starts), torch.from_numpy(pseudo.ends).int()
    metadata = operators().cpu_attn_get_scheduler_metadata(
        num_reqs=len(spans),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
        seq_lens=ends,
        dtype=tensors.q.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=shape.isa,
        enable_kv_split=True,
    )
    cache = tensors.kv_cache.view(*tensors.kv_cache.shape[:2], 2 * shape.page_size, -1)
    key_cache, value_cache = cache.chunk(2, dim=2)
    part = tensors.out[rows]
    operators().cpu_attention_with_kv_cache(
        query=tensors.q[rows],
        key_cache=key_cache,
        value_cache=value_cache,
        output=part,
        query_start_loc=starts,
        seq_lens=ends,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=tensors.block_table[torch.from_numpy(pseudo.indices)],
        softcap=0.0,
        scheduler_metadata=metadata,
        s_aux=None,
    )
    if not isinstance(rows, slice):
        tensors.out[rows] = part
