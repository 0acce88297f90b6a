"""Compile the triangle kernel for CUDA targets without a GPU and report what each variant needs of the device.

``python -m vllm_trimix.kernels.triton_compile`` prints a Markdown table; ``--json`` prints the same rows for tools.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_trimix.kernels.triton_triangle import config_for, kernel_constants, tile_rows_for, triangle_prefill_kernel

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
# The tensor-core instruction of each generation, oldest last.
_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


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
    """

    capability: int
    head_size: int
    q_dtype: str = "bf16"
    cache_dtype: str = "bf16"
    group: int = 4
    block_size: int = 16


@dataclass(frozen=True)
class Report:
    """What a compiled variant needs.

    Attributes:
        variant: The variant.
        tile: Launch shape, ``BLOCK_M x BLOCK_N, warps, stages``.
        registers: Registers a thread.
        spill_bytes: Stack a thread, where spilled registers go.
        shared_bytes: Shared memory a thread block.
        matrix_instruction: Tensor-core instruction in use, "" for FMA.
        matrix_instructions: How often it occurs in the PTX.
        async_copies: Asynchronous copies in the PTX: the software pipeline is on.
        compile_s: Compile time in seconds.
    """

    variant: Variant
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instruction: str
    matrix_instructions: int
    async_copies: int
    compile_s: float


def default_variants() -> list[Variant]:
    """Data-centre GPUs x head sizes x (bf16, fp16, fp8 cache). Compute capability 8.0 has no e4m3, so e5m2 there."""
    variants = []
    for capability in (80, 90, 100):
        fp8 = "fp8e4nv" if capability >= 89 else "fp8e5"
        for head_size in (64, 96, 128, 256):
            for q_dtype, cache_dtype in (("bf16", "bf16"), ("fp16", "fp16"), ("bf16", fp8)):
                variants.append(Variant(capability, head_size, q_dtype, cache_dtype))
    return variants


def compile_variant(variant: Variant) -> Report:
    """Compiles one variant to a cubin with the default launch shape and reads its resources back."""
    compiled, seconds = _compile(variant)
    ptx = compiled.asm["ptx"]
    counts = {name: len(re.findall(rf"^\s*(?:@\S+ )?{re.escape(name)}\b", ptx, re.M)) for name in _MATRIX_INSTRUCTIONS}
    instruction = next((name for name in _MATRIX_INSTRUCTIONS if counts[name]), "")
    usage = _resource_usage(compiled.asm["cubin"])
    config = config_for(variant.head_size, _torch_dtype(variant.q_dtype).itemsize, variant.capability)
    return Report(
        variant=variant,
        tile=f"{config.block_m}x{config.block_n}, {config.num_warps}w, {config.num_stages}s",
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        matrix_instruction=instruction,
        matrix_instructions=counts.get(instruction, 0),
        async_copies=len(re.findall(r"^\s*(?:@\S+ )?cp\.async\.(?:cg|ca)\.", ptx, re.M)),
        compile_s=round(seconds, 1),
    )


def markdown(reports: list[Report]) -> str:
    """The reports as a Markdown table."""
    lines = [
        "| target | head size | query / cache | tile | registers | spills (B) | shared (KiB) | matrix instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        v = report.variant
        matrix = f"{report.matrix_instructions} {report.matrix_instruction}" if report.matrix_instruction else "none"
        lines.append(
            f"| sm_{v.capability} | {v.head_size} | {v.q_dtype} / {v.cache_dtype} | {report.tile} | {report.registers} "
            f"| {report.spill_bytes} | {report.shared_bytes / 1024:.1f} | {matrix} |"
        )
    return "\n".join(lines)


def _torch_dtype(name: str) -> torch.dtype:
    return next(dtype for dtype, spelling in _TYPES.items() if spelling == name)


def _compile(variant: Variant) -> tuple[triton.compiler.CompiledKernel, float]:
    q_dtype = _torch_dtype(variant.q_dtype)
    fp8_cache = variant.cache_dtype.startswith("fp8")
    scaled = {
        "q_scale_ptr": variant.q_dtype.startswith("fp8"),
        "k_scale_ptr": fp8_cache,
        "v_scale_ptr": fp8_cache,
    }
    config = config_for(variant.head_size, q_dtype.itemsize, variant.capability)
    constants = kernel_constants(
        config,
        q_dtype=q_dtype,
        group=variant.group,
        block_size=variant.block_size,
        head_size=variant.head_size,
        tile_rows=tile_rows_for(variant.group, 1, variant.head_size, q_dtype.itemsize),
        has_q_scale=scaled["q_scale_ptr"],
        has_k_scale=scaled["k_scale_ptr"],
        has_v_scale=scaled["v_scale_ptr"],
    )
    constants |= {name: None for name, present in scaled.items() if not present}
    output = "bf16" if variant.q_dtype.startswith("fp8") else variant.q_dtype
    types = {
        "q_ptr": f"*{variant.q_dtype}",
        "k_ptr": f"*{variant.cache_dtype}",
        "v_ptr": f"*{variant.cache_dtype}",
        "out_ptr": f"*{output}",
        "block_table_ptr": "*i32",
        "tiles_ptr": "*i32",
        "scale": "fp32",
        "soft_cap": "fp32",
        **{name: "*fp32" for name, present in scaled.items() if present},
    }
    signature, attributes = {}, {}
    for index, name in enumerate(triangle_prefill_kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        # What a launch finds: aligned pointers, strides that are multiples of 16, n_local 512. Not so: n_init 8, and
        # the strides of tiles and of the block table.
        aligned = name.endswith("_ptr") or name.startswith("stride_") or name == "n_local"
        if name not in constants and aligned and name not in ("stride_tile", "stride_table"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    start = time.perf_counter()
    compiled = triton.compile(
        ASTSource(triangle_prefill_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", variant.capability, 32),
        options=options,
    )
    return compiled, time.perf_counter() - start


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Counters of ``cuobjdump -res-usage``, the tool that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = text[text.index("triangle_prefill_kernel") :]
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", line)}


def _parse_variant(argument: str) -> Variant:
    capability, head_size, q_dtype, cache_dtype, *rest = argument.split(",")
    return Variant(int(capability), int(head_size), q_dtype, cache_dtype, *map(int, rest))


def main() -> None:
    """Command line: the default variants, or those named by their fields."""
    parser = argparse.ArgumentParser(prog="python -m vllm_trimix.kernels.triton_compile", description=__doc__)
    parser.add_argument(
        "variants",
        nargs="*",
        type=_parse_variant,
        metavar="CAPABILITY,HEAD_SIZE,QUERY,CACHE[,GROUP[,BLOCK_SIZE]]",
        help="variants to compile instead of the default ones, e.g. 90,128,bf16,bf16",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as each variant is done")
    options = parser.parse_args()
    reports = []
    for variant in options.variants or default_variants():
        reports.append(compile_variant(variant))
        if options.json:
            print(json.dumps(asdict(reports[-1])), flush=True)
    if not options.json:
        print(f"Triton {triton.__version__}\n\n{markdown(reports)}")


if __name__ == "__main__":
    main()
