"""Merge of partial attention results: what dense items whose keys were split have found, into their output rows."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_trimix.kernels.triton_attention import after_all_keys, before_any_key, mask_of, store_rows
from vllm_trimix.kernels.triton_configs import group_size, padded_tile

# Rows of a tile that one program takes: many small programs, as there are few tiles.
BLOCK_ROWS = 16
NUM_WARPS = 4


@triton.jit
def merge_partials_kernel(
    partial_ptr,
    partial_stats_ptr,
    merges_ptr,
    out_ptr,
    v_scale_ptr,
    stride_out_token,
    stride_out_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
):
    """Program (i, c): rows [c, c + 1) * BLOCK_ROWS of merge ``i // NUM_KV_HEADS`` for KV head ``i % NUM_KV_HEADS``."""
    kv_head = (tl.program_id(0) % NUM_KV_HEADS).to(tl.int64)
    merge_ptr = merges_ptr + (tl.program_id(0) // NUM_KV_HEADS).to(tl.int64) * 4
    first_token = tl.load(merge_ptr).to(tl.int64)
    num_tokens = tl.load(merge_ptr + 1)
    index = tl.load(merge_ptr + 2).to(tl.int64) * NUM_KV_HEADS + kv_head
    num_slots = tl.load(merge_ptr + 3)

    offs_r = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    is_row = offs_r // GROUP < num_tokens
    mask = mask_of(is_row, offs_d, HEAD_SIZE, BLOCK_D)
    acc, row_max, row_sum = before_any_key(BLOCK_ROWS, BLOCK_D)
    for _ in tl.range(0, num_slots):
        stats_ptr = partial_stats_ptr + index * 2 * BLOCK_M + offs_r
        part_max = tl.load(stats_ptr, mask=is_row, other=-3.4028234663852886e38)
        part_sum = tl.load(stats_ptr + BLOCK_M, mask=is_row, other=0.0)
        rows = index * BLOCK_M * BLOCK_D + offs_r * BLOCK_D
        part = tl.load(partial_ptr + rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
        new_max = tl.maximum(row_max, part_max)
        rescale, weight = tl.exp2(row_max - new_max), tl.exp2(part_max - new_max)
        acc = acc * rescale[:, None] + part * weight[:, None]
        row_sum = row_sum * rescale + part_sum * weight
        row_max = new_max
        index += NUM_KV_HEADS

    result = after_all_keys(acc, row_sum, v_scale_ptr, HAS_V_SCALE)
    out_rows = (first_token + offs_r // GROUP) * stride_out_token + (kv_head * GROUP + offs_r % GROUP) * stride_out_head
    store_rows(out_ptr, out_rows, offs_d, mask, result)


@dataclass(frozen=True)
class Partials:
    """Workspace of dense items whose keys are split: what each part found, before the merge.

    Attributes:
        values: Unnormalised outputs, [num_slots * num_kv_heads, block_m, padded head size], fp32.
        stats: Row maxima in units of log2, and row sums, [num_slots * num_kv_heads, 2, block_m], fp32.
    """

    values: torch.Tensor
    stats: torch.Tensor

    @classmethod
    def allocate(
        cls, num_slots: int, *, num_heads: int, num_kv_heads: int, head_size: int, tile_rows: int, device: torch.device
    ) -> "Partials":
        """Room for ``num_slots`` partial results of every KV head, once for all layers and steps.

        Args:
            num_slots: As ``work_items.max_slots``.
            num_heads: Query heads on this device.
            num_kv_heads: KV heads on this device.
            head_size: True head size.
            tile_rows: Tokens of a full tile.
            device: Where the kernel runs.
        """
        block_m, block_d = padded_tile(tile_rows, group_size(num_heads, num_kv_heads), head_size)
        rows = num_slots * num_kv_heads
        return cls(torch.empty(rows, block_m, block_d, device=device), torch.empty(rows, 2, block_m, device=device))


def merge_constants(
    partials: Partials, *, num_heads: int, num_kv_heads: int, head_size: int, has_v_scale: bool
) -> dict[str, object]:
    """Compile-time arguments of the kernel."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group_size(num_heads, num_kv_heads),
        "HEAD_SIZE": head_size,
        "BLOCK_M": partials.values.shape[1],
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_D": partials.values.shape[2],
        "HAS_V_SCALE": has_v_scale,
    }


def merge_partials(
    partials: Partials, merges: torch.Tensor, *, out: torch.Tensor, num_kv_heads: int, v_scale: torch.Tensor | None
) -> None:
    """Writes the output rows of tiles whose keys were split. Launches one kernel.

    Args:
        partials: What the parts found.
        merges: [num_merges, 4] int32: first row, rows, first slot, slots; ``work_items.cut_work``. A row without slots
            is idle.
        out: Output, [num_tokens, num_heads, head_size], last dim contiguous.
        num_kv_heads: KV heads.
        v_scale: Dequantisation scale of fp8 values, one fp32 on the device; None is 1.
    """
    _, num_heads, head_size = out.shape
    merge_partials_kernel[(merges.shape[0] * num_kv_heads, partials.values.shape[1] // BLOCK_ROWS)](
        partials.values,
        partials.stats,
        merges,
        out,
        v_scale,
        out.stride(0),
        out.stride(1),
        **merge_constants(
            partials,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            has_v_scale=v_scale is not None,
        ),
        num_warps=NUM_WARPS,
    )
