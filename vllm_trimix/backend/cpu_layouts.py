"""How vLLM's CPU kernels lay tokens out in a page, found by writing known numbers through their own cache op."""

from __future__ import annotations

import functools

import torch

from vllm_trimix.kernels.torch_cpu import PageLayout, layout_from_index


@functools.cache
def probe_layouts(
    *, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, isa: str
) -> tuple[PageLayout, PageLayout]:
    """The layouts of a K page and a V page, for this instruction set.

    Each element's number (token * head_size + dim) is written in base 64, one digit a pass: every digit is exact in
    bf16 and fp16.

    Raises:
        RuntimeError: The op stored something that is no permutation of its input.
    """
    # Only vLLM's CPU build has these operators.
    from vllm import _custom_ops as ops

    count = block_size * head_size
    numbers = torch.arange(count)
    # Scratch cache of two blocks: block 0 is vLLM's null block.
    found = [torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)]
    place, slots = 1, torch.arange(block_size, 2 * block_size)
    while place < count:
        digits = (numbers // place % 64).to(dtype).view(block_size, 1, head_size)
        digits = digits.expand(block_size, num_kv_heads, head_size).contiguous()
        cache = torch.zeros(2, num_kv_heads, 2 * block_size, head_size, dtype=dtype)
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(digits, digits, key_cache, value_cache, slots, isa)
        for stored, page in zip(found, (key_cache, value_cache), strict=True):
            stored += page[1, 0].reshape(-1).to(torch.int64) * place
        place *= 64
    layouts = []
    for name, stored in zip(("K", "V"), found, strict=True):
        if not torch.equal(stored.sort().values, numbers):
            raise RuntimeError(
                f"vLLM's CPU cache op (isa {isa}, {dtype}) stored a {name} page that is no permutation of its input; "
                "TRIMIX can't read it. Choose another --attention-backend and report this"
            )
        layouts.append(layout_from_index(stored.argsort(), block_size=block_size, head_size=head_size))
    return layouts[0], layouts[1]
