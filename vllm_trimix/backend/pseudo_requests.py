"""Query rows as a batch of their own: a stock kernel takes each span or tile for a request with pages and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_trimix.plan import Span


@dataclass(frozen=True)
class PseudoRequests:
    """Spans of a step as a batch of their own, on the host.

    Attributes:
        starts: First row of each span in the batch, and the end, [num_spans + 1], int32.
        indices: Row of each span's request in the step, [num_spans], int64.
        ends: Keys of each span's request up to the span's last row, [num_spans], int64.
        rows: Rows of the step, [num_rows]; None when they are contiguous.
        first_row: First row of the step.
        num_rows: Rows of the batch.
        longest: Rows of the longest span.
    """

    starts: np.ndarray
    indices: np.ndarray
    ends: np.ndarray
    rows: np.ndarray | None
    first_row: int
    num_rows: int
    longest: int

    def arrays(self) -> list[np.ndarray]:
        """What the device needs of it: starts, indices and, unless contiguous, rows."""
        return [self.starts, self.indices, *([] if self.rows is None else [self.rows])]

    def selection(self, rows: torch.Tensor | None) -> slice | torch.Tensor:
        """The step's rows as an index: a slice when they are contiguous, else ``rows``, uploaded, as int64."""
        return slice(self.first_row, self.first_row + self.num_rows) if rows is None else rows.long()


def pseudo_requests(spans: Sequence[Span] | np.ndarray) -> PseudoRequests:
    """The batch of some spans, in the order of their rows, or of a table with their columns."""
    table = np.array(spans, dtype=np.int64)
    first_rows, num_rows = table[:, 1], table[:, 2]
    starts = np.zeros(len(table) + 1, dtype=np.int32)
    np.cumsum(num_rows, out=starts[1:])
    total, first_row = int(starts[-1]), int(first_rows[0])
    rows = None
    if first_rows[-1] + num_rows[-1] != first_row + total:
        rows = np.repeat(first_rows - starts[:-1], num_rows) + np.arange(total)
    indices = np.ascontiguousarray(table[:, 0])
    return PseudoRequests(starts, indices, table[:, 3] + num_rows, rows, first_row, total, int(num_rows.max()))
