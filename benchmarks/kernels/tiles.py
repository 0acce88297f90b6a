"""Launch shapes of the triangle kernel that the shipped ones must beat on Hopper, for 16-bit models."""

from __future__ import annotations

from dataclasses import fields

from vllm_trimix.kernels.triton_configs import TileConfig

# By padded head size: what it is, and the shape. All keep the table's ``block_m``. Under Triton 3.6.0 and 3.7.1 they
# compile without spills, and all but ``WAITING`` wait at most twice a step for the tensor cores; a test compiles them.
CANDIDATES: dict[int, dict[str, tuple[str, TileConfig]]] = {
    64: {
        "lookahead": ("with lookahead", TileConfig(128, 64, num_warps=8, num_stages=2, lookahead=True)),
        "deep": ("pipeline of three stages", TileConfig(128, 64, num_warps=8, num_stages=3)),
        "narrow": ("steps of 32 keys", TileConfig(128, 32, num_warps=8, num_stages=3)),
        "narrow_lookahead": (
            "steps of 32 keys, with lookahead",
            TileConfig(128, 32, num_warps=8, num_stages=3, lookahead=True),
        ),
        "wide": ("steps of 128 keys", TileConfig(128, 128, num_warps=8, num_stages=2)),
    },
    128: {
        "deep": ("pipeline of three stages", TileConfig(128, 64, num_warps=8, num_stages=3, lookahead=True)),
        "no_lookahead": ("without lookahead", TileConfig(128, 64, num_warps=8, num_stages=2)),
        "narrow": ("steps of 32 keys", TileConfig(128, 32, num_warps=8, num_stages=3, lookahead=True)),
        "wide": ("steps of 128 keys, without lookahead", TileConfig(128, 128, num_warps=8, num_stages=2)),
    },
    256: {
        "deep": ("pipeline of three stages", TileConfig(128, 32, num_warps=8, num_stages=3, lookahead=True)),
        "narrow": ("steps of 16 keys", TileConfig(128, 16, num_warps=8, num_stages=3, lookahead=True)),
    },
}

# Without lookahead the compiler waits after every product at head size 128: what that costs only a GPU can tell.
WAITING = {(128, "no_lookahead"), (128, "wide")}


def head_sizes(padded: int) -> range:
    """Head sizes that the kernel pads to ``padded``, a key of ``CANDIDATES``."""
    return range(1 if padded == 64 else padded // 2 + 1, padded + 1)


def contender(padded: int, name: str) -> str:
    """What a candidate is called in the table of contenders."""
    return f"trimix_triton_{name}" if padded == 128 else f"trimix_triton_{padded}_{name}"


def table_line(padded: int, tile: TileConfig) -> str:
    """The line of ``triton_configs.py`` that ships a launch shape."""
    values = {field.name: getattr(tile, field.name) for field in fields(tile)}
    told = {name: value for name, value in values.items() if value not in (False, None)}
    return f"    ({padded}, 2): TileConfig({', '.join(f'{name}={value}' for name, value in told.items())}),"
