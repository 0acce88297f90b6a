"""The interface of a way to compute a step's triangle rows on CUDA.

Planned once a step on the host, uploaded with the rest of the plan, run once a layer. The builder owns one instance for
all layers of its KV-cache group.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Plan


class LayerShape(NamedTuple):
    """Attention heads of a layer, on this device."""

    num_heads: int
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True)
class LayerGroup:
    """What a way is made for: the triangle layers of a KV-cache group.

    Attributes:
        shapes: Of all layers; they share their KV heads and head size, and may differ in query heads.
        triangle: The pattern.
        dtype_size: Bytes of an element of the model's dtype.
        block_size: Tokens of a page.
        device: Where it runs.
    """

    shapes: frozenset[LayerShape]
    triangle: Triangle
    dtype_size: int
    block_size: int
    device: torch.device


class TrianglePrefill(abc.ABC):
    """One way to compute the triangle rows.

    Attributes:
        max_tail_rows: Dense spans of the last prompt rows up to this long are its work too.
        group: What it is made for.
    """

    max_tail_rows: ClassVar[int] = 0

    def __init__(self, group: LayerGroup) -> None:
        """Prepares for the layers of a group, once."""
        self.group = group

    @abc.abstractmethod
    def arrays(self, plan: Plan) -> list[np.ndarray]:
        """What a step's launches read, within int32; uploaded as they are. Once a step."""

    @abc.abstractmethod
    def bind(self, plan: Plan, arrays: list[torch.Tensor], block_table: torch.Tensor) -> Any:
        """The step, as ``run`` takes it. Once a step.

        Args:
            plan: The step's.
            arrays: ``arrays`` of it, uploaded.
            block_table: Page ids, [num_requests, max_blocks], int32.
        """

    @abc.abstractmethod
    def idle(self, block_table: torch.Tensor) -> Any:
        """A step without rows, whose run compiles whatever serving will launch."""

    @abc.abstractmethod
    def run(self, step: Any, call: LayerCall) -> None:
        """One layer: writes the plan's triangle rows and tails to ``call.out`` in place.

        Args:
            step: From ``bind`` or ``idle``.
            call: The layer's tensors.
        """
