"""Every kernel that is timed, in one table; what can't run here says why.

To add one: a class or function that prepares it for a ``Problem``, in one of the files imported here, and its entry in
``CONTENDERS``.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from benchmarks.kernels import cpu_contenders as cpu
from benchmarks.kernels import cuda_contenders as cuda
from benchmarks.kernels import cuda_unpaged_contenders as cuda_unpaged
from benchmarks.kernels import flex, tiles
from benchmarks.kernels.counting import dense_pattern
from benchmarks.kernels.problem import Problem, Settings
from benchmarks.kernels.reference import Mask
from vllm_trimix.backend.triangle.flash_merge import FlashMergePrefill
from vllm_trimix.backend.triangle.flash_pages import FlashPagesPrefill
from vllm_trimix.backend.triangle.prefill import TrianglePrefill
from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill
from vllm_trimix.kernels.triton_configs import TileConfig


class Prepared(Protocol):
    """A contender ready for one prompt."""

    def plan(self) -> None:
        """What vLLM does once a step for all layers: schedules, tiles. All steps of the prompt."""

    def run(self) -> list[torch.Tensor]:
        """One layer's attention of all steps; the rows of each in order, [rows, num_heads, head_size]."""


@dataclass(frozen=True)
class Contender:
    """One kernel.

    Attributes:
        about: What it is, for the report.
        pattern: Which keys its rows see.
        paged: Whether it reads the paged cache; else contiguous keys and values.
        devices: Where it runs.
        prepare: Makes it ready for one prompt.
        missing: Why it can't run on this machine although the device fits, or None.
        chunked: Whether it runs step by step as vLLM schedules; else the whole prompt in one call.
        fp8_products: Whether it multiplies in fp8 when the cache is fp8.
        compiles: Whether each length costs it a compilation of tens of seconds.
        own_mask: What it is checked against where that isn't its pattern's mask, from the settings.
    """

    about: str
    pattern: Literal["dense", "triangle"]
    paged: bool
    devices: tuple[str, ...]
    prepare: Callable[[Problem], Prepared]
    missing: Callable[[Settings], str | None] = lambda settings: None
    chunked: bool = True
    fp8_products: bool = False
    compiles: bool = False
    own_mask: Callable[[Settings], Mask] | None = None

    def mask(self, problem: Problem) -> Mask:
        """What its rows see: its output is checked against this."""
        if self.own_mask is not None:
            return self.own_mask(problem.settings)
        return dense_pattern(problem.length) if self.pattern == "dense" else problem.settings.pattern

    def unavailable(self, settings: Settings, *, quick: bool = False) -> str | None:
        """Why it can't take part, or None."""
        if settings.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {settings.device.type}"
        if quick and self.compiles and settings.device.type == "cpu":
            return "left out by --quick: each length compiles for about a minute; name it in --contenders to run it"
        return self.missing(settings)


def _flash_attention(version: int) -> Contender:
    return Contender(
        about=f"vLLM's FlashAttention {version}",
        pattern="dense",
        paged=True,
        devices=("cuda",),
        prepare=functools.partial(cuda.FlashAttention, version=version),
        missing=functools.partial(cuda.flash_attention_missing, version=version),
        fp8_products=True,
    )


def _trimix(
    about: str,
    prefill: type[TrianglePrefill],
    *,
    max_tail_rows: int | None = None,
    tile: TileConfig | None = None,
    missing: Callable[[Settings], str | None] = cuda.triton_missing,
    own_mask: Callable[[Settings], Mask] | None = None,
) -> Contender:
    return Contender(
        about=f"ours: {about}",
        pattern="triangle",
        paged=True,
        devices=("cuda",),
        prepare=functools.partial(cuda.Trimix, prefill=prefill, max_tail_rows=max_tail_rows, tile=tile),
        missing=missing,
        fp8_products=True,
        own_mask=own_mask,
    )


CONTENDERS: dict[str, Contender] = {
    "vllm_cpu": Contender(
        about="vLLM's CPU kernel",
        pattern="dense",
        paged=True,
        devices=("cpu",),
        prepare=cpu.VllmCpu,
    ),
    "torch_sdpa": Contender(
        about="torch SDPA, causal mask of each step",
        pattern="dense",
        paged=False,
        devices=("cpu",),
        prepare=cpu.TorchSdpa,
    ),
    "vllm_fa3": _flash_attention(3),
    "vllm_fa2": _flash_attention(2),
    "vllm_fa4": _flash_attention(4),
    "flashinfer": Contender(
        about="FlashInfer's paged prefill",
        pattern="dense",
        paged=True,
        devices=("cuda",),
        prepare=cuda.FlashInfer,
        missing=functools.partial(cuda.package_missing, package="flashinfer"),
    ),
    "cudnn_sdpa": Contender(
        about="torch SDPA on cuDNN",
        pattern="dense",
        paged=False,
        devices=("cuda",),
        prepare=cuda_unpaged.CudnnSdpa,
        missing=cuda_unpaged.cudnn_missing,
        chunked=False,
    ),
    "flash_attn": Contender(
        about="the flash-attn package",
        pattern="dense",
        paged=False,
        devices=("cuda",),
        prepare=cuda_unpaged.FlashAttnPackage,
        missing=functools.partial(cuda.package_missing, package="flash_attn"),
    ),
    "xformers": Contender(
        about="xFormers' memory-efficient attention",
        pattern="dense",
        paged=False,
        devices=("cuda",),
        prepare=cuda_unpaged.Xformers,
        missing=functools.partial(cuda.package_missing, package="xformers"),
    ),
    "flex_dense": Contender(
        about="FlexAttention, causal block mask",
        pattern="dense",
        paged=False,
        devices=("cpu", "cuda"),
        prepare=functools.partial(flex.Flex, pattern="dense"),
        missing=flex.missing,
        chunked=False,
        compiles=True,
    ),
    "flex_triangle": Contender(
        about="FlexAttention, the triangle's block mask",
        pattern="triangle",
        paged=False,
        devices=("cpu", "cuda"),
        prepare=functools.partial(flex.Flex, pattern="triangle"),
        missing=flex.missing,
        chunked=False,
        compiles=True,
    ),
    "trimix_cpu": Contender(
        about="ours: tiles over packed pages, last rows by vLLM's CPU kernel",
        pattern="triangle",
        paged=True,
        devices=("cpu",),
        prepare=cpu.TrimixCpu,
    ),
    "trimix_cpu_sdpa": Contender(
        about="ours with torch SDPA as the tile kernel",
        pattern="triangle",
        paged=True,
        devices=("cpu",),
        prepare=functools.partial(cpu.TrimixCpu, sdpa_tiles=True),
    ),
    "trimix_triton": _trimix("the Triton kernel, last rows included", TritonPrefill),
    "trimix_triton_stock_tail": _trimix(
        "the Triton kernel, last rows by vLLM's FlashAttention", TritonPrefill, max_tail_rows=0
    ),
    "trimix_flash_merge": _trimix(
        "window and sinks by two launches of vLLM's FlashAttention, merged",
        FlashMergePrefill,
        missing=cuda.flash_missing,
    ),
    "trimix_flash_pages": _trimix(
        "tiles as requests of vLLM's FlashAttention; sees and is checked against a superset, rounded to pages",
        FlashPagesPrefill,
        missing=cuda.flash_missing,
        own_mask=cuda.PagesMask,
    ),
}

# Other launch shapes on Hopper: what the table's entries must beat.
CONTENDERS |= {
    tiles.contender(padded, name): _trimix(
        f"the Triton kernel, {about}",
        TritonPrefill,
        tile=tile,
        missing=functools.partial(cuda.tile_missing, head_sizes=tiles.head_sizes(padded)),
    )
    for padded, candidates in tiles.CANDIDATES.items()
    for name, (about, tile) in candidates.items()
}


def dense_baseline(settings: Settings) -> str:
    """The contender that is this device's own dense kernel in vLLM."""
    return "vllm_cpu" if settings.device.type == "cpu" else f"vllm_fa{cuda.flash_attention_version(settings)}"


def select(names: Iterable[str]) -> list[str]:
    """Checks names of contenders.

    Raises:
        ValueError: An unknown one, with the nearest that is known.
    """
    names = list(names)
    for name in names:
        if name not in CONTENDERS:
            near = difflib.get_close_matches(name, CONTENDERS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(CONTENDERS)}"
            raise ValueError(f"--contenders: unknown contender {name!r}; {hint}")
    return names
