"""What the sparse layers need for one step: which rows are theirs, and the dense remainder as a batch of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_trimix.backend.dynamic.key_counter import KeyCounter
from vllm_trimix.backend.pseudo_requests import PseudoRequests
from vllm_trimix.backend.triangle.prefill import TrianglePrefill
from vllm_trimix.plan import DynamicSpan, Span
from vllm_trimix.stats import Stats


@dataclasses.dataclass(kw_only=True)
class SplitStep:
    """A step whose rows are split between a kernel of ours and the dense backend, shared by all layers of a kind.

    Attributes:
        num_rows: Rows of ours.
        block_table: Page ids, [num_requests, max_blocks], int32, on the device.
        dense_rows: Rows left to the dense backend: a slice when they are contiguous, else int64 indices; None if none.
        dense_metadata: The dense backend's metadata for those rows.
        stats: Counters of this engine.
    """

    num_rows: int
    block_table: torch.Tensor
    dense_rows: slice | torch.Tensor | None
    dense_metadata: Any
    stats: Stats


@dataclasses.dataclass(kw_only=True)
class StepPlan(SplitStep):
    """What a triangle layer needs for one step.

    Attributes:
        spans: Triangle rows.
        prefill: What computes the triangle rows on CUDA; None on CPUs.
        prefill_step: The step, as ``prefill.run`` takes it.
    """

    spans: list[Span]
    prefill: TrianglePrefill | None
    prefill_step: Any


@dataclasses.dataclass(kw_only=True)
class DynamicStep(SplitStep):
    """What a layer with dynamic patterns needs for one step.

    Attributes:
        spans: Rows of the patterns.
        counter: Keys read, of this group's layers.
    """

    spans: list[DynamicSpan]
    counter: KeyCounter


def dense_remainder(
    dense: PseudoRequests,
    uploaded: list[torch.Tensor],
    common: CommonAttentionMetadata,
    builder: AttentionMetadataBuilder[Any],
) -> tuple[slice | torch.Tensor, Any]:
    """A batch of pseudo-requests for the dense backend: each dense span, with its request's own pages and keys.

    Every dense span ends where its request's scheduled rows end, so that the request's key count is its own.

    Args:
        dense: The spans.
        uploaded: ``dense.arrays()`` on the device.
        common: The step's metadata.
        builder: The dense backend's, used for nothing else.

    Returns:
        The rows, as ``SplitStep`` has them, and their metadata.
    """
    query_start_loc, index, *rows = uploaded
    # PyTorch indexes by int64: converted once here instead of at every use.
    index = index.long()
    selection = dense.selection(rows[0] if rows else None)
    requests_cpu = torch.from_numpy(dense.indices)
    bound = common.seq_lens_cpu_upper_bound
    assert bound is not None
    bound = bound[requests_cpu]
    remainder = common.replace(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=torch.from_numpy(dense.starts),
        seq_lens=common.seq_lens[index],
        seq_lens_cpu_upper_bound=bound,
        num_reqs=len(dense.indices),
        num_actual_tokens=dense.num_rows,
        max_query_len=dense.longest,
        max_seq_len=int(bound.max()),
        block_table_tensor=common.block_table_tensor[index],
        slot_mapping=common.slot_mapping[selection],
        positions=None if common.positions is None else common.positions[selection],
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[requests_cpu],
        req_idx=None if common.req_idx is None else common.req_idx[dense.indices],
        mm_req_doc_ranges=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    return selection, builder.build(0, remainder)


def has_image_rows(common: CommonAttentionMetadata) -> bool:
    """Whether a scheduled row may lie in a bidirectional image span: the dense remainder carries no spans."""
    ranges, lens = common.mm_req_doc_ranges, common.seq_lens_cpu_upper_bound
    if not ranges or lens is None:
        return bool(ranges)
    starts = common.query_start_loc_cpu
    return any(
        end >= int(lens[request]) - int(starts[request + 1] - starts[request])
        for request, spans in ranges.items()
        for _, end in spans
    )
