"""The one tolerance rule of kernel tests: an error budget from a plain low-precision run, never a bare number."""

from __future__ import annotations

import torch


def assert_within_budget(got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, *, what: str = "kernel") -> None:
    """Asserts that a kernel errs at most twice as much as plain PyTorch in the same precision, plus output rounding.

    Args:
        got: The kernel's output, low precision.
        truth: fp64 output from the same low-precision inputs.
        plain: Plain PyTorch's output in the kernel's precision.
        what: Name for the message.
    """
    assert torch.isfinite(got).all(), f"{what}: {(~torch.isfinite(got)).sum()} values are not finite"
    error = (got.double() - truth).abs().max().item()
    plain_error = (plain.double() - truth).abs().max().item()
    rounding = torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= 2 * plain_error + rounding, (
        f"{what}: error {error:.3g} exceeds 2 x plain error {plain_error:.3g} + rounding {rounding:.3g}"
    )


def is_within_budget(got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether ``assert_within_budget`` holds."""
    try:
        assert_within_budget(got, truth, plain)
    except AssertionError:
        return False
    return True
