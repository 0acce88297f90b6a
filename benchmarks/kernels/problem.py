"""What is prefilled: a layer's shape, one prompt's random queries, keys and values, and its paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_trimix.kernels.triton_configs import MAX_HEAD_SIZE
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Plan, Request, build_plan

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Settings:
    """One run's layer and how it is prefilled.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: Dtype of queries and outputs, and of the cache unless ``fp8``.
        fp8: Whether the cache holds fp8 (e4m3, scale 1).
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Head size.
        block_size: Tokens of a page.
        chunk: Rows of one step, as vLLM's scheduler cuts a prompt.
        pattern: The triangle.
        threads: CPU threads.
        repeats: Timed rounds.
    """

    device: torch.device
    dtype: torch.dtype
    fp8: bool
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    chunk: int
    pattern: Triangle
    threads: int
    repeats: int

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return self.head_size**-0.5

    def chunks(self, length: int) -> list[tuple[int, int]]:
        """The [start, end) rows of each step of a prompt."""
        return [(start, min(start + self.chunk, length)) for start in range(0, length, self.chunk)]


def default_chunk() -> int:
    """The ``max_num_batched_tokens`` that vLLM's server takes on this device when none is given."""
    # Heavy, and only where no step is given.
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    return EngineArgs.get_batch_defaults(world_size=1)[0][UsageContext.OPENAI_API_SERVER]


def check(settings: Settings, lengths: list[int]) -> None:
    """Refuses what no contender of the device could run.

    Raises:
        ValueError: Naming the option, the value and the limit.
    """
    on_cpu = settings.device.type == "cpu"
    # Heavy: bad options are refused before.
    from vllm.platforms import current_platform

    if on_cpu != current_platform.is_cpu():
        raise ValueError(f"--device: {settings.device.type} is not what this vLLM was built for")
    for option, value, least in (
        ("--num-heads", settings.num_heads, 1),
        ("--num-kv-heads", settings.num_kv_heads, 1),
        ("--head-size", settings.head_size, 1),
        ("--chunk", settings.chunk, 1),
        ("--repeats", settings.repeats, 1),
        ("--threads", settings.threads, 1),
        ("--n-init", settings.pattern.n_init, 0),
        ("--n-local", settings.pattern.n_local, 1),
        ("--last-n", settings.pattern.last_n, 0),
        *(("--lengths", length, 1) for length in lengths),
    ):
        if value < least:
            raise ValueError(f"{option}: {value} is too small; the least is {least}")
    if settings.num_heads % settings.num_kv_heads:
        raise ValueError(
            f"--num-heads: {settings.num_heads} is not a multiple of --num-kv-heads {settings.num_kv_heads}"
        )
    sizes = _head_sizes(on_cpu)
    if settings.head_size not in sizes:
        raise ValueError(
            f"--head-size: {settings.head_size} is not supported on {settings.device.type}; one of {sorted(sizes)}"
        )
    multiple = 32 if on_cpu else 16
    if settings.block_size < 1 or settings.block_size % multiple:
        raise ValueError(f"--block-size: {settings.block_size} is not a multiple of {multiple}")
    if settings.fp8 and on_cpu:
        raise ValueError("--kv-cache-dtype: fp8 pages stay dense on CPU, there is no triangle to time; use auto")
    if settings.fp8 and torch.cuda.get_device_capability(settings.device) < (8, 9):
        raise ValueError("--kv-cache-dtype: fp8 (e4m3) needs compute capability 8.9; use auto")
    if settings.dtype == torch.float32 and not on_cpu:
        raise ValueError("--dtype: float32 has no dense kernel in vLLM on CUDA; use bfloat16 or float16")


def _head_sizes(on_cpu: bool) -> list[int]:
    if on_cpu:
        # Only the CPU build can import it.
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend.get_supported_head_sizes()
    return list(range(16, MAX_HEAD_SIZE + 1, 16))


@dataclass
class Problem:
    """One prompt's layer inputs, the same for every contender.

    Attributes:
        settings: The layer.
        length: Prompt tokens.
        chunks: The [start, end) rows of each step.
        q: Queries, [length, num_heads, head_size].
        k: Keys, [length, num_kv_heads, head_size]; with an fp8 cache, what the cache holds, in ``q``'s dtype.
        v: Values, likewise.
        kv_cache: The paged cache as vLLM hands it to a layer, [num_blocks, num_kv_heads, block_size, 2 * head_size].
        block_table: Page ids, permuted, [1, blocks], int32. Page 0 is left free, as in vLLM.
        out: Where contenders that can write in place put their rows, like ``q``.
        q_fp8: ``q``'s values in fp8, as vLLM's layer quantises queries for an fp8 cache; else None.
        isa: The instruction set of vLLM's CPU kernels; "" on CUDA.
    """

    settings: Settings
    length: int
    chunks: list[tuple[int, int]]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    out: torch.Tensor
    q_fp8: torch.Tensor | None
    isa: str


def make_problem(settings: Settings, length: int, *, seed: int = 0) -> Problem:
    """Random inputs, never zeros, and the cache filled with them through a permuted page table."""
    generator = torch.Generator(settings.device).manual_seed(seed)

    def random(heads: int) -> torch.Tensor:
        shape = (length, heads, settings.head_size)
        values = torch.randn(shape, generator=generator, device=settings.device, dtype=settings.dtype)
        return values.to(FP8).to(settings.dtype) if settings.fp8 else values

    q, k, v = random(settings.num_heads), random(settings.num_kv_heads), random(settings.num_kv_heads)
    blocks = -(-length // settings.block_size)
    pages = torch.randperm(blocks, generator=generator, device=settings.device) + 1
    positions = torch.arange(length, device=settings.device)
    slots = pages[positions // settings.block_size] * settings.block_size + positions % settings.block_size
    fill = _fill_cpu_cache if settings.device.type == "cpu" else _fill_cuda_cache
    kv_cache, isa = fill(settings, k, v, slots, blocks + 1)
    return Problem(
        settings=settings,
        length=length,
        chunks=settings.chunks(length),
        q=q,
        k=k,
        v=v,
        kv_cache=kv_cache,
        block_table=pages.to(torch.int32)[None],
        out=torch.empty_like(q),
        q_fp8=q.to(FP8) if settings.fp8 else None,
        isa=isa,
    )


def _fill_cpu_cache(
    settings: Settings, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, num_blocks: int
) -> tuple[torch.Tensor, str]:
    """Through vLLM's own cache op: its pages are packed for the instruction set."""
    # Only the CPU build can import it.
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    if torch.cpu._is_amx_tile_supported():
        # vLLM's AMX ops need tile permission, which only its workers ask for.
        torch.cpu._init_amx()
    isa = _get_attn_isa(settings.dtype, settings.block_size, settings.head_size)
    cache = torch.zeros(
        num_blocks, settings.num_kv_heads, settings.block_size, 2 * settings.head_size, dtype=settings.dtype
    )
    key_cache, value_cache = split_cpu_cache(cache)
    ops.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, slots, isa)
    return cache, isa


def split_cpu_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as vLLM's CPU kernels take them: a head's K page, then its V page."""
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    key_cache, value_cache = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
    return key_cache, value_cache


def _fill_cuda_cache(
    settings: Settings, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, num_blocks: int
) -> tuple[torch.Tensor, str]:
    """In vLLM's default layout for CUDA: tokens outermost in a page, then heads, a head's K beside its V."""
    shape = (num_blocks, settings.block_size, settings.num_kv_heads, 2 * settings.head_size)
    stored = torch.zeros(shape, dtype=FP8 if settings.fp8 else settings.dtype, device=settings.device)
    tokens = torch.cat((k, v), dim=-1).to(stored.dtype)
    # Bytes: indexed writes know no fp8.
    stored.view(torch.uint8).flatten(0, 1)[slots] = tokens.view(torch.uint8)
    return stored.transpose(1, 2), ""


def plan_steps(problem: Problem, *, max_tail_rows: int = 0) -> list[Plan]:
    """The backend's plan of each step, for a prompt that is alone in its batch."""
    request = Request(problem.length)
    return [
        build_plan(
            [0, end - start],
            [end],
            [request],
            pattern=problem.settings.pattern,
            min_prompt_len=0,
            max_tail_rows=max_tail_rows,
        )
        for start, end in problem.chunks
    ]
