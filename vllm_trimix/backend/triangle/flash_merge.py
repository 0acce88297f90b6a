"""The triangle by two FlashAttention launches: the window, then the sinks, merged by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from vllm_trimix.backend.pseudo_requests import pseudo_requests
from vllm_trimix.backend.triangle.flash_attention import (
    FlashCall,
    attend,
    flash_attention_version,
    flash_layer,
    launch,
    take,
)
from vllm_trimix.backend.triangle.prefill import LayerGroup, TrianglePrefill
from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.plan import Plan, Span


class FlashMergeStep(NamedTuple):
    """A step of ``FlashMergePrefill``; None where there is nothing to launch.

    Attributes:
        early: Rows whose window reaches the sinks: they see every key up to their own.
        window: The other rows, against their window.
        sinks: The same rows, against the sinks.
    """

    early: FlashCall | None = None
    window: FlashCall | None = None
    sinks: FlashCall | None = None


class FlashMergePrefill(TrianglePrefill):
    """Window and sinks by vLLM's FlashAttention, merged by vLLM's ``merge_attn_states``.

    Each key counts once: the rows whose window overlaps the sinks are dense by the rule and have a launch of their own.
    Allocates nothing itself, but the gathered queries of steps whose spans are scattered.
    """

    def __init__(self, group: LayerGroup) -> None:
        """As ``TrianglePrefill``.

        Raises:
            RuntimeError: vLLM has no FlashAttention here.
        """
        super().__init__(group)
        self._n_init, self._n_local = group.triangle.n_init, group.triangle.n_local
        # The first position whose window starts behind the sinks; without sinks the window alone is right everywhere.
        self._first_late = self._n_init + self._n_local - 1 if self._n_init else 0
        self._version = flash_attention_version(group)

    def arrays(self, plan: Plan) -> list[np.ndarray]:
        arrays = []
        for spans in self._split(plan):
            if spans:
                batch = pseudo_requests(spans)
                arrays += [batch.starts, batch.indices, batch.ends, *([] if batch.rows is None else [batch.rows])]
        return arrays

    def bind(self, plan: Plan, arrays: list[torch.Tensor], block_table: torch.Tensor) -> FlashMergeStep:
        uploaded = iter(arrays)
        early, late = (_causal_call(spans, uploaded, block_table) for spans in self._split(plan))
        if late is None:
            return FlashMergeStep(early)
        window = late._replace(window_size=(self._n_local - 1, 0))
        if not self._n_init:
            return FlashMergeStep(early, window)
        num_sinks = torch.full_like(late.seqused_k, self._n_init)
        return FlashMergeStep(
            early, window, late._replace(seqused_k=num_sinks, max_seqlen_k=self._n_init, causal=False)
        )

    def idle(self, block_table: torch.Tensor) -> FlashMergeStep:
        """No launch: FlashAttention 2 and 3 have nothing to compile."""
        return FlashMergeStep()

    def run(self, step: FlashMergeStep, call: LayerCall) -> None:
        # vLLM's compiled operators are heavy, and missing off CUDA.
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        q, out, layer = call.q, call.out, flash_layer(call, version=self._version)
        if step.early is not None:
            attend(step.early, layer, q, out=out)
        if step.window is None:
            return
        if step.sinks is None:
            attend(step.window, layer, q, out=out)
            return
        rows = step.window.rows
        # FlashAttention allocates the sinks' output, and where rows are scattered the window's: PyTorch's cache holds
        # both from layer to layer. The merge is in place, as in vLLM's own context parallelism.
        if isinstance(rows, slice):
            part = q[rows]
            window, window_lse = launch(step.window, layer, part, out=out[rows])
        else:
            part = take(q, rows)
            window, window_lse = launch(step.window, layer, part)
        sinks, sinks_lse = launch(step.sinks, layer, part)
        merge_attn_states(window, sinks, sinks_lse, window, window_lse)
        if not isinstance(rows, slice):
            out.index_copy_(0, rows, window)

    def _split(self, plan: Plan) -> tuple[list[Span], list[Span]]:
        """The triangle's spans before and from the first position whose window starts behind the sinks."""
        early, late = [], []
        for request, first_row, num_rows, position in plan.triangle:
            dense = min(num_rows, max(0, self._first_late - position))
            if dense:
                early.append(Span(request, first_row, dense, position))
            if dense < num_rows:
                late.append(Span(request, first_row + dense, num_rows - dense, position + dense))
        return early, late


def _causal_call(spans: list[Span], uploaded: Iterator[torch.Tensor], block_table: torch.Tensor) -> FlashCall | None:
    """Each span as a pseudo-request that ends at the span's last row."""
    if not spans:
        return None
    batch = pseudo_requests(spans)
    starts, indices, ends = next(uploaded), next(uploaded), next(uploaded)
    return FlashCall(
        rows=batch.selection(None if batch.rows is None else next(uploaded)),
        cu_seqlens_q=starts,
        max_seqlen_q=batch.longest,
        seqused_k=ends,
        max_seqlen_k=int(batch.ends.max()),
        block_table=block_table.index_select(0, indices),
    )
