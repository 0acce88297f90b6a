"""Compile the kernels for CUDA targets without a GPU and report what each variant needs of the device.

``python -m vllm_trimix.kernels.triton_compile`` prints a Markdown table; ``--json FILE`` writes its rows for tools.
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_trimix.kernels import triton_merge
from vllm_trimix.kernels.occupancy import programs_per_multiprocessor
from vllm_trimix.kernels.triton_configs import (
    TileConfig,
    config_for,
    estimate_config_for,
    padded_tile,
    sparse_config_for,
    tile_rows_for,
)
from vllm_trimix.kernels.triton_estimate import estimate_constants, estimate_kernel
from vllm_trimix.kernels.triton_launch import TensorKinds
from vllm_trimix.kernels.triton_sparse import sparse_constants, sparse_prefill_kernel
from vllm_trimix.kernels.triton_triangle import triangle_constants, triangle_prefill_kernel

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
# The tensor-core instructions of each generation, oldest last.
_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
_NUM_KV_HEADS = 8
_KERNELS = ("prefill", "merge", "sparse-64", "sparse-128", "estimate-stats", "estimate-sums")


@dataclass(frozen=True)
class Variant:
    """One kernel variant to compile.

    Attributes:
        capability: Compute capability times ten (80, 90, 100, ...).
        head_size: True head size.
        q_dtype: Query dtype, in Triton's spelling.
        cache_dtype: KV-cache dtype, in Triton's spelling.
        group: Query heads per KV head.
        block_size: Tokens of a page.
        n_init: Sink keys.
        kernel: ``prefill``; ``merge`` for the merge of partial results; ``sparse-64`` and ``sparse-128`` for sparse
            prefill by blocks of that size; ``estimate-stats`` and ``estimate-sums`` for the estimate's two passes.
        sparse: What the sparse kernel has to do besides blocks: ``columns``, ``band``, ``soft_cap``.
    """

    capability: int
    head_size: int
    q_dtype: str = "bf16"
    cache_dtype: str = "bf16"
    group: int = 4
    block_size: int = 16
    n_init: int = 8
    kernel: str = "prefill"
    sparse: tuple[str, ...] = ("columns", "band")


@dataclass(frozen=True)
class Report:
    """What a compiled variant needs.

    Attributes:
        variant: The variant.
        tile: Launch shape, ``BLOCK_M x BLOCK_N, warps, stages`` and whether it looks ahead.
        registers: Registers a thread.
        spill_bytes: Stack a thread, where spilled registers go.
        shared_bytes: Shared memory a program.
        tensor_memory_columns: Columns of tensor memory a program, of 512; 0 where there is none.
        num_warps: Warps a program.
        programs: Programs that share a multiprocessor.
        matrix_instruction: Tensor-core instruction in use, "" for FMA.
        matrix_instructions: How often it occurs in the PTX.
        async_copies: Asynchronous copies in the PTX: the software pipeline is on.
        loop_instructions: Machine instructions of the loop over the keys, masked steps included; 0 where it isn't one
            block.
        mask_instructions: Of those, what a step without a mask jumps over.
        loop_waits: Waits for the tensor cores in that loop, on Hopper. The compiler waits after every instruction
            ("serialises") when registers run short: many times the cost, with no spill to show for it.
        loop_exponentials: Instructions of that loop for the special-function units, which take exponentials.
    """

    variant: Variant
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    num_warps: int
    programs: int
    matrix_instruction: str
    matrix_instructions: int
    async_copies: int
    loop_instructions: int
    mask_instructions: int
    loop_waits: int
    loop_exponentials: int


def default_variants() -> list[Variant]:
    """Data-centre GPUs x head sizes x (bf16, fp16, fp8 cache, fp8 queries and cache), the merge, and sparse prefill.

    Sparse prefill with columns and a band, which cost most. Compute capability 8.0 has no e4m3, so e5m2 there, and no
    fp8 queries.
    """
    variants = []
    for capability in (80, 90, 100):
        fp8 = "fp8e4nv" if capability >= 89 else "fp8e5"
        pairs = [("bf16", "bf16"), ("fp16", "fp16"), ("bf16", fp8), ("fp8e4nv", "fp8e4nv")]
        for head_size in (64, 96, 128, 256):
            for q_dtype, cache_dtype in pairs if capability >= 89 else pairs[:3]:
                variants.append(Variant(capability, head_size, q_dtype, cache_dtype))
        variants.append(Variant(capability, 128, kernel="merge"))
        for kernel in ("sparse-64", "sparse-128"):
            variants += [Variant(capability, head_size, kernel=kernel) for head_size in (64, 96, 128, 256)]
            fp8_pairs = pairs[2:] if capability >= 89 else pairs[2:3]
            variants += [Variant(capability, 128, *dtypes, kernel=kernel) for dtypes in fp8_pairs]
        for kernel in ("estimate-stats", "estimate-sums"):
            variants += [Variant(capability, head_size, kernel=kernel) for head_size in (128, 256)]
    return variants


def compile_variant(variant: Variant) -> Report:
    """Compiles one variant to a cubin with the default launch shape and reads its resources back."""
    if variant.kernel == "prefill":
        compiled = _compile_prefill(variant)
    elif variant.kernel == "merge":
        compiled = _compile_merge(variant)
    elif variant.kernel.startswith("sparse"):
        compiled = _compile_sparse(variant)
    else:
        compiled = _compile_estimate(variant)
    ptx = compiled.asm["ptx"]
    counts = {name: len(re.findall(rf"^\s*(?:@\S+ )?{re.escape(name)}\b", ptx, re.M)) for name in _MATRIX_INSTRUCTIONS}
    instruction = next((name for name in _MATRIX_INSTRUCTIONS if counts[name]), "")
    usage, loop = _inspect(compiled.asm["cubin"])
    # Blackwell's asynchronous loop is several blocks.
    loop = [] if instruction == "tcgen05.mma" else loop
    needs = {
        "registers": usage["REG"],
        "shared_bytes": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "tensor_memory_columns": getattr(compiled.metadata, "tmem_size", 0),
    }
    return Report(
        variant=variant,
        tile=_tile(variant),
        **needs,
        programs=programs_per_multiprocessor(variant.capability, **needs),
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        matrix_instruction=instruction,
        matrix_instructions=counts.get(instruction, 0),
        async_copies=len(re.findall(r"^\s*(?:@\S+ )?cp\.async\.(?:cg|ca)\.", ptx, re.M)),
        loop_instructions=len(loop),
        mask_instructions=_skipped(loop),
        loop_waits=sum("WARPGROUP.DEPBAR" in line for _, line in loop),
        loop_exponentials=sum("MUFU" in line for _, line in loop),
    )


def markdown(reports: list[Report]) -> str:
    """The reports as a Markdown table."""
    lines = [
        "| target | kernel | head size | query / cache | tile | registers | spills (B) | shared (KiB) "
        "| programs | matrix instructions | loop |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        v = report.variant
        matrix = f"{report.matrix_instructions} {report.matrix_instruction}" if report.matrix_instruction else "none"
        loop = (
            f"{report.loop_instructions} ({report.mask_instructions}), {report.loop_exponentials}, {report.loop_waits}"
            if report.loop_instructions
            else "-"
        )
        lines.append(
            f"| sm_{v.capability} | {v.kernel} | {v.head_size} | {v.q_dtype} / {v.cache_dtype} | {report.tile} "
            f"| {report.registers} | {report.spill_bytes} | {report.shared_bytes / 1024:.1f} | {report.programs} "
            f"| {matrix} | {loop} |"
        )
    return "\n".join(lines)


def _torch_dtype(name: str) -> torch.dtype:
    return next(dtype for dtype, spelling in _TYPES.items() if spelling == name)


def _tile(variant: Variant) -> str:
    if variant.kernel == "merge":
        return f"{triton_merge.BLOCK_ROWS} rows, {triton_merge.NUM_WARPS}w"
    config = _config(variant)
    ahead = ", ahead" if config.lookahead else ""
    return f"{config.block_m}x{config.block_n}, {config.num_warps}w, {config.num_stages}s{ahead}"


def _config(variant: Variant) -> TileConfig:
    q_size, cache_size = (_torch_dtype(name).itemsize for name in (variant.q_dtype, variant.cache_dtype))
    if variant.kernel == "prefill":
        return config_for(variant.head_size, q_size, cache_size, variant.capability)
    if variant.kernel.startswith("estimate"):
        return estimate_config_for(variant.head_size, q_size)
    return sparse_config_for(variant.head_size, q_size, cache_size, _sparse_block(variant), variant.capability)


def _sparse_block(variant: Variant) -> int:
    return int(variant.kernel.removeprefix("sparse-"))


def _compile_prefill(variant: Variant) -> triton.compiler.CompiledKernel:
    q_size = _torch_dtype(variant.q_dtype).itemsize
    constants = triangle_constants(
        _config(variant),
        _kinds(variant),
        tile_rows=tile_rows_for(variant.group, 1, variant.head_size, q_size, variant.capability),
        n_init=variant.n_init,
    )
    types = _attention_types(variant) | {
        "partial_ptr": "*fp32",
        "partial_stats_ptr": "*fp32",
        "block_table_ptr": "*i32",
        "items_ptr": "*i32",
    }
    constants |= {f"{name}_ptr": None for name, present in _scales(variant).items() if not present}
    return _compile(triangle_prefill_kernel, types, constants, variant.capability, _options(_config(variant)))


def _compile_sparse(variant: Variant) -> triton.compiler.CompiledKernel:
    has_columns, has_band = "columns" in variant.sparse, "band" in variant.sparse
    constants = sparse_constants(
        _config(variant),
        replace(_kinds(variant), has_soft_cap="soft_cap" in variant.sparse),
        block_size=_sparse_block(variant),
        has_columns=has_columns,
        has_band=has_band,
    )
    tables = {
        "block_table": True,
        "block_count": True,
        "block_index": True,
        "column_count": has_columns,
        "column_index": has_columns,
        "band": has_band,
        "keys_read": True,
    }
    types = _attention_types(variant) | {f"{name}_ptr": "*i32" for name in tables}
    constants |= {f"{name}_ptr": None for name, present in (tables | _scales(variant)).items() if not present}
    return _compile(sparse_prefill_kernel, types, constants, variant.capability, _options(_config(variant)))


def _compile_estimate(variant: Variant) -> triton.compiler.CompiledKernel:
    scales = {name: present for name, present in _scales(variant).items() if name != "v_scale"}
    constants = estimate_constants(_config(variant), _kinds(variant))
    constants |= {f"{name}_ptr": None for name, present in scales.items() if not present}
    constants["IS_STATS"] = variant.kernel == "estimate-stats"
    sums = dict.fromkeys(("max_ptr", "sum_ptr", "columns_ptr", "slashes_ptr"), "*fp32")
    types = _attention_types(variant) | {"block_table_ptr": "*i32"} | sums
    return _compile(estimate_kernel, types, constants, variant.capability, _options(_config(variant)))


def _kinds(variant: Variant) -> TensorKinds:
    return TensorKinds(
        q_dtype=_torch_dtype(variant.q_dtype),
        cache_dtype=_torch_dtype(variant.cache_dtype),
        num_heads=_NUM_KV_HEADS * variant.group,
        num_kv_heads=_NUM_KV_HEADS,
        head_size=variant.head_size,
        page_size=variant.block_size,
        cache_stride=_cache_stride(variant),
        **{f"has_{name}": present for name, present in _scales(variant).items()},
    )


def _scales(variant: Variant) -> dict[str, bool]:
    """Which dequantisation scales the kernel gets."""
    has_q, has_kv = (_torch_dtype(name).itemsize == 1 for name in (variant.q_dtype, variant.cache_dtype))
    return {"q_scale": has_q, "k_scale": has_kv, "v_scale": has_kv}


def _cache_stride(variant: Variant) -> tuple[int, int, int]:
    """vLLM's default order: blocks, heads, tokens, keys beside values."""
    row = 2 * variant.head_size
    return (_NUM_KV_HEADS * variant.block_size * row, variant.block_size * row, row)


def _attention_types(variant: Variant) -> dict[str, str]:
    """Types of what the kernels take alike."""
    return {
        "q_ptr": f"*{variant.q_dtype}",
        "k_ptr": f"*{variant.cache_dtype}",
        "v_ptr": f"*{variant.cache_dtype}",
        "out_ptr": "*bf16" if _scales(variant)["q_scale"] else f"*{variant.q_dtype}",
        "scale": "fp32",
        "soft_cap": "fp32",
        **dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32"),
    }


def _options(config: TileConfig) -> dict[str, int | None]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers}


def _compile_merge(variant: Variant) -> triton.compiler.CompiledKernel:
    rows = tile_rows_for(variant.group, 1, variant.head_size, 2, variant.capability)
    tile = padded_tile(rows, variant.group, variant.head_size)
    partials = triton_merge.Partials(torch.empty(1, *tile, device="meta"), torch.empty(1, 2, tile[0], device="meta"))
    constants = triton_merge.merge_constants(
        partials,
        num_heads=_NUM_KV_HEADS * variant.group,
        num_kv_heads=_NUM_KV_HEADS,
        head_size=variant.head_size,
        has_v_scale=False,
    )
    types = {
        "partial_ptr": "*fp32",
        "partial_stats_ptr": "*fp32",
        "merges_ptr": "*i32",
        "out_ptr": f"*{variant.q_dtype}",
    }
    kernel = triton_merge.merge_partials_kernel
    constants |= {"v_scale_ptr": None}
    return _compile(kernel, types, constants, variant.capability, {"num_warps": triton_merge.NUM_WARPS})


def _compile(
    kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, object], capability: int, options: dict
) -> triton.compiler.CompiledKernel:
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        # What a launch finds: aligned pointers, strides that are multiples of 16, n_local 512; but not the block
        # table's stride, nor what the kernel is never specialised on.
        aligned = name.endswith("_ptr") or name.startswith("stride_") or name == "n_local"
        free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if name not in constants and aligned and not free and name != "stride_table":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={**options, "enable_fp_fusion": True},
    )


def _skipped(loop: list[tuple[int, str]]) -> int:
    """Instructions that the loop's longest forward jump leaves out."""
    targets = [(at, _target(text)) for at, text in loop]
    return max((sum(at < other < target for other, _ in loop) for at, target in targets), default=0)


def _target(text: str) -> int:
    """Where an instruction jumps to; -1 if it doesn't."""
    jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
    return int(jump[1], 16) if jump else -1


def _inspect(cubin: bytes) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Resource counters, and the instructions of the longest loop, by the tool that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dump(what: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, what, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, machine_code = dump("-res-usage"), dump("-sass")
    counters = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", machine_code)]
    longest: list[tuple[int, str]] = []
    for end, text in lines:
        # A jump to itself pads the end of the code.
        if 0 <= _target(text) < end:
            longest = max(longest, [line for line in lines if _target(text) <= line[0] <= end], key=len)
    return counters, longest


def _parse_variant(argument: str) -> Variant:
    capability, head_size, q_dtype, cache_dtype, *rest = argument.split(",")
    numbers = [int(part) for part in rest if part.isdecimal()]
    kernel, *sparse = [part for part in rest if not part.isdecimal()] or ["prefill"]
    unknown = {kernel} - set(_KERNELS) or set(sparse) - {"plain", "columns", "band", "soft_cap"}
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {sorted(unknown)} in {argument!r}; kernels are {_KERNELS}")
    group, block_size, n_init = [*numbers, *(4, 16, 8)[len(numbers) :]]
    variant = Variant(int(capability), int(head_size), q_dtype, cache_dtype, group, block_size, n_init, kernel=kernel)
    return replace(variant, sparse=tuple(sparse)) if sparse else variant


def main() -> None:
    """Command line: the default variants, or those named by their fields."""
    parser = argparse.ArgumentParser(prog="python -m vllm_trimix.kernels.triton_compile", description=__doc__)
    parser.add_argument(
        "variants",
        nargs="*",
        type=_parse_variant,
        metavar="CAPABILITY,HEAD_SIZE,QUERY,CACHE[,GROUP[,BLOCK_SIZE[,N_INIT]]][,KERNEL[,plain|columns,band,soft_cap]]",
        help="variants to compile instead of the default ones, e.g. 90,128,bf16,bf16",
    )
    parser.add_argument(
        "--capabilities",
        nargs="+",
        type=int,
        metavar="N",
        help="of the default variants those for these GPUs, e.g. 80 90",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the reports to FILE, as JSON")
    options = parser.parse_args()
    defaults = [v for v in default_variants() if options.capabilities is None or v.capability in options.capabilities]
    reports = [compile_variant(variant) for variant in options.variants or defaults]
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports]))
    print(f"Triton {triton.__version__}\n\n{markdown(reports)}")


if __name__ == "__main__":
    main()
