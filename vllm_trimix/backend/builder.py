"""Builds a step's metadata: the dense backend's own, and the plans with everything the sparse layers need."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_trimix.backend import announce, requests, settings, survey
from vllm_trimix.backend.dynamic.key_counter import KeyCounter
from vllm_trimix.backend.layer_binding import bind_layers
from vllm_trimix.backend.pseudo_requests import pseudo_requests
from vllm_trimix.backend.split_step import DynamicStep, StepPlan, dense_remainder, has_image_rows
from vllm_trimix.backend.triangle.prefill import LayerGroup, TrianglePrefill
from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill
from vllm_trimix.backend.upload import upload
from vllm_trimix.plan import DECODE, DynamicPlan, Plan, build_dynamic_plan, build_plan


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
        self._wrapped = survey.is_wrapped(type(self))
        self.resolved = settings.of(vllm_config)
        impls, found = bind_layers(
            layer_names,
            vllm_config,
            self.resolved,
            dense=self.dense_name,
            kernel=self.trimix_kernel,
            device=device,
        )
        shallow = () if self.resolved.shallow is None else self.resolved.shallow.layers
        self._runs_triangle, self._runs_dynamic = (found.runs_any(layers) for layers in (self.resolved.layers, shallow))
        self._active = [impl for impl in impls if impl.trimix_active]
        dynamic = [impl for impl in impls if impl.trimix_dynamic is not None]
        # Builders keep persistent buffers: the dense remainder of a split step needs an instance of its own.
        self._dense_builder, self._dynamic_dense_builder = (
            self.dense_builder_cls(kv_cache_spec, layer_names, vllm_config, device, **kwargs) if ours else None
            for ours in (self._active, dynamic)
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
        elif not self._runs_triangle:
            rows = {**rows, "step_reason": rows["step_reason"] or "stock_layers"}
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
        if not self._runs_dynamic:
            rows = {**rows, "step_reason": rows["step_reason"] or "stock_layers"}
        return build_dynamic_plan(
            **rows, last_n=shallow.last_n, min_seq_len=shallow.min_seq_len, min_rows=shallow.largest_block
        )

    def _step_reason(self, common: CommonAttentionMetadata) -> str | None:
        if common.causal is not True:
            return "not_causal"
        if has_image_rows(common):
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
            assert self._dynamic_dense_builder is not None
            dense_rows, dense_metadata = dense_remainder(dense, uploaded, common, self._dynamic_dense_builder)
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
            assert self._dense_builder is not None
            dense_rows, dense_metadata = dense_remainder(dense, uploaded[num_arrays:], common, self._dense_builder)
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
