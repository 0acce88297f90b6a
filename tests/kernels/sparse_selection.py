"""Made-up selections for the sparse Triton kernel: what a case of it is, and which keys its tiles see."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_trimix.kernels.sparse_index import SparseIndex
from vllm_trimix.patterns.selection import EVERYTHING, Selection, Tiles


@dataclass(frozen=True)
class SparseCase:
    """One call of the kernel.

    Attributes:
        position: Position of the first row.
        rows: Rows.
        group: Query heads per KV head.
        num_kv_heads: KV heads.
        head_size: Head size.
        page_size: Tokens of a page.
        block_size: Rows of a tile and keys of a block.
        density: Share of the blocks before a tile's own that are selected.
        num_columns: Columns of the head that has most; 0 is none in any head.
        band: ``n_init`` and ``n_local`` of the heads, in turn; () is none. Heads that hide something have no columns:
            an index leaves out the columns of a listed block, and a band would hide them there.
        q_dtype: Query dtype, as in ``torch``.
        cache_dtype: KV-cache dtype; "" is ``q_dtype``.
        order: Memory order of the cache's pages, heads and slots, outermost first.
        scales: Whether the fp8 tensors have scales other than 1.
        soft_cap: Logit cap, 0 is off.
        slab: First query head and heads of the call; None is all.
        huge: Name of the tensor whose outermost dimension has a stride of 2**30 elements.
        blocks: The selected blocks of each head and tile, instead of random ones; own and later ones are added and
            dropped.
        columns: The columns of each head, instead of random ones.
    """

    position: int
    rows: int
    group: int = 2
    num_kv_heads: int = 2
    head_size: int = 64
    page_size: int = 16
    block_size: int = 64
    density: float = 0.4
    num_columns: int = 0
    band: tuple[tuple[int, int], ...] = ()
    q_dtype: str = "float16"
    cache_dtype: str = ""
    order: str = "BHS"
    scales: bool = True
    soft_cap: float = 0.0
    slab: tuple[int, int] | None = None
    huge: str = ""
    blocks: tuple[tuple[frozenset[int], ...], ...] = ()
    columns: tuple[frozenset[int], ...] = ()

    @property
    def heads(self) -> tuple[int, int]:
        return self.slab or (0, self.group * self.num_kv_heads)

    def facts(self) -> dict[str, bool]:
        """For the tier; a selection knows no prompt."""
        return {"cached": self.position > 0}


def made_up(case: SparseCase, generator: torch.Generator) -> Selection:
    tiles = Tiles(case.block_size, case.position, case.rows)
    heads = case.heads[1]
    if case.blocks:
        blocks = torch.zeros(heads, tiles.num_tiles, tiles.num_blocks, dtype=torch.bool)
        for head in range(heads):
            for tile in range(tiles.num_tiles):
                listed = case.blocks[(head * tiles.num_tiles + tile) % len(case.blocks)][0]
                blocks[head, tile, [block for block in listed if block < tiles.num_blocks]] = True
    else:
        blocks = torch.rand(heads, tiles.num_tiles, tiles.num_blocks, generator=generator) < case.density
    causal = tiles.causal(torch.device("cpu"))
    own = torch.zeros_like(causal).scatter_(1, tiles.numbers(torch.device("cpu"))[:, None], True)
    blocks = (blocks & causal) | own

    band = None
    if case.band:
        band = torch.tensor([case.band[head % len(case.band)] for head in range(heads)], dtype=torch.int32)
    columns = None
    if case.columns or case.num_columns:
        end = case.position + case.rows
        width = max(len(chosen) for chosen in case.columns) if case.columns else case.num_columns
        columns = torch.full((heads, max(1, width)), EVERYTHING)
        for head in range(heads):
            if case.columns:
                chosen = sorted(case.columns[head % len(case.columns)])
            else:
                # Heads have fewer and fewer, the last perhaps none.
                count = min(end, width * (heads - head) // heads)
                chosen = torch.randperm(end, generator=generator)[:count].sort().values.tolist()
            if band is not None and band[head, 0] < EVERYTHING:
                continue
            columns[head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return Selection(tiles, blocks, columns, band)


def listed_keys(index: SparseIndex, num_keys: int) -> torch.Tensor:
    """Keys that the index lists for some tile, those of its own block up to its last row: bool [heads, num_keys]."""
    tiles = index.tiles
    listed = torch.zeros(index.block_count.shape[0], num_keys, dtype=torch.bool)
    for head in range(listed.shape[0]):
        for tile in range(tiles.num_tiles):
            end = min(tiles.position + tiles.num_rows, (tiles.first + tile + 1) * tiles.block_size)
            for block in index.block_index[head, tile, : index.block_count[head, tile]].tolist():
                listed[head, block * tiles.block_size : min(end, (block + 1) * tiles.block_size)] = True
            if index.column_index is not None and index.column_count is not None:
                listed[head, index.column_index[head, tile, : index.column_count[head, tile]].long()] = True
    return listed
