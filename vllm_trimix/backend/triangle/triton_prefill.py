"""The triangle by our own Triton kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch

from vllm_trimix.backend.triangle.prefill import LayerGroup, TrianglePrefill
from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.kernels.triton_configs import capability_of, tile_rows_for
from vllm_trimix.kernels.work_items import IDLE, cut_work, max_slots
from vllm_trimix.plan import Plan

if TYPE_CHECKING:
    from vllm_trimix.kernels.triton_launch import LaunchVariant

# Programs for a step's last rows: four for each multiprocessor balance parts of unequal length.
_PROGRAMS_PER_MULTIPROCESSOR = 4
# Without a CUDA device only Triton's interpreter runs: a number that splits, as a GPU would.
_INTERPRETED_MULTIPROCESSORS = 4


class TritonStep(NamedTuple):
    """A step of ``TritonPrefill``; see ``work_items.Work``."""

    block_table: torch.Tensor
    items: torch.Tensor
    merges: torch.Tensor | None


class TritonPrefill(TrianglePrefill):
    """Our own kernel: band and last rows in one launch, and one more that merges the last rows' parts."""

    max_tail_rows: ClassVar[int] = 256

    def __init__(self, group: LayerGroup) -> None:
        """Allocates the workspace of partial results.

        Quantised queries are computed in 16 bits, whose largest tile is no smaller than that of ``dtype_size``.
        """
        # Triton may be missing.
        from vllm_trimix.kernels.triton_merge import Partials

        super().__init__(group)
        self._n_init, self._n_local = group.triangle.n_init, group.triangle.n_local
        capability = capability_of(group.device)
        (self._num_kv_heads,) = {shape.num_kv_heads for shape in group.shapes}
        # Layers of one group may differ in query heads.
        self._tile_rows = min(tile_rows_for(*shape, group.dtype_size, capability) for shape in group.shapes)
        self._target_programs = _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(group.device)
        # A few for all layers: their tensors differ in kind only where the model's layers do.
        self._variants: dict[tuple[object, ...], LaunchVariant] = {}
        self._partials = {
            shape.num_heads: Partials.allocate(
                max_slots(self._num_kv_heads, self._target_programs),
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_size=shape.head_size,
                tile_rows=self._tile_rows,
                device=group.device,
            )
            for shape in group.shapes
        }

    def arrays(self, plan: Plan) -> list[np.ndarray]:
        work = cut_work(
            plan.triangle,
            plan.tails,
            tile_rows=self._tile_rows,
            n_init=self._n_init,
            n_local=self._n_local,
            num_kv_heads=self._num_kv_heads,
            target_programs=self._target_programs,
        )
        return [work.items, work.merges] if work.num_slots else [work.items]

    def bind(self, plan: Plan, arrays: list[torch.Tensor], block_table: torch.Tensor) -> TritonStep:
        return TritonStep(block_table, arrays[0], arrays[1] if len(arrays) > 1 else None)

    def idle(self, block_table: torch.Tensor) -> TritonStep:
        items = torch.tensor([IDLE], dtype=torch.int32, device=block_table.device)
        return TritonStep(block_table, items, torch.zeros(1, 4, dtype=torch.int32, device=block_table.device))

    def run(self, step: TritonStep, call: LayerCall) -> None:
        # Triton may be missing.
        from vllm_trimix.kernels.triton_triangle import triangle_prefill

        q, k_cache, _, out, _, soft_cap, scales = call
        kind = (q.shape[1], q.dtype, scales.q is None, out.dtype, k_cache.dtype, k_cache.stride(), soft_cap > 0)
        self._variants[kind] = triangle_prefill(
            call,
            step.block_table,
            step.items,
            n_init=self._n_init,
            n_local=self._n_local,
            tile_rows=self._tile_rows,
            merges=step.merges,
            partials=self._partials[q.shape[1]],
            variant=self._variants.get(kind),
        )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
