"""The device's ceilings, measured in the run they are used in: matrix products and memory copies of random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.kernels.problem import FP8, Settings
from benchmarks.kernels.timing import time_call

COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass
class Ceilings:
    """Best rates found; more samples can only raise them.

    Attributes:
        device: The device.
        dtype: Dtype of the product.
        samples: Seconds of each product (``matmul``, with an fp8 cache also ``matmul_fp8``) and each copy (``copy``).
    """

    device: torch.device
    dtype: torch.dtype
    samples: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, settings: Settings, *, repeats: int = 5) -> None:
        """Adds samples; called before and after the contenders, so that one disturbance lowers no ceiling."""
        size = MATMUL_SIZE[self.device.type]
        a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        product = torch.empty_like(a)
        self._add("matmul", lambda: torch.mm(a, b, out=product), repeats)
        if settings.fp8:
            a_fp8, b_fp8 = a.to(FP8), b.to(FP8).T
            one = torch.ones((), device=self.device)
            self._add(
                "matmul_fp8",
                lambda: torch._scaled_mm(a_fp8, b_fp8, scale_a=one, scale_b=one, out_dtype=self.dtype),
                repeats,
            )
        source = torch.randn(COPY_BYTES[self.device.type] // 4, device=self.device)
        target = torch.empty_like(source)
        self._add("copy", lambda: target.copy_(source), repeats)

    def _add(self, name: str, call: Callable[[], object], repeats: int) -> None:
        call()
        self.samples.setdefault(name, []).extend(time_call(call, self.device) for _ in range(repeats))

    def flops_per_s(self, *, fp8: bool = False) -> float:
        """Of the best product."""
        return 2 * MATMUL_SIZE[self.device.type] ** 3 / min(self.samples["matmul_fp8" if fp8 else "matmul"])

    def bytes_per_s(self) -> float:
        """Of the best copy, bytes read and bytes written."""
        return 2 * COPY_BYTES[self.device.type] / min(self.samples["copy"])

    def as_json(self) -> dict[str, object]:
        """Rates, what they were measured with, and the samples."""
        rates: dict[str, object] = {
            "flops_per_s": self.flops_per_s(),
            "bytes_per_s": self.bytes_per_s(),
            "matmul_size": MATMUL_SIZE[self.device.type],
            "matmul_dtype": str(self.dtype).removeprefix("torch."),
            "copy_bytes": COPY_BYTES[self.device.type],
            "samples": self.samples,
        }
        if "matmul_fp8" in self.samples:
            rates["fp8_flops_per_s"] = self.flops_per_s(fp8=True)
        return rates
