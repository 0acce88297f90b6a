"""What ``vllm-trimix doctor`` asks of the vLLM side."""

from __future__ import annotations

import pickle

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_trimix.backend.cpu_layouts import probe_layouts
from vllm_trimix.backend.names import NAME
from vllm_trimix.backend.registration import register_trimix
from vllm_trimix.backend.triangle.prefill import LayerGroup, LayerShape
from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill
from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.kernels.reference import gather_pages, masked_attention
from vllm_trimix.kernels.torch_cpu import triangle_prefill
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Plan, Span


def registered_on() -> str:
    """Registers, and names the platform."""
    register_trimix()
    return f"{type(current_platform).__name__} ({AttentionBackendEnum[NAME].get_path()})"


def pickled_member() -> bytes:
    """The backend's enum member as it travels to workers."""
    register_trimix()
    return pickle.dumps(AttentionBackendEnum[NAME])


def kernel_error() -> tuple[str, float, float]:
    """Runs this device's triangle kernel on random pages.

    Returns:
        The kernel's name, its largest error against fp64, and that of plain PyTorch in the same precision.
    """
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_size, block_size, position, rows = 8, 2, 64, 32, 700, 150
    device = torch.device("cuda" if current_platform.is_cuda() else "cpu")
    pattern = Triangle(last_n=0)
    end = position + rows
    num_blocks = -(-end // block_size) + 1
    dtype = torch.bfloat16
    kv_cache = torch.randn(num_blocks, num_kv_heads, block_size, 2 * head_size, device=device).to(dtype)
    q = torch.randn(rows, num_heads, head_size, device=device).to(dtype)
    out = torch.full_like(q, torch.nan)
    block_table = torch.arange(1, num_blocks, dtype=torch.int32, device=device)[None]
    spans = [Span(0, 0, rows, position)]
    scale = head_size**-0.5
    k, v = kv_cache.split(head_size, dim=-1)
    if device.type == "cpu":
        name = "torch_cpu"
        _run_cpu(q, k, v, block_table, spans, pattern, scale, out)
    else:
        name = "triton"
        _run_triton(q, k, v, block_table, spans, pattern, scale, out)
    mask = pattern.mask(torch.arange(position, end), torch.arange(end), end)
    keys, values = (gather_pages(x.cpu(), block_table[0].cpu(), end) for x in (k, v))
    truth = masked_attention(q.cpu().double(), keys.double(), values.double(), mask, scale=scale)
    plain = masked_attention(q.cpu(), keys, values, mask, scale=scale)
    return name, float((out.cpu() - truth).abs().max()), float((plain - truth).abs().max())


def _run_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    spans: list[Span],
    pattern: Triangle,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Through vLLM's own cache op, so that the page layout is checked too."""
    # Only vLLM's CPU build has these operators.
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    if torch.cpu._is_amx_tile_supported():
        # vLLM's AMX ops need tile permission, which only its workers ask for.
        torch.cpu._init_amx()
    num_blocks, num_kv_heads, block_size, head_size = k.shape
    isa = _get_attn_isa(q.dtype, block_size, head_size)
    stored = torch.zeros(num_blocks, num_kv_heads, 2 * block_size, head_size, dtype=q.dtype)
    key_cache, value_cache = stored.chunk(2, dim=2)
    tokens = [x.transpose(1, 2).reshape(-1, num_kv_heads, head_size).contiguous() for x in (k, v)]
    ops.cpu_attn_reshape_and_cache(*tokens, key_cache, value_cache, torch.arange(num_blocks * block_size), isa)
    layouts = probe_layouts(
        block_size=block_size, num_kv_heads=num_kv_heads, head_size=head_size, dtype=q.dtype, isa=isa
    )
    pages = stored.view(num_blocks, num_kv_heads, 2, -1)
    triangle_prefill(
        q,
        pages[:, :, 0],
        pages[:, :, 1],
        block_table,
        spans,
        k_layout=layouts[0],
        v_layout=layouts[1],
        block_size=block_size,
        n_init=pattern.n_init,
        n_local=pattern.n_local,
        scale=scale,
        out=out,
    )


def _run_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    spans: list[Span],
    pattern: Triangle,
    scale: float,
    out: torch.Tensor,
) -> None:
    shape = LayerShape(q.shape[1], k.shape[1], q.shape[2])
    prefill = TritonPrefill(LayerGroup(frozenset({shape}), pattern, q.element_size(), k.shape[2], q.device))
    plan = Plan(triangle=spans)
    arrays = [torch.from_numpy(array).to(q.device) for array in prefill.arrays(plan)]
    prefill.run(prefill.bind(plan, arrays, block_table), LayerCall(q, k, v, out, scale))
