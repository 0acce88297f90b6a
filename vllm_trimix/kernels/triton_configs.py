"""Launch shapes of the Triton kernel: one small table, keyed by head size, element size and GPU generation.

Nothing is tuned at run time, and no length is a key. What each entry costs in registers, shared memory and instructions
is in ``docs/kernel-tables.md``, from ``python -m vllm_trimix.kernels.triton_compile``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class TileConfig:
    """Launch shape of one kernel variant.

    Attributes:
        block_m: Query rows of a tile, tokens times the GQA group.
        block_n: Keys per step.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline over the keys.
        lookahead: Whether a step's scores are computed one step ahead, so that the tensor cores work on them while the
            softmax of the step before runs. Costs registers; only asynchronous tensor cores gain.
        max_registers: Registers a thread that the compiler may use, where fewer let one more program share a
            multiprocessor; None leaves it to the compiler.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    lookahead: bool = False
    max_registers: int | None = None


# (padded head size, bytes of the compute dtype) -> launch shape. fp32 runs on FMA units: small tiles, no tensor cores.
# Hopper, head size 64: 128 registers, so that two programs share a multiprocessor and one multiplies while the other
# is in its softmax; from 128 the accumulators leave no room for two, and one program looks ahead instead.
_HOPPER = {
    (64, 2): TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=2),
    (128, 2): TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, lookahead=True),
    (256, 2): TileConfig(block_m=128, block_n=32, num_warps=8, num_stages=2, lookahead=True),
    (64, 4): TileConfig(block_m=32, block_n=32, num_warps=4, num_stages=2),
    (128, 4): TileConfig(block_m=32, block_n=32, num_warps=8, num_stages=2),
    (256, 4): TileConfig(block_m=16, block_n=16, num_warps=8, num_stages=2),
}
_BLACKWELL = _HOPPER | {
    (64, 2): TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, lookahead=True),
    (128, 2): TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=2),
    (256, 2): TileConfig(block_m=64, block_n=32, num_warps=8, num_stages=2),
}
# The matrix operands live in registers before Hopper and on compute capability 12.0, and 8.6, 8.9 and 12.0 have 99 KiB
# of shared memory.
_SYNCHRONOUS = _BLACKWELL | {
    (64, 2): TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=2),
    (128, 2): TileConfig(block_m=128, block_n=32, num_warps=8, num_stages=2),
}
# The sparse kernel, whose tiles are the selection's: (padded head size, block size), 16 bits. It keeps the next step's
# addresses at hand, which leaves fewer registers: at head size 256 eight warps take half a tile of 128 rows. Where
# two or three programs share a multiprocessor none needs to look ahead.
_HOPPER_SPARSE = {
    (64, 64): TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=2, max_registers=168),
    (64, 128): TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, max_registers=128),
    (128, 64): TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=2),
    (128, 128): TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, lookahead=True),
    (256, 64): TileConfig(block_m=64, block_n=32, num_warps=8, num_stages=2, lookahead=True),
    (256, 128): TileConfig(block_m=64, block_n=32, num_warps=8, num_stages=2, lookahead=True),
}


def config_for(head_size: int, dtype_size: int, cache_size: int, capability: int = 90) -> TileConfig:
    """Launch shape for a head size, element sizes and a GPU; ``block_m`` doesn't depend on the cache's.

    Args:
        head_size: True head size, a multiple of 16 up to 256.
        dtype_size: Bytes of one query element: 1 (fp8), 2 or 4.
        cache_size: Bytes of one cache element.
        capability: Compute capability times ten.

    Raises:
        ValueError: The head size or element size isn't supported.
    """
    if head_size % 16 != 0 or not 16 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"head_size {head_size} is not a multiple of 16 between 16 and {MAX_HEAD_SIZE}")
    if dtype_size not in (1, 2, 4):
        raise ValueError(f"query elements of {dtype_size} bytes are not supported; expected 1 (fp8), 2 or 4")
    padded = _padded(head_size)
    table = _HOPPER if 90 <= capability < 100 else _BLACKWELL if 100 <= capability < 120 else _SYNCHRONOUS
    config = table[padded, max(2, dtype_size)]
    if padded == 256 and cache_size < dtype_size:
        # The widened keys and values take the registers that looking ahead needs.
        config = replace(config, lookahead=False)
    return config


def sparse_config_for(
    head_size: int, dtype_size: int, cache_size: int, block_size: int, capability: int = 90
) -> TileConfig:
    """Launch shape of the sparse kernel; ``block_m`` divides ``block_size``, ``block_n`` too.

    Args:
        head_size: True head size, a multiple of 16 up to 256.
        dtype_size: Bytes of one query element: 1 (fp8), 2 or 4.
        cache_size: Bytes of one cache element.
        block_size: Rows of a tile of the index.
        capability: Compute capability times ten.

    Raises:
        ValueError: The head size or element size isn't supported.
    """
    config = config_for(head_size, dtype_size, cache_size, capability)
    if dtype_size != 4 and 90 <= capability < 100:
        config = _HOPPER_SPARSE[_padded(head_size), block_size]
    elif config.block_m > block_size:
        config = replace(config, block_m=block_size, num_warps=config.num_warps * block_size // config.block_m)
    if dtype_size == 4 and _padded(head_size) == 128:
        # Fewer warps hold more registers each: eight spill.
        config = replace(config, num_warps=4)
    # As above, widened operands need the registers; Blackwell's compiler spills where it looks ahead.
    if cache_size < dtype_size or capability >= 100:
        config = replace(config, lookahead=False)
    return config


def estimate_config_for(head_size: int, dtype_size: int) -> TileConfig:
    """Launch shape of the estimate kernel, whose tiles are square.

    Args:
        head_size: True head size, a multiple of 16 up to 256.
        dtype_size: Bytes of one query element: 1 (fp8), 2 or 4.

    Raises:
        ValueError: The head size or element size isn't supported.
    """
    config_for(head_size, dtype_size, dtype_size)
    is_wide = head_size > 128
    if dtype_size == 4:
        side = 16 if is_wide else 32
        return TileConfig(block_m=side, block_n=side, num_warps=4, num_stages=2)
    return TileConfig(block_m=64, block_n=64, num_warps=8 if is_wide else 4, num_stages=2)


def tile_rows_for(num_heads: int, num_kv_heads: int, head_size: int, dtype_size: int, capability: int = 90) -> int:
    """Query tokens of a full tile; never a function of any length.

    Args:
        num_heads: Query heads on this device.
        num_kv_heads: KV heads on this device.
        head_size: True head size.
        dtype_size: Bytes of one query element.
        capability: Compute capability times ten.

    Raises:
        ValueError: The heads don't divide, or the head size or element size isn't supported.
    """
    group = group_size(num_heads, num_kv_heads)
    return max(1, config_for(head_size, dtype_size, dtype_size, capability).block_m // group)


def widened(config: TileConfig, block_m: int) -> TileConfig:
    """The launch shape of a tile of ``block_m`` rows, where one token's query heads are more than its own.

    Without a pipeline: its buffers and the wider tile don't fit into 99 KiB of shared memory together.
    """
    return config if block_m <= config.block_m else replace(config, block_m=block_m, num_stages=1)


def group_size(num_heads: int, num_kv_heads: int) -> int:
    """Query heads of each KV head.

    Raises:
        ValueError: The heads don't divide.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    return num_heads // num_kv_heads


def padded_tile(tile_rows: int, group: int, head_size: int) -> tuple[int, int]:
    """Rows and columns of a tile in the kernel: powers of two, at least 16."""
    return max(16, _power_of_two(tile_rows * group)), max(16, _power_of_two(head_size))


def capability_of(device: torch.device) -> int:
    """Compute capability times ten; off CUDA, where only Triton's interpreter runs, that of Hopper."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _padded(head_size: int) -> int:
    return 64 if head_size <= 64 else 128 if head_size <= 128 else 256


def _power_of_two(number: int) -> int:
    """The smallest that isn't below ``number``."""
    return 1 << (number - 1).bit_length()
