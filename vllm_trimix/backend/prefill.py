"""Ways to compute a step's triangle rows on CUDA, behind one interface.

Planned once a step on the host, uploaded with the rest of the plan, run once a layer. The builder owns one instance for
all layers of its KV-cache group.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Plan

if TYPE_CHECKING:
    from vllm_trimix.kernels.triton_triangle import Variant

# Programs for a step's last rows: four for each multiprocessor balance parts of unequal length.
_PROGRAMS_PER_MULTIPROCESSOR = 4
# Without a CUDA device only Triton's interpreter runs: a number that splits, as a GPU would.
_INTERPRETED_MULTIPROCESSORS = 4


class LayerShape(NamedTuple):
    """Attention heads of a layer, on this device."""

    num_heads: int
    num_kv_heads: int
    head_size: int


class Scales(NamedTuple):
    """Dequantisation scales of a layer's fp8 tensors, one fp32 each on the device; None is 1."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None


class TrianglePrefill(Protocol):
    """One way to compute the triangle rows.

    Attributes:
        max_tail_rows: Dense spans of the last prompt rows up to this long are its work too.
    """

    max_tail_rows: ClassVar[int]

    def __init__(
        self,
        shapes: Collection[LayerShape],
        *,
        triangle: Triangle,
        dtype_size: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        """Prepares for the layers of a group, once.

        Args:
            shapes: Of all layers; they share their KV heads and head size.
            triangle: The pattern.
            dtype_size: Bytes of an element of the model's dtype.
            block_size: Tokens of a page.
            device: Where it runs.
        """

    def arrays(self, plan: Plan) -> list[np.ndarray]:
        """What a step's launches read, within int32; uploaded as they are. Once a step."""

    def bind(self, plan: Plan, arrays: list[torch.Tensor], block_table: torch.Tensor) -> Any:
        """The step, as ``run`` takes it, from its plan, the uploaded arrays and the step's pages. Once a step."""

    def idle(self, block_table: torch.Tensor) -> Any:
        """A step without rows, whose run compiles whatever serving will launch."""

    def run(
        self,
        step: Any,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        scale: float,
        soft_cap: float,
        scales: Scales,
        out: torch.Tensor,
    ) -> None:
        """One layer: writes the plan's triangle rows and tails to ``out`` in place.

        Args:
            step: From ``bind`` or ``idle``.
            q: Queries, [num_tokens, num_heads, head_size].
            k_cache: Keys, [num_blocks, num_kv_heads, block_size, head_size].
            v_cache: Values, like ``k_cache``.
            scale: Softmax scale.
            soft_cap: Logit cap; 0 is off.
            scales: Of fp8 tensors.
            out: Like ``q``.
        """


class TritonStep(NamedTuple):
    """A step of ``TritonPrefill``; see ``work_items.Work``."""

    block_table: torch.Tensor
    items: torch.Tensor
    merges: torch.Tensor | None


class TritonPrefill:
    """Our own kernel: band and last rows in one launch, and one more that merges the last rows' parts."""

    max_tail_rows: ClassVar[int] = 256

    def __init__(
        self,
        shapes: Collection[LayerShape],
        *,
        triangle: Triangle,
        dtype_size: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        """As ``TrianglePrefill``; allocates the workspace of partial results.

        Quantised queries are computed in 16 bits, whose largest tile is no smaller than that of ``dtype_size``.
        """
        from vllm_trimix.kernels.triton_configs import capability_of, tile_rows_for
        from vllm_trimix.kernels.triton_merge import Partials
        from vllm_trimix.kernels.work_items import max_slots

        self._triangle = triangle
        (self._num_kv_heads,) = {shape.num_kv_heads for shape in shapes}
        # Layers of one group may differ in query heads.
        self._tile_rows = min(tile_rows_for(*shape, dtype_size, capability_of(device)) for shape in shapes)
        self._target_programs = _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(device)
        # A few for all layers: their tensors differ in kind only where the model's layers do.
        self._variants: dict[tuple[object, ...], Variant] = {}
        self._partials = {
            shape.num_heads: Partials.allocate(
                max_slots(self._num_kv_heads, self._target_programs),
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_size=shape.head_size,
                tile_rows=self._tile_rows,
                device=device,
            )
            for shape in shapes
        }

    def arrays(self, plan: Plan) -> list[np.ndarray]:
        from vllm_trimix.kernels.work_items import cut_work

        work = cut_work(
            plan.triangle,
            plan.tails,
            tile_rows=self._tile_rows,
            n_init=self._triangle.n_init,
            n_local=self._triangle.n_local,
            num_kv_heads=self._num_kv_heads,
            target_programs=self._target_programs,
        )
        return [work.items, work.merges] if work.num_slots else [work.items]

    def bind(self, plan: Plan, arrays: list[torch.Tensor], block_table: torch.Tensor) -> TritonStep:
        return TritonStep(block_table, arrays[0], arrays[1] if len(arrays) > 1 else None)

    def idle(self, block_table: torch.Tensor) -> TritonStep:
        from vllm_trimix.kernels.work_items import IDLE

        items = torch.tensor([IDLE], dtype=torch.int32, device=block_table.device)
        return TritonStep(block_table, items, torch.zeros(1, 4, dtype=torch.int32, device=block_table.device))

    def run(
        self,
        step: TritonStep,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        scale: float,
        soft_cap: float,
        scales: Scales,
        out: torch.Tensor,
    ) -> None:
        from vllm_trimix.kernels.triton_triangle import triangle_prefill

        kind = (q.shape[1], q.dtype, scales.q is None, out.dtype, k_cache.dtype, k_cache.stride(), soft_cap > 0)
        self._variants[kind] = triangle_prefill(
            q,
            k_cache,
            v_cache,
            step.block_table,
            step.items,
            n_init=self._triangle.n_init,
            n_local=self._triangle.n_local,
            scale=scale,
            out=out,
            tile_rows=self._tile_rows,
            merges=step.merges,
            partials=self._partials[q.shape[1]],
            q_scale=scales.q,
            k_scale=scales.k,
            v_scale=scales.v,
            soft_cap=soft_cap,
            variant=self._variants.get(kind),
        )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
