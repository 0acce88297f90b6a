"""One layer's attention: the dense backend's own, or its sparse rows by our kernels and the rest by the dense one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl

from vllm_trimix.backend import settings
from vllm_trimix.backend.cpu_layouts import probe_layouts
from vllm_trimix.backend.dynamic import prefill as dynamic
from vllm_trimix.backend.dynamic.cpu_pages import CpuPages
from vllm_trimix.backend.dynamic.cuda_pages import CudaPages
from vllm_trimix.backend.dynamic.layer_patterns import LayerPatterns
from vllm_trimix.backend.dynamic.pages import Pages
from vllm_trimix.backend.split_step import DynamicStep, SplitStep, StepPlan
from vllm_trimix.backend.triangle.prefill import LayerShape
from vllm_trimix.kernels import torch_cpu
from vllm_trimix.kernels.layer_call import LayerCall, Scales

# Attention passes these by position, in this order, to every implementation.
_ARGUMENTS = (
    "num_heads",
    "head_size",
    "scale",
    "num_kv_heads",
    "alibi_slopes",
    "sliding_window",
    "kv_cache_dtype",
    "logits_soft_cap",
    "attn_type",
    "kv_sharing_target_layer_name",
)

_FP8_VIEWS = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# The Triton kernel's limit; its module imports Triton, which not every installation has.
MAX_TRITON_HEAD_SIZE = 256


class TrimixImpl(AttentionImpl[Any]):
    """Mixed in before the dense backend's implementation.

    Attributes:
        trimix_kernel: ``torch_cpu`` on the CPU's dense backend, else ``triton``; set when composed.
        trimix_active: Whether this layer is in the triangle set and eligible; set by the metadata builder.
        trimix_dynamic: The dynamic patterns of its heads, likewise, or None.
        trimix_dense_reason: Why this layer can never be sparse, or None.
    """

    trimix_kernel: ClassVar[str]
    # The plan follows neither context parallelism nor partial softmaxes.
    supports_pcp = False
    supports_dcp = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        self.trimix_active = False
        self.trimix_dynamic: LayerPatterns | None = None
        window = given.get("sliding_window")
        if not settings.is_window(window, get_current_vllm_config().model_config.max_model_len):
            given["sliding_window"] = None
        self.trimix_dense_reason = _dense_reason(given, self.trimix_kernel)
        self._triangle = settings.current().triangle
        self._kv_cache_dtype = str(given.get("kv_cache_dtype", "auto"))
        self._soft_cap = float(given.get("logits_soft_cap") or 0.0)
        # The Triton kernel compiles at its first launch, which must not be a request's.
        self._cold = self.trimix_kernel == "triton"
        # Which layers are dynamic is known after vLLM's profile run only; on CPUs there is no such run.
        may_be_dynamic = self.trimix_dense_reason is None and settings.current().shallow is not None
        self._reserves = may_be_dynamic and self.trimix_kernel == "triton"
        self._cpu_layouts: tuple[torch_cpu.PageLayout, torch_cpu.PageLayout] | None = None

    def trimix_shape(self) -> LayerShape:
        """The layer's heads."""
        return LayerShape(self.num_heads, self.num_kv_heads, self.head_size)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """False: a split layer writes its output in two places."""
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer; see vLLM's ``AttentionImpl.forward`` for shapes."""
        step: StepPlan | DynamicStep | None = None
        if self.trimix_active:
            step = getattr(attn_metadata, "trimix", None)
        elif self.trimix_dynamic is not None:
            step = getattr(attn_metadata, "trimix_dynamic", None)
        if step is None:
            if attn_metadata is None and self._reserves:
                dynamic.reserve(output)
            if self._cold and (self.trimix_active or self.trimix_dynamic is not None):
                self._warm_up(layer, query, kv_cache, attn_metadata, output)
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if step.dense_rows is not None:
            self._forward_dense(layer, query, key, value, kv_cache, step, output)
        if isinstance(step, DynamicStep):
            self._forward_dynamic(layer, query, kv_cache, step, output)
            return output
        kernel = self._forward_cpu if self.trimix_kernel == "torch_cpu" else self._forward_triton
        kernel(layer, query, kv_cache, step, output)
        step.stats.triangle_layer_rows += step.num_rows
        return output

    def _forward_dense(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        step: SplitStep,
        output: torch.Tensor,
    ) -> None:
        """The dense remainder, as a batch of its own: a view when its rows are contiguous, else gathered."""
        rows = step.dense_rows
        part = output[rows]
        super().forward(
            layer,
            query[rows],
            None if key is None else key[rows],
            None if value is None else value[rows],
            kv_cache,
            step.dense_metadata,
            part,
        )
        if not isinstance(rows, slice):
            output[rows] = part

    def _forward_cpu(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, step: StepPlan, output: torch.Tensor
    ) -> None:
        k_pages, v_pages, (k_layout, v_layout) = self._cpu_pages(layer, kv_cache)
        torch_cpu.triangle_prefill(
            query,
            k_pages,
            v_pages,
            step.block_table,
            step.spans,
            k_layout=k_layout,
            v_layout=v_layout,
            block_size=kv_cache.shape[2],
            n_init=self._triangle.n_init,
            n_local=self._triangle.n_local,
            scale=self.scale,
            out=output,
        )

    def _cpu_pages(
        self, layer: Any, kv_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch_cpu.PageLayout, torch_cpu.PageLayout]]:
        """K pages and V pages as stored, [num_blocks, num_kv_heads, block_size * head_size], and their layouts."""
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        if self._cpu_layouts is None:
            self._cpu_layouts = probe_layouts(
                block_size=block_size,
                num_kv_heads=num_kv_heads,
                head_size=self.head_size,
                dtype=kv_cache.dtype,
                isa=layer.isa,
            )
        # The CPU kernels store a head's K page, then its V page.
        pages = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * self.head_size)
        return pages[:, :, 0], pages[:, :, 1], self._cpu_layouts

    def _forward_dynamic(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, step: DynamicStep, output: torch.Tensor
    ) -> None:
        assert self.trimix_dynamic is not None
        pages: Pages
        if self.trimix_kernel == "torch_cpu":
            k_pages, v_pages, layouts = self._cpu_pages(layer, kv_cache)
            pages = CpuPages(k_pages, v_pages, step.block_table, layouts, kv_cache.shape[2], self.scale)
        else:
            pages = self._cuda_pages(layer, query, kv_cache, step.block_table, output)
        dynamic.prefill(self.trimix_dynamic, step.spans, query, pages, output, step.counter)
        step.stats.dynamic_layer_rows += step.num_rows

    def _warm_up(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any, output: torch.Tensor
    ) -> None:
        """Compiles the kernel for this layer's own tensors in vLLM's warm-up, by one idle tile that writes nothing."""
        prefill = getattr(attn_metadata, "trimix_prefill", None)
        if not hasattr(attn_metadata, "trimix_block_table") or kv_cache.numel() == 0 or output.shape != query.shape:
            return
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._cold = False
        if self.trimix_dynamic is not None:
            pages = self._cuda_pages(layer, query, kv_cache, attn_metadata.trimix_block_table, output)
            pages.warm_up(self.trimix_dynamic, query, output)
            return
        assert prefill is not None
        self._run_triton(layer, query, kv_cache, prefill, prefill.idle(attn_metadata.trimix_block_table), output)

    def _forward_triton(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, step: StepPlan, output: torch.Tensor
    ) -> None:
        self._run_triton(layer, query, kv_cache, step.prefill, step.prefill_step, output)

    def _run_triton(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, prefill: Any, step: Any, output: torch.Tensor
    ) -> None:
        prefill.run(step, self._layer_call(layer, query, kv_cache, output))

    def _cuda_pages(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
    ) -> CudaPages:
        """The layer's cache as its dynamic patterns read it."""
        assert self.trimix_dynamic is not None
        call = self._layer_call(layer, query, kv_cache, output)
        return CudaPages(call, block_table, self.num_heads // self.num_kv_heads, self.trimix_dynamic.variants)

    def _layer_call(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> LayerCall:
        """The layer's tensors as our CUDA kernels take them: K and V apart, and the scales of what is fp8."""
        fp8 = _FP8_VIEWS.get(self._kv_cache_dtype)
        scales = Scales()
        if fp8 is not None:
            if kv_cache.dtype != fp8:
                kv_cache = kv_cache.view(fp8)
            scales = Scales(layer._q_scale if query.dtype == fp8 else None, layer._k_scale, layer._v_scale)
        k_cache, v_cache = kv_cache.split(self.head_size, dim=-1)
        return LayerCall(query, k_cache, v_cache, output, self.scale, self._soft_cap, scales)


def _dense_reason(given: dict[str, Any], kernel: str) -> str | None:
    """Why a layer built with these arguments can never be sparse, or None."""
    if given.get("sliding_window") is not None:
        return "sliding_window"
    if given.get("alibi_slopes") is not None:
        return "alibi"
    if given.get("sinks") is not None:
        return "learned_sinks"
    if str(getattr(given.get("attn_type"), "value", given.get("attn_type") or "decoder")) != "decoder":
        return "not_decoder"
    if given.get("kv_sharing_target_layer_name") is not None:
        return "kv_sharing"
    kv_cache_dtype = str(given.get("kv_cache_dtype", "auto"))
    if kernel == "torch_cpu":
        if given.get("logits_soft_cap"):
            return "soft_cap"
        if kv_cache_dtype in _FP8_VIEWS:
            return "fp8_kv_on_cpu"
        return None
    if given["head_size"] % 16 or given["head_size"] > MAX_TRITON_HEAD_SIZE:
        return "head_size"
    if kv_cache_dtype in ("fp8", "fp8_e4m3") and not current_platform.has_device_capability(89):
        return "fp8_e4m3_before_sm89"
    if kv_cache_dtype in _DTYPES and torch.get_default_dtype() != _DTYPES[kv_cache_dtype]:
        return "kv_dtype_is_not_the_models"
    return None
