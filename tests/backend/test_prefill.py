"""What the warm-up launches: everything that serving will, so that no request waits for a compiler."""

from __future__ import annotations

import torch

from tests.kernels.interpreter import interpreter_pool


def run_idle() -> tuple[bool, bool, int]:
    """One idle step: whether the output stayed as it was, whether it merges, and how many variants it found."""
    from vllm_trimix.backend.triangle.prefill import LayerGroup, LayerShape
    from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill
    from vllm_trimix.kernels.layer_call import LayerCall
    from vllm_trimix.patterns.triangle import Triangle

    prefill = TritonPrefill(LayerGroup(frozenset({LayerShape(8, 2, 64)}), Triangle(), 2, 16, torch.device("cpu")))
    kv_cache = torch.zeros(2, 2, 16, 128, dtype=torch.float16)
    k_cache, v_cache = kv_cache.split(64, dim=-1)
    q, out = (torch.full((3, 8, 64), float("nan"), dtype=torch.float16) for _ in range(2))
    step = prefill.idle(torch.zeros(1, 1, dtype=torch.int32))
    for _ in range(2):
        prefill.run(step, LayerCall(q, k_cache, v_cache, out, 0.125))
    return bool(out.isnan().all()), step.merges is not None, len(prefill._variants)


def test_an_idle_step_launches_both_kernels_and_writes_nothing() -> None:
    """Two layers of one kind share what was checked for the first."""
    with interpreter_pool() as pool:
        assert pool.submit(run_idle).result() == (True, True, 1)
