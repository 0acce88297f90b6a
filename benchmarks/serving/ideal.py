"""The floor of the time to first token: TRIMIX with its triangle layers' prefill attention left out.

    vllm serve ... --worker-extension-cls benchmarks.serving.ideal.LeaveOutTriangle

Everything else is done: planning, cache writes, dense layers, decode. Served with ``last_n`` 0, every prompt row of a
triangle layer is a triangle row, so that the dense last rows are left out as well. The answers are wrong on purpose.
The class lives beside the benchmarks and not in the package: no setting of the product leads here.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from benchmarks.serving.configurations import IDEAL_PROOF
from vllm_trimix.backend import attention
from vllm_trimix.backend.impl import TrimixImpl

logger = init_logger("vllm.benchmarks.ideal")


class IdealImpl(TrimixImpl):
    """Zeros in place of the triangle rows: the next layer's arithmetic must not depend on what memory held."""

    calls = 0

    def _forward_cpu(self, layer: Any, query: Any, kv_cache: Any, step: Any, output: Any) -> None:
        IdealImpl.calls += 1
        for span in step.spans:
            output[span.first_row : span.first_row + span.num_rows].zero_()

    _forward_triton = _forward_cpu


class LeaveOutTriangle:
    """Worker extension: layers built from here on are ``IdealImpl``."""

    def left_out_calls(self) -> int:
        """Calls of the triangle kernel that were left out in this worker."""
        return IdealImpl.calls


attention.TrimixImpl = IdealImpl  # type: ignore[misc]
attention._compose.cache_clear()
logger.info(IDEAL_PROOF)
