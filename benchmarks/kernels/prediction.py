"""What the Triton kernel can reach on Hopper, from what is known without one: steps, instructions, bytes, ceilings.

``python -m benchmarks.kernels.prediction`` prints the table of ``docs/kernels.md``. It is arithmetic, not a
measurement: each column is the time that one resource needs if nothing else took any.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_trimix.kernels.triton_configs import config_for, tile_rows_for
from vllm_trimix.kernels.work_items import DENSE, cut_work
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Request, build_plan

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 32, 8, 128
LENGTHS = (8192, 32768, 65536, 131072)
# vLLM's default on GPUs of this size, for servers.
CHUNK = 8192
PATTERN = Triangle(n_init=8, n_local=512, last_n=128)

MULTIPROCESSORS = 132
# Dense bf16 tensor cores, FLOP a cycle and multiprocessor (NVIDIA's H100 architecture paper: 989 TFLOP/s at 1.83 GHz).
TENSOR_FLOP = 4096
# 8192^3 bf16 matmul on an H200: the clock that this rate is the peak of stands for what the power limit leaves.
MATMUL_FLOP_S = 788e12
CLOCK = MATMUL_FLOP_S / MULTIPROCESSORS / TENSOR_FLOP
SHARED_BYTES = 128  # A cycle and multiprocessor.
SCHEDULERS = 4  # One instruction a cycle each.
L2_BYTES_S = 5.5e12  # Reads, all multiprocessors; microbenchmarks of H100 that others published.
# FlashAttention 3, forward, causal, head size 128, long sequences on an H100: about what its paper shows.
DENSE_FLOP_S = 650e12
# Instructions of the loop in a step without a mask, by the compile report (``loop_instructions - mask_instructions``);
# a test compares.
INSTRUCTIONS = 616 - 177
# A program's own latencies, in cycles: its item, its pages and its first keys one after the other (600 each from L2),
# and the output's way through shared memory.
FIXED_CYCLES = 2400


@dataclass(frozen=True)
class Prediction:
    """Seconds of one layer, body and last rows, as each resource alone would need them.

    Attributes:
        length: Prompt tokens.
        tensor: Matrix products as executed, masked parts included.
        shared: Operand reads and the copies that fill them.
        issue: Instructions.
        l2: Keys and values, once for each program.
        fixed: Latencies that nothing hides, as one program runs on a multiprocessor at a time.
        dense: FlashAttention 3, the whole prompt.
        pair_bound: Dense pairs over triangle pairs.
    """

    length: int
    tensor: float
    shared: float
    issue: float
    l2: float
    fixed: float
    dense: float
    pair_bound: float

    @property
    def ours(self) -> float:
        """The slowest resource and the latencies: no kernel of this shape is faster."""
        return max(self.tensor, self.shared, self.issue, self.l2) + self.fixed


def predict(length: int) -> Prediction:
    """Counts the work items that the backend would launch for a prompt alone in its batch."""
    config = config_for(HEAD_SIZE, 2, 2, 90)
    steps = programs = 0
    for start in range(0, length, CHUNK):
        end = min(length, start + CHUNK)
        plan = build_plan(
            [0, end - start],
            [end],
            [Request(length)],
            pattern=PATTERN,
            min_prompt_len=0,
            max_tail_rows=256,
        )
        items = cut_work(
            plan.triangle,
            plan.tails,
            tile_rows=tile_rows_for(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, 2, 90),
            n_init=PATTERN.n_init,
            n_local=PATTERN.n_local,
            num_kv_heads=NUM_KV_HEADS,
            target_programs=4 * MULTIPROCESSORS,
        ).items.astype(np.int64)
        first_step = items[:, 4] // config.block_n * config.block_n
        steps += int(np.ceil((items[:, 5] - first_step).clip(0) / config.block_n).sum()) * NUM_KV_HEADS
        # The sinks' short step, 16 keys wide.
        steps += int((items[:, 6] != DENSE).sum()) * NUM_KV_HEADS * 16 / config.block_n
        programs += len(items) * NUM_KV_HEADS
    flop = steps * 4 * config.block_m * config.block_n * HEAD_SIZE
    tile_bytes = 2 * config.block_n * HEAD_SIZE * 2
    # Two warp groups of 64 rows; each reads both operands of the first product, and the values, 16 columns at a time.
    groups = config.block_m // 64
    operands = groups * (HEAD_SIZE // 16 * (64 + config.block_n) * 32 + config.block_n // 16 * HEAD_SIZE * 32)
    cycles = MULTIPROCESSORS * CLOCK
    pairs = length * (length + 1) // 2
    return Prediction(
        length=length,
        tensor=flop / TENSOR_FLOP / cycles,
        shared=steps * (operands + tile_bytes) / SHARED_BYTES / cycles,
        issue=steps * INSTRUCTIONS * config.num_warps / SCHEDULERS / cycles,
        l2=steps * tile_bytes / L2_BYTES_S,
        fixed=programs * FIXED_CYCLES / cycles,
        dense=pairs * 4 * NUM_HEADS * HEAD_SIZE / DENSE_FLOP_S,
        pair_bound=pairs / PATTERN.visible_pairs(length),
    )


def markdown() -> str:
    """The predictions as a Markdown table, in ms."""
    lines = [
        "| prompt | tensor cores | shared memory | instructions | L2 | latencies | ours at best "
        "| dense (FA3, published rate) | ratio at best | pair bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in map(predict, LENGTHS):
        times = (p.tensor, p.shared, p.issue, p.l2, p.fixed, p.ours, p.dense)
        shown = " | ".join(f"{1e3 * time:.2f}" for time in times)
        lines.append(f"| {p.length // 1024}K | {shown} | {p.dense / p.ours:.0f}x | {p.pair_bound:.0f}x |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
