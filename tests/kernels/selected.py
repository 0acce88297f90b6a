"""A made-up selection and its inputs, and a sparse CPU kernel's result on them against the selection's own mask."""

from __future__ import annotations

import functools
import random
import zlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tests.kernels.definition import GROUPS, MAX_SCORES, compare, dice
from tests.kernels.step import DTYPES
from vllm_trimix.kernels import cpp_sparse, torch_sparse
from vllm_trimix.kernels.sparse_index import SparseIndex, build_index
from vllm_trimix.patterns.selection import EVERYTHING, Selection, Tiles

TORCH = "torch"
"""The PyTorch kernel's name, beside those of instruction sets."""


def select(
    tiles: Tiles, *, num_heads: int, density: float = 0.5, columns: int = 40, band: tuple[int, int] | None = None
) -> Selection:
    """A random selection; heads hold unequal numbers of columns, head 1 none, nor those that a band narrows."""
    blocks = torch.rand(num_heads, tiles.num_tiles, tiles.num_blocks) < density
    blocks &= tiles.causal(blocks.device)
    blocks[:, torch.arange(tiles.num_tiles), tiles.numbers(blocks.device)] = True
    end = tiles.position + tiles.num_rows
    listed = torch.full((num_heads, columns), EVERYTHING)
    for head in range(num_heads):
        narrow = band is not None and head < num_heads - 1
        count = 0 if head == 1 or narrow else min(end, columns * (head + 1) // num_heads)
        listed[head, :count] = torch.randperm(end)[:count].sort().values
    limits = None
    if band:
        limits = torch.tensor([(band[0] + head, band[1] + 7 * head) for head in range(num_heads)], dtype=torch.int32)
        limits[-1] = EVERYTHING
    return Selection(tiles, blocks, listed if columns else None, limits)


class Inputs(NamedTuple):
    """A call; ``k`` and ``v`` are [num_kv_heads, num_keys, head_size]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    selection: Selection
    index: SparseIndex  # type: ignore[assignment]  # A tuple's method, which nobody calls.
    scale: float


def make(
    *,
    dtype: str,
    position: int = 0,
    rows: int = 64,
    block_size: int = 64,
    head_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    density: float = 0.5,
    columns: int = 40,
    band: tuple[int, int] | None = None,
    seed: int = 0,
) -> Inputs:
    """Strided inputs with NaN in every key that no tile of the KV head lists, and in those after the rows."""
    torch.manual_seed(seed)
    tiles = Tiles(block_size, position, rows)
    selection = select(tiles, num_heads=num_heads, density=density, columns=columns, band=band)
    index = build_index(selection)
    num_keys = position + rows + 9
    q = torch.randn(rows, num_heads + 1, head_size + 8).to(DTYPES[dtype])[:, :num_heads, :head_size]
    k, v = (
        torch.randn(num_keys, num_kv_heads, head_size + 16).to(DTYPES[dtype])[..., :head_size].transpose(0, 1)
        for _ in range(2)
    )
    everywhere = replace(selection, band=None).mask(num_keys)
    own = torch.arange(num_keys) // block_size
    whole = torch.zeros(num_heads, num_keys, dtype=torch.bool)
    # A kernel reads a listed block whole, up to the last row.
    listed = selection.blocks.any(1)
    for head in range(num_heads):
        whole[head] = listed[head][own.clamp(max=tiles.num_blocks - 1)] & (torch.arange(num_keys) < position + rows)
    read = (everywhere.any(1) | whole).view(num_kv_heads, -1, num_keys).any(1)
    k[~read], v[~read] = torch.nan, torch.nan
    return Inputs(q, k, v, selection, index, head_size**-0.5)


def run(inputs: Inputs, isa: str | None, *, keys_read: torch.Tensor | None = None) -> torch.Tensor:
    """The output of the compiled kernel for an instruction set, None the default one, or of ``TORCH``."""
    rows, num_heads, head_size = inputs.q.shape
    room = torch.full((rows, num_heads + 2, head_size + 8), torch.nan, dtype=inputs.q.dtype)
    out = room[:, 1:-1, :head_size]
    q, k, v, _, index, scale = inputs
    if isa == TORCH:
        torch_sparse.sparse_prefill(q, k, v, index, scale=scale, out=out, keys_read=keys_read)
    else:
        cpp_sparse.sparse_prefill(q, k, v, index, scale=scale, out=out, keys_read=keys_read, isa=isa)
    out_of_place = room.clone()
    out_of_place[:, 1:-1, :head_size] = torch.nan
    assert out_of_place.isnan().all(), "written outside the output"
    return out


def check(inputs: Inputs, isa: str | None) -> None:
    """Compares a kernel with the selection's own mask, and what it says it read."""
    keys_read = torch.full_like(inputs.index.block_count, -1)
    out = run(inputs, isa, keys_read=keys_read)
    k, v = inputs.k.transpose(0, 1), inputs.v.transpose(0, 1)
    compare(out, inputs.q, k, v, inputs.selection.mask(len(k)), inputs.scale, what=str(isa))
    assert torch.equal(keys_read, inputs.index.keys_read()), "keys_read"


def kernel_of(name: str) -> Any:
    """A sparse kernel: ``torch``, or an instruction set of the compiled one."""
    return torch_sparse.sparse_prefill if name == TORCH else functools.partial(cpp_sparse.sparse_prefill, isa=name)


def draw_kernel(rng: random.Random, dtype: str) -> str:
    """One that this CPU has and that takes the dtype."""
    isas = [isa for isa in cpp_sparse.available_isas() if dtype == "bf16" or isa not in cpp_sparse.BF16_ONLY]
    return rng.choice([TORCH, *isas])


@dataclass(frozen=True)
class SelectedCase:
    """One call of a sparse CPU kernel on a random selection.

    Attributes:
        kernel: ``TORCH`` or an instruction set of the compiled kernel.
        dtype: A name in ``DTYPES``.
        position: Position of the first row.
        rows: Rows.
        block_size: Rows of a tile and keys of a block.
        head_size: Head size.
        num_kv_heads: KV heads.
        group: Query heads of a KV head.
        density: Share of the earlier blocks that are selected.
        columns: Single keys of the head that has most.
        band: Of the first head; the others' are wider, the last has none. None: no head has one.
        sharpness: Softmax scale, relative to the usual one.
    """

    kernel: str
    dtype: str
    position: int
    rows: int
    block_size: int
    head_size: int
    num_kv_heads: int
    group: int
    density: float
    columns: int
    band: tuple[int, int] | None
    sharpness: float

    def facts(self) -> dict[str, bool]:
        """For the tier; nothing here is a prompt's last row."""
        return {"cached": self.position > 0}


def check_selected(case: SelectedCase) -> None:
    """Compares every row and head, and what the kernel says it read."""
    inputs = make(
        dtype=case.dtype,
        position=case.position,
        rows=case.rows,
        block_size=case.block_size,
        head_size=case.head_size,
        num_heads=case.num_kv_heads * case.group,
        num_kv_heads=case.num_kv_heads,
        density=case.density,
        columns=case.columns,
        band=case.band,
        seed=zlib.crc32(repr(case).encode()),
    )
    check(inputs._replace(scale=inputs.scale * case.sharpness), case.kernel)


def draw_selected(number: int) -> SelectedCase:
    """One random selection, within a few hundred keys."""
    rng = dice("selected", number)
    dtype = rng.choice(("fp32", "fp32", "bf16", "bf16", "fp16"))
    kernel = draw_kernel(rng, dtype)
    group = rng.choice(GROUPS)
    block_size = rng.choice((64, 64, 64, 128, 128, 16, 32, 48, 80, 96, 256))
    if "amx" in kernel:
        block_size = max(32, block_size // 32 * 32)
    edge = block_size * rng.randrange(6) + rng.choice((-1, 0, 1))
    position = max(0, rng.choice((0, edge, edge, rng.randint(0, 500))))
    rows = rng.choice((1, 2, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, rng.randint(1, 200)))
    band = None
    if rng.random() < 0.3:
        band = (rng.choice((0, 1, 8, 63, 64, 65, 130)), rng.choice((1, 2, 16, 63, 64, 65, 100, 129)))
    num_kv_heads = rng.choice([heads for heads in (1, 1, 2, 2, 3, 4) if heads * group <= 16])
    return SelectedCase(
        kernel,
        dtype,
        position,
        max(1, min(rows, MAX_SCORES // (group * num_kv_heads * (position + rows)))),
        block_size,
        rng.choice((16, 24, 32, 40, 64, 64, 64, 80, 96, 112, 128, 128, 200, 256)),
        num_kv_heads,
        group,
        rng.choice((0.0, 0.1, 0.5, 0.5, 0.9, 2.0)),
        rng.choice((0, 1, 15, 16, 17, 31, 40, 65, 150)),
        band,
        rng.choice((1.0, 1.0, 0.1, 3.0)),
    )
