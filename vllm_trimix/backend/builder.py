"""Builds a step's metadata: the dense backend's own, and the plans with everything the sparse layers need."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_trimix.backend import announce, requests, settings
from vllm_trimix.backend.dynamic import KeyCounter, LayerPatterns
from vllm_trimix.backend.pseudo_requests import PseudoRequests, pseudo_requests
from vllm_trimix.backend.triangle.prefill import LayerGroup, TrianglePrefill
from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill
from vllm_trimix.backend.upload import upload
from vllm_trimix.plan import DECODE, DynamicPlan, DynamicSpan, Plan, Span, build_dynamic_plan, build_plan

logger = init_logger("vllm.vllm_trimix")


@dataclasses.dataclass
class StepPlan:
    """What a triangle layer needs for one step, shared by all of them.

    Attributes:
        spans: Triangle rows.
        num_rows: How many they are.
        block_table: Page ids, [num_requests, max_blocks], int32, on the device.
        prefill: What computes the triangle rows on CUDA; None on CPUs.
        prefill_step: The step, as ``prefill.run`` takes it.
        dense_rows: Rows left to the dense backend: a slice when they are contiguous, else int64 indices; None if none.
        dense_metadata: The dense backend's metadata for those rows.
        stats: Counters of this engine.
    """

    spans: list[Span]
    num_rows: int
    block_table: torch.Tensor
    prefill: TrianglePrefill | None
    prefill_step: Any
    dense_rows: slice | torch.Tensor | None
    dense_metadata: Any
    stats: Any


@dataclasses.dataclass
class DynamicStep:
    """What a layer with dynamic patterns needs for one step, shared by all of them.

    Attributes:
        spans: Rows of the patterns.
        num_rows: How many they are.
        block_table: Page ids, [num_requests, max_blocks], int32, on the device.
        dense_rows: As ``StepPlan``.
        dense_metadata: As ``StepPlan``.
        stats: Counters of this engine.
        counter: Keys read, of this group's layers.
    """

    spans: list[DynamicSpan]
    num_rows: int
    block_table: torch.Tensor
    dense_rows: slice | torch.Tensor | None
    dense_metadata: Any
    stats: Any
    counter: KeyCounter


class TrimixBuilder(AttentionMetadataBuilder[Any]):
    """Mixed in before the dense backend's builder."""

    dense_builder_cls: ClassVar[type[AttentionMetadataBuilder[Any]]]
    dense_name: ClassVar[str]
    trimix_kernel: ClassVar[str]
    # A metadata object built for one KV-cache group must not be reused for another: it carries that group's plan.
    supports_update_block_table = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **kwargs: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
        requests.install()
        # vLLM wraps builders whose metadata it rewrites (chunked attention, static sinks): rows are not requests there.
        self._wrapped = "trimix_kernel" not in vars(type(self))
        self.resolved = settings.of(vllm_config)
        self._impls = self._bind_layers(layer_names)
        self._active = [impl for impl in self._impls if impl.trimix_active]
        dynamic = [impl for impl in self._impls if impl.trimix_dynamic is not None]
        # Builders keep persistent buffers: the dense remainder of a split step needs an instance of its own.
        self._dense_builder, self._dynamic_dense_builder = (
            self.dense_builder_cls(kv_cache_spec, layer_names, vllm_config, device, **kwargs) if impls else None
            for impls in (self._active, dynamic)
        )
        self._counter = KeyCounter(device) if dynamic else None
        parallel = vllm_config.parallel_config
        self._ubatching = bool(getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False))
        speculative = vllm_config.speculative_config
        self._decode_query_len = 1 + (getattr(speculative, "num_speculative_tokens", None) or 0)
        self._prefill = self._make_prefill(device)
        self._max_tail_rows = 0 if self._prefill is None else self._prefill.max_tail_rows

    def _make_prefill(self, device: torch.device) -> TrianglePrefill | None:
        if self.trimix_kernel == "torch_cpu" or not self._active:
            return None
        group = LayerGroup(
            frozenset(impl.trimix_shape() for impl in self._active),
            triangle=self.resolved.triangle,
            dtype_size=self.vllm_config.model_config.dtype.itemsize,
            block_size=self.kv_cache_spec.block_size,
            device=device,
        )
        return TritonPrefill(group)

    def _bind_layers(self, layer_names: list[str]) -> list[Any]:
        """Tells each layer's implementation its global index; returns those that are ours."""
        context = self.vllm_config.compilation_config.static_forward_context
        impls, stock = [], {}
        sparse = self._sparse_layers()
        for name in layer_names:
            impl: Any = getattr(context[name], "impl", None)
            if not hasattr(impl, "trimix_active"):
                continue
            layer = extract_layer_index(name)
            if layer in sparse:
                wrapped = "wrapped_backend" if self._wrapped else None
                reason = wrapped or impl.trimix_dense_reason or _scales_reason(context[name])
                if reason is not None:
                    stock[layer] = reason
                elif layer in self.resolved.layers:
                    impl.trimix_active = True
                else:
                    impl.trimix_dynamic = self._layer_patterns(impl, layer)
            impls.append(impl)
        if impls:
            # Such layers are in KV-cache groups of their own, and other pipeline stages are other processes.
            known = settings.ineligible_layers(self.vllm_config.model_config)
            stock |= {layer: reason for layer, reason in known.items() if layer in sparse}
            announce.start_line(
                self.vllm_config, self.resolved, dense=self.dense_name, kernel=self.trimix_kernel, stock=stock
            )
        return impls

    def _sparse_layers(self) -> set[int]:
        shallow = self.resolved.shallow
        return {*self.resolved.layers, *(shallow.layers if shallow is not None else ())}

    def _layer_patterns(self, impl: Any, layer: int) -> LayerPatterns:
        assert self.resolved.shallow is not None
        parallel = self.vllm_config.parallel_config
        rank = get_tensor_model_parallel_rank() if parallel.tensor_parallel_size > 1 else 0
        first = rank * impl.num_heads
        return LayerPatterns(
            self.resolved.shallow.heads_of(layer, first, impl.num_heads),
            num_kv_heads=impl.num_kv_heads,
            device=self.device,
        )

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """A graph may hold decodes only: a captured prefill would freeze one step's plan.

        With speculation a decode is 1 + drafts wide; less than uniform batches would cost vLLM its decode graphs.
        """
        dense = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        widest = (
            AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            if vllm_config.speculative_config is None
            else AttentionCGSupport.UNIFORM_BATCH
        )
        return min(dense, widest, key=lambda support: support.value)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: Any, kv_cache_spec: Any) -> int | None:
        """None: a graph of variable query lengths could hold prompt rows."""
        return None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.trimix = metadata.trimix_dynamic = None
        # For the kernel's warm-up, which runs on steps without a plan.
        metadata.trimix_prefill = self._prefill
        metadata.trimix_block_table = common_attn_metadata.block_table_tensor
        step = requests.current()
        if step is not None and not self._wrapped:
            plan, dynamic = self._plans(step, common_attn_metadata)
            if not step.planned:
                self._count(step, plan, dynamic)
            if (plan.triangle or plan.tails) and self._active:
                metadata.trimix = self._step_plan(plan, step, common_attn_metadata)
            if dynamic is not None and dynamic.spans and self._counter is not None:
                same = metadata.trimix if metadata.trimix is not None and dynamic.dense == plan.dense else None
                metadata.trimix_dynamic = self._dynamic_step(dynamic, same, step, common_attn_metadata)
        return metadata

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> Any:
        with requests.outside_step():
            return super().build_for_drafting(common_attn_metadata, draft_index)

    def _plans(self, step: requests.Step, common: CommonAttentionMetadata) -> tuple[Plan, DynamicPlan | None]:
        """The step's plans, made once for all KV-cache groups; requests are not looked at one by one if all decode."""
        reason = self._step_reason(common)
        key = (reason, self._max_tail_rows, common.num_reqs, common.num_actual_tokens)
        if key not in step.plans:
            step.plans[key] = self._decode_plans(common) or self._make_plans(self._rows(step, common, reason))
        return step.plans[key]

    def _decode_plans(self, common: CommonAttentionMetadata) -> tuple[Plan, DynamicPlan | None] | None:
        """The plans of a step none of whose requests is in its prompt, by vLLM's own word; None if one may be."""
        prefilling = common.is_prefilling
        if self._ubatching or prefilling is None or prefilling.device.type != "cpu" or bool(prefilling.any()):
            return None
        num_rows = int(common.query_start_loc_cpu[common.num_reqs])
        rows = {DECODE: num_rows} if num_rows else {}
        return Plan(rows=rows), None if self.resolved.shallow is None else DynamicPlan(rows=rows)

    def _make_plans(self, rows: dict[str, Any]) -> tuple[Plan, DynamicPlan | None]:
        return self._plan(rows), self._dynamic_plan(rows)

    def _rows(self, step: requests.Step, common: CommonAttentionMetadata, reason: str | None) -> dict[str, Any]:
        """What both plans are made of."""
        if self._ubatching:
            return {**step.scheduled_rows(), "step_reason": reason}
        rows = step.rows(common)
        lens = common.seq_lens_cpu_upper_bound
        if lens is None:
            rows = [None] * len(rows)
        return {
            "query_start_loc": common.query_start_loc_cpu[: len(rows) + 1].tolist(),
            # The bound is exact for every row that is still in its prompt.
            "seq_lens": [0] * len(rows) if lens is None else lens[: len(rows)].tolist(),
            "requests": rows,
            "step_reason": reason,
        }

    def _plan(self, rows: dict[str, Any]) -> Plan:
        if not self.resolved.layers:
            rows = {**rows, "step_reason": rows["step_reason"] or "empty_set"}
        return build_plan(
            **rows,
            pattern=self.resolved.triangle,
            min_prompt_len=self.resolved.min_prompt_len,
            max_tail_rows=self._max_tail_rows,
        )

    def _dynamic_plan(self, rows: dict[str, Any]) -> DynamicPlan | None:
        shallow = self.resolved.shallow
        if shallow is None:
            return None
        return build_dynamic_plan(
            **rows, last_n=shallow.last_n, min_seq_len=shallow.min_seq_len, min_rows=shallow.largest_block
        )

    def _step_reason(self, common: CommonAttentionMetadata) -> str | None:
        if common.causal is not True:
            return "not_causal"
        if _image_rows(common):
            return "mm_prefix"
        if self._ubatching:
            return "ubatch"
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if (
            common.max_query_len <= self._decode_query_len
            and self.trimix_kernel != "torch_cpu"
            and mode is not None
            and mode.has_full_cudagraphs()
        ):
            return "graph_replay"
        return None

    def _count(self, step: requests.Step, plan: Plan, dynamic: DynamicPlan | None) -> None:
        step.planned = True
        counted = plan.rows if self.resolved.layers or dynamic is None else dynamic.rows
        fresh = step.stats.add({**counted, "cached": step.cached_rows} if step.cached_rows else counted)
        if dynamic is not None:
            fresh += step.stats.add_dynamic(dynamic.rows)
        for reason in fresh:
            announce.fallback(reason)

    def _dynamic_step(
        self, plan: DynamicPlan, same: StepPlan | None, step: requests.Step, common: CommonAttentionMetadata
    ) -> DynamicStep:
        """Binds a dynamic plan; ``same`` is the triangle's step where its dense remainder serves both."""
        assert self._counter is not None
        dense_rows, dense_metadata = None, None
        if same is not None:
            dense_rows, dense_metadata = same.dense_rows, same.dense_metadata
        elif plan.dense:
            dense = pseudo_requests(plan.dense)
            uploaded = upload(dense.arrays(), self.device)
            dense_rows, dense_metadata = self._dense_remainder(dense, uploaded, common, self._dynamic_dense_builder)
        counter = KeyCounter(self.device) if step.warming_up else self._counter
        step.stats.watch_keys(counter)
        return DynamicStep(
            spans=plan.spans,
            num_rows=plan.rows["dynamic"],
            block_table=common.block_table_tensor,
            dense_rows=dense_rows,
            dense_metadata=dense_metadata,
            stats=step.stats,
            counter=counter,
        )

    def _step_plan(self, plan: Plan, step: requests.Step, common: CommonAttentionMetadata) -> StepPlan:
        dense = pseudo_requests(plan.dense) if plan.dense else None
        arrays = [] if self._prefill is None else self._prefill.arrays(plan)
        num_arrays = len(arrays)
        if dense is not None:
            arrays += dense.arrays()
        uploaded = upload(arrays, self.device)
        prefill_step, dense_rows, dense_metadata = None, None, None
        if self._prefill is not None:
            prefill_step = self._prefill.bind(plan, uploaded[:num_arrays], common.block_table_tensor)
        if dense is not None:
            dense_rows, dense_metadata = self._dense_remainder(
                dense, uploaded[num_arrays:], common, self._dense_builder
            )
        return StepPlan(
            spans=plan.triangle,
            num_rows=plan.rows.get("triangle", 0),
            block_table=common.block_table_tensor,
            prefill=self._prefill,
            prefill_step=prefill_step,
            dense_rows=dense_rows,
            dense_metadata=dense_metadata,
            stats=step.stats,
        )

    def _dense_remainder(
        self,
        dense: PseudoRequests,
        uploaded: list[torch.Tensor],
        common: CommonAttentionMetadata,
        builder: AttentionMetadataBuilder[Any] | None,
    ) -> tuple[slice | torch.Tensor, Any]:
        """Metadata of a batch of pseudo-requests: each dense span, with its request's own pages and keys.

        Every dense span ends where its request's scheduled rows end, so that the request's key count is its own.
        """
        assert builder is not None
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


class SharedWorkspace(TrimixBuilder):
    """For dense builders that own a workspace (FlashInfer): all instances use the runner's one buffer.

    They issue their work on one stream, so the buffer is written serially.
    """

    def _get_workspace_buffer(self) -> Any:
        workspace = super()._get_workspace_buffer()
        self._share(workspace)
        return workspace

    def set_workspace_buffer(self, workspace_buffer: Any) -> None:
        super().set_workspace_buffer(workspace_buffer)
        self._share(workspace_buffer)

    def _share(self, workspace: Any) -> None:
        for builder in (self._dense_builder, self._dynamic_dense_builder):
            if builder is not None:
                builder.set_workspace_buffer(workspace)


def _image_rows(common: CommonAttentionMetadata) -> bool:
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


def _scales_reason(layer: Any) -> str | None:
    """Why this layer's loaded fp8 scales keep it stock, or None."""
    scales = (getattr(layer, name, None) for name in ("_q_scale", "_k_scale", "_v_scale"))
    return "per_head_kv_scales" if any(scale is not None and scale.numel() != 1 for scale in scales) else None
