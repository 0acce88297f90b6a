"""The first, middle and last programs of launches at a million tokens, interpreted: no 32-bit sum or product overflows.

Triton's interpreter checks each sum, difference and product of 32-bit integers once it is told to. A loop's variable
is plain Python to it; ``limits`` bounds that. Run in its pool's process. All tokens lie in one page, so that nothing is
large but the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.plan import Span

_HEAD_SIZE, _PAGE, _GROUP = 32, 784, 2


@contextmanager
def _edges() -> Iterator[list[tuple[str, int]]]:
    """Of each launch five programs run, checked for overflow; gives the launches' kernels and programs."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    run, grid_dim, grid_idx = interpreter.InterpretedFunction.run, builder.set_grid_dim, builder.set_grid_idx
    launched: list[tuple[str, int]] = []
    chosen: list[int] = []

    def launch(function: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launched.append((function.fn.__name__, grid[0]))
        chosen[:] = sorted({0, 1, grid[0] // 2, grid[0] - 2, grid[0] - 1} & set(range(grid[0])))
        run(function, *args, grid=(len(chosen), *grid[1:]), warmup=warmup, **kwargs)

    with ExitStack() as stack:
        for owner, name, value in (
            (interpreter.InterpretedFunction, "run", launch),
            (builder, "set_grid_dim", lambda x, y, z: grid_dim(launched[-1][1], y, z)),
            (builder, "set_grid_idx", lambda x, y, z: grid_idx(chosen[x], y, z)),
            (builder.options, "debug", True),
        ):
            # The options are frozen.
            old = getattr(owner, name)
            (object.__setattr__ if owner is builder.options else setattr)(owner, name, value)
            stack.callback(object.__setattr__ if owner is builder.options else setattr, owner, name, old)
        yield launched


def _tensors(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, a cache of one page, and the table that names it everywhere."""
    q = torch.zeros(rows, _GROUP, _HEAD_SIZE)
    cache = torch.zeros(1, 1, _PAGE, 2 * _HEAD_SIZE)
    k, v = cache.split(_HEAD_SIZE, dim=-1)
    return q, k, v, torch.zeros(1, -(-tokens // _PAGE), dtype=torch.int32)


def triangle(tokens: int, *, last: int = 4) -> list[tuple[str, int]]:
    """The last rows; the prompt's last ones among them with their keys split, and their merge."""
    from vllm_trimix.kernels import triton_triangle
    from vllm_trimix.kernels.triton_merge import Partials
    from vllm_trimix.kernels.work_items import cut_work, max_slots

    # The last tile is not full.
    rows, programs, tile_rows = 8185, 512, 16
    q, k, v, table = _tensors(rows, tokens)
    work = cut_work(
        [Span(0, 0, rows - last, tokens - rows)],
        [Span(0, rows - last, last, tokens - last)] if last else [],
        tile_rows=tile_rows,
        n_init=8,
        n_local=512,
        num_kv_heads=1,
        target_programs=programs,
    )
    shape = {"num_heads": _GROUP, "num_kv_heads": 1, "head_size": _HEAD_SIZE, "tile_rows": tile_rows}
    partials = Partials.allocate(max_slots(1, programs), device=torch.device("cpu"), **shape)
    partials.stats.fill_(1.0)
    items = torch.from_numpy(work.items)
    with _edges() as launched:
        triton_triangle.triangle_prefill(
            LayerCall(q, k, v, torch.empty_like(q), 1.0),
            table,
            items,
            n_init=8,
            n_local=512,
            tile_rows=tile_rows,
            merges=torch.from_numpy(work.merges) if last else None,
            partials=partials,
        )
    return launched


def sparse(tokens: int) -> list[tuple[str, int]]:
    """The last 200 rows of a prompt, by blocks from its start, its middle and its end, columns, and a band."""
    from vllm_trimix.kernels import triton_sparse
    from vllm_trimix.kernels.sparse_index import Place, SparseIndex
    from vllm_trimix.patterns.selection import EVERYTHING, Tiles

    rows = 200
    tiles = Tiles(64, tokens - rows, rows)
    q, k, v, table = _tensors(rows, tokens)
    blocks = torch.tensor([[0, tiles.first // 2, tiles.first + tile] for tile in range(tiles.num_tiles)])
    columns = torch.tensor([1, tokens // 3, tiles.first * 64 - 100])
    index = SparseIndex(
        tiles,
        torch.full((_GROUP, tiles.num_tiles), 3, dtype=torch.int32),
        blocks.int().expand(_GROUP, -1, -1).contiguous(),
        torch.full((_GROUP, tiles.num_tiles), 3, dtype=torch.int32),
        columns.int().expand(_GROUP, tiles.num_tiles, -1).contiguous(),
        torch.tensor([[EVERYTHING, EVERYTHING], [8, 512]], dtype=torch.int32),
    )
    with _edges() as launched:
        triton_sparse.sparse_prefill(
            LayerCall(q, k, v, torch.empty_like(q), 1.0),
            table,
            index,
            Place(0, 0, 0),
            keys_read=torch.empty_like(index.block_count),
        )
    return launched


def estimate(tokens: int) -> list[tuple[str, int]]:
    """The last 64 rows against all keys."""
    from vllm_trimix.kernels import triton_estimate

    q, k, _, table = _tensors(64, tokens)
    q_last = q.transpose(0, 1)
    with (
        _edges() as launched,
        # Programs that don't run leave sums of zero.
        mock.patch.object(torch.Tensor, "new_empty", lambda self, *size, **kwargs: self.new_ones(*size, **kwargs)),
    ):
        triton_estimate.column_and_slash_sums(
            q_last, k, table, request=0, num_keys=tokens, first_head=0, group=_GROUP, scale=1.0
        )
    return launched


KERNELS: dict[str, Callable[[int], list[tuple[str, int]]]] = {
    "triangle": triangle,
    "band": partial(triangle, last=0),
    "sparse": sparse,
    "estimate": estimate,
}


def run(kernel: str, tokens: int) -> list[Sequence[Any]] | str:
    """What was launched, or the overflow that was found."""
    try:
        return list(KERNELS[kernel](tokens))
    except Exception as error:
        if "overflow detected" not in repr(error):
            raise
        return "overflow"
