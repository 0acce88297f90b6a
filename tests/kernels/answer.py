"""What a launch of a kernel gave, beside what it must give: what a test asserts, and what a failure is judged by."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tests.budget import assert_within_budget


@dataclass(frozen=True)
class Part:
    """A part of the output that has an error budget of its own.

    Attributes:
        what: Names it.
        got: The kernel's output, [rows, heads, dims].
        truth: fp64, from the same inputs.
        plain: Plain PyTorch in the kernel's precision.
        position: Of the first row, in its prompt.
        kinds: Name, first row and row behind the last of what follows one rule.
    """

    what: str
    got: torch.Tensor
    truth: torch.Tensor
    plain: torch.Tensor
    position: int
    kinds: tuple[tuple[str, int, int], ...]


@dataclass
class Answer:
    """All parts of a launch, and what is wrong beside them.

    Attributes:
        parts: In the order of the output.
        faults: A sentence each; none where all else is right.
    """

    parts: list[Part]
    faults: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Asserts that every part is within its budget, and that there is no fault."""
        for part in self.parts:
            assert_within_budget(part.got, part.truth, part.plain, what=part.what)
        assert not self.faults, "; ".join(self.faults)
