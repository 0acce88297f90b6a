"""Dynamic patterns in a layer: choose keys, list them, attend, in slabs of heads and rows so that memory stays bounded.

All of it runs once a layer for each chunk, on the layer's device and without waiting for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from vllm_trimix.backend.prefill import Scales
from vllm_trimix.kernels.sparse_index import SparseIndex, build_index
from vllm_trimix.kernels.torch_cpu import PageLayout
from vllm_trimix.patterns.base import DynamicPattern
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
# While it is chosen: its score and its share, both sorted with their places (8 bytes), a running sum, the choice.
_BYTES_PER_SCORE = 40


Sums = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class HeadGroup(NamedTuple):
    """Heads of one kind.

    Attributes:
        patterns: One a head.
        heads: Their numbers among the slab's heads, int64, on the device; None where they are all of them.
    """

    patterns: tuple[DynamicPattern, ...]
    heads: torch.Tensor | None


class LayerPatterns:
    """The patterns of a layer's query heads on this device, grouped into what is selected together."""

    def __init__(self, patterns: Sequence[DynamicPattern], *, num_kv_heads: int, device: torch.device) -> None:
        """Groups the heads.

        Args:
            patterns: One a query head.
            num_kv_heads: KV heads on this device.
            device: The layer's.
        """
        self.num_heads, self.num_kv_heads = len(patterns), num_kv_heads
        self.block_size = patterns[0].block_size
        self._patterns = tuple(patterns)
        self._uniform = len({pattern.kind for pattern in patterns}) == 1
        self._device = device
        self.last_rows = max(pattern.last_rows for pattern in patterns)
        # Compiled for this layer's tensors, by what the index lists.
        self.variants: dict[tuple[bool, bool], Any] = {}

    def index_kinds(self) -> set[tuple[bool, bool]]:
        """Whether an index of some slab has columns, and a band, in every combination that may come."""
        kinds = set()
        for _, _, groups in self._slabs(1):
            heads = {type(pattern) for group in groups for pattern in group.patterns}
            has_band = any(pattern.has_band for pattern in heads)
            kinds |= {(any(pattern.has_columns for pattern in heads), has_band), (False, has_band)}
        return kinds

    def slabs(self, bytes_per_kv_head: int, num_scores: int) -> list[tuple[int, int, list[HeadGroup]]]:
        """First KV head, KV heads and groups of each slab: many heads of one kind, or a KV head whose heads differ.

        Args:
            bytes_per_kv_head: Its keys and values, gathered.
            num_scores: Tiles times key blocks of a query head.
        """
        choice = num_scores * _BYTES_PER_SCORE * self.num_heads // self.num_kv_heads
        fit = min(MAX_KEY_BYTES // bytes_per_kv_head, MAX_CHOICE_BYTES // choice)
        fit = max(1, fit) if self._uniform else 1
        return self._slabs(min(fit, self.num_kv_heads))

    @functools.cache  # noqa: B019  One entry for each of a few sizes, as long as the model lives.
    def _slabs(self, size: int) -> list[tuple[int, int, list[HeadGroup]]]:
        group = self.num_heads // self.num_kv_heads
        slabs = []
        for first in range(0, self.num_kv_heads, size):
            count = min(size, self.num_kv_heads - first)
            kinds: dict[object, list[int]] = {}
            heads = self._patterns[first * group : (first + count) * group]
            for number, pattern in enumerate(heads):
                kinds.setdefault(pattern.kind, []).append(number)
            # A copy from the host waits for the device: none in slabs of a size that no warm-up has seen.
            groups = [
                HeadGroup(
                    tuple(heads[number] for number in numbers),
                    None if len(kinds) == 1 else torch.tensor(numbers, device=self._device),
                )
                for numbers in kinds.values()
            ]
            slabs.append((first, count, groups))
        return slabs


class Pages(Protocol):
    """A layer's paged keys and values."""

    scale: float

    @property
    def bytes_per_token(self) -> int:
        """Of one KV head, gathered."""

    def gather(self, request: int, num_keys: int, first_head: int, num_heads: int) -> Any:
        """Some KV heads' keys of a request as ``.k``, [num_heads, num_keys, head_size]."""

    def sums(self, request: int, num_keys: int, first_head: int, num_heads: int) -> Sums | None:
        """A kernel for the attention sums of the query heads of some KV heads, or None."""

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """Queries as the patterns read them."""

    def attend(
        self,
        q: torch.Tensor,
        gathered: Any,
        index: SparseIndex,
        place: Place,
        out: torch.Tensor,
        keys_read: torch.Tensor,
    ) -> None:
        """Attention over an index, into the rows and heads of ``out`` that it is for."""


class Place(NamedTuple):
    """Where an index's rows and heads lie in the step.

    Attributes:
        request: Row of the block table.
        first_row: First row in the batch.
        first_head: First query head.
    """

    request: int
    first_row: int
    first_head: int


class DenseTokens(NamedTuple):
    """Keys and values of some KV heads, [num_kv_heads, num_keys, head_size]."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass
class CpuPages:
    """Pages of vLLM's CPU cache, unpacked for the kernels here.

    Attributes:
        k_pages: As stored, [num_blocks, num_kv_heads, block_size * head_size].
        v_pages: Likewise.
        block_table: Page ids, [num_requests, max_blocks], int32.
        layouts: How a K page and a V page store their tokens.
        block_size: Tokens of a page.
        scale: Softmax scale.
    """

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    layouts: tuple[PageLayout, PageLayout]
    block_size: int
    scale: float

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layouts[0].head_size * self.k_pages.element_size()

    def gather(self, request: int, num_keys: int, first_head: int, num_heads: int) -> DenseTokens:
        pages = self.block_table[request, : -(-num_keys // self.block_size)].long()
        gathered = []
        for cache, layout in zip((self.k_pages, self.v_pages), self.layouts, strict=True):
            tokens = torch.empty(num_heads, len(pages) * self.block_size, layout.head_size, dtype=cache.dtype)
            # Head by head: what is copied on the way is never more than a head's.
            for head in range(num_heads):
                tokens[head] = layout.tokens(cache[:, first_head + head, None][pages])[0]
            gathered.append(tokens[:, :num_keys])
        return DenseTokens(*gathered)

    def sums(self, request: int, num_keys: int, first_head: int, num_heads: int) -> None:
        return None

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return q

    def attend(
        self,
        q: torch.Tensor,
        gathered: DenseTokens,
        index: SparseIndex,
        place: Place,
        out: torch.Tensor,
        keys_read: torch.Tensor,
    ) -> None:
        num_heads = index.block_count.shape[0]
        rows = slice(place.first_row, place.first_row + index.tiles.num_rows)
        heads = slice(place.first_head, place.first_head + num_heads)
        kernel = cpu_kernel()
        kernel(q[rows, heads], *gathered, index, scale=self.scale, out=out[rows, heads], keys_read=keys_read)


class GatheredKeys(NamedTuple):
    """Keys of some KV heads, [num_kv_heads, num_keys, head_size], dequantised; values stay in their pages."""

    k: torch.Tensor


@dataclass
class CudaPages:
    """Pages of a CUDA cache, read in place; keys are gathered for the choice alone.

    Attributes:
        k_cache: [num_blocks, num_kv_heads, block_size, head_size].
        v_cache: Likewise.
        block_table: Page ids, [num_requests, max_blocks], int32.
        scale: Softmax scale.
        soft_cap: Logit cap; 0 is off. The choice ignores it.
        scales: Of fp8 tensors.
        dtype: What the keys are dequantised to.
        group: Query heads of a KV head.
        variants: Compiled before, by what the index lists; new ones are added.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    scale: float
    soft_cap: float
    scales: Scales
    dtype: torch.dtype
    group: int
    variants: dict[tuple[bool, bool], Any]

    @property
    def bytes_per_token(self) -> int:
        # Of fp8 keys both precisions for a moment.
        stored = 1 if self.k_cache.element_size() == 1 else 0
        return self.k_cache.shape[3] * (stored + self.dtype.itemsize)

    def gather(self, request: int, num_keys: int, first_head: int, num_heads: int) -> GatheredKeys:
        block_size = self.k_cache.shape[2]
        pages = self.block_table[request, : -(-num_keys // block_size)].long()
        k = self.k_cache[:, first_head : first_head + num_heads].transpose(0, 1)
        # Heads first already, so that nothing is copied twice; as bytes, because not every torch selects from fp8.
        stored = k.view(torch.uint8) if k.element_size() == 1 else k
        k = stored.index_select(1, pages).view(k.dtype)
        k = k.view(num_heads, -1, k.shape[3])[:, :num_keys]
        return GatheredKeys(_dequantised(k, self.scales.k, self.dtype))

    def sums(self, request: int, num_keys: int, first_head: int, num_heads: int) -> Sums:
        from vllm_trimix.kernels.triton_estimate import column_and_slash_sums

        return functools.partial(
            column_and_slash_sums,
            k_cache=self.k_cache,
            block_table=self.block_table,
            request=request,
            num_keys=num_keys,
            first_head=first_head * self.group,
            group=self.group,
            scale=self.scale,
            k_scale=self.scales.k,
        )

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return _dequantised(q, self.scales.q, self.dtype)

    def attend(
        self,
        q: torch.Tensor,
        gathered: GatheredKeys,
        index: SparseIndex,
        place: Place,
        out: torch.Tensor,
        keys_read: torch.Tensor,
    ) -> None:
        from vllm_trimix.kernels.triton_sparse import sparse_prefill

        kind = (index.column_count is not None, index.band is not None)
        self.variants[kind] = sparse_prefill(
            q,
            self.k_cache,
            self.v_cache,
            self.block_table,
            index,
            **place._asdict(),
            scale=self.scale,
            out=out,
            keys_read=keys_read,
            q_scale=self.scales.q,
            k_scale=self.scales.k,
            v_scale=self.scales.v,
            soft_cap=self.soft_cap,
            variant=self.variants.get(kind),
        )

    def warm_up(self, patterns: LayerPatterns, q: torch.Tensor, out: torch.Tensor) -> None:
        """Compiles what serving will launch for this layer, by launches that write nothing."""
        from vllm_trimix.kernels.triton_sparse import idle_index

        for has_columns, has_band in patterns.index_kinds():
            index = idle_index(patterns.block_size, q.device, has_columns=has_columns, has_band=has_band)
            gathered, keys_read = GatheredKeys(self.k_cache), index.block_count.new_empty(index.block_count.shape)
            self.attend(q, gathered, index, Place(0, 0, 0), out, keys_read)
        if patterns.last_rows:
            # One key, in the first request's first page: whatever it holds.
            sums = self.sums(0, 1, 0, 1)
            sums(self.queries(q[:1, : self.group]).transpose(0, 1).contiguous())


def _dequantised(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if x.element_size() > 1:
        return x
    x = x.to(dtype)
    return x if scale is None else x.mul_(scale.to(dtype))


@functools.cache
def cpu_kernel() -> Any:
    """The compiled kernel, or the PyTorch one where it was not built."""
    from vllm_trimix.kernels import cpp_sparse, torch_sparse

    return cpp_sparse.sparse_prefill if cpp_sparse.is_available() else torch_sparse.sparse_prefill


class KeyCounter:
    """Keys read and keys before the rows, since the start, both per tile and head.

    Attributes:
        read: int64 [1], on the device: counted by the kernels.
        causal: What dense attention would have read.
    """

    def __init__(self, device: torch.device) -> None:
        self.read = torch.zeros(1, dtype=torch.int64, device=device)
        self.causal = 0

    def total(self) -> int:
        """Keys read so far; on a GPU copied aside of the work that is queued, so that it is not waited for."""
        if self.read.device.type != "cuda":
            return int(self.read)
        with torch.cuda.stream(torch.cuda.Stream(self.read.device)):
            return int(self.read)

    def add(self, keys_read: torch.Tensor, index: SparseIndex) -> None:
        self.read += keys_read.sum()
        tiles = index.tiles
        first = (tiles.first + 1) * tiles.block_size
        whole = tiles.num_tiles * first + tiles.block_size * tiles.num_tiles * (tiles.num_tiles - 1) // 2
        beyond = tiles.num_blocks * tiles.block_size - tiles.position - tiles.num_rows
        self.causal += index.block_count.shape[0] * (whole - beyond)


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
        for slab in patterns.slabs(num_keys * pages.bytes_per_token, num_scores):
            _prefill_slab(patterns, slab, span, q, pages, out, counter)


def _prefill_slab(
    patterns: LayerPatterns,
    slab: tuple[int, int, list[HeadGroup]],
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
