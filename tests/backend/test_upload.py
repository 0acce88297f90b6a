"""What the plan sends to the device: one transfer, arrays intact."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_trimix.backend.pseudo_requests import pseudo_requests
from vllm_trimix.backend.upload import _stage, _views, upload
from vllm_trimix.plan import Span

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


@given(st.lists(shapes, max_size=6), st.randoms(use_true_random=False))
def test_arrays_arrive_intact_in_one_buffer(shapes: list[tuple[int, ...]], random: object) -> None:
    generator = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    dtypes = [np.int32, np.int64]
    arrays = [
        generator.integers(-(2**31), 2**31, shape).astype(dtypes[index % 2]) for index, shape in enumerate(shapes)
    ]
    for sent in (_views(_stage(arrays, pin_memory=False), arrays), upload(arrays, torch.device("cpu"))):
        for array, tensor in zip(arrays, sent, strict=True):
            assert tensor.dtype == torch.int32
            assert tuple(tensor.shape) == array.shape
            assert (tensor.numpy() == array).all()


def test_one_buffer_with_aligned_arrays() -> None:
    arrays = [np.arange(size, dtype=np.int32) for size in (5, 8, 1)]
    sent = _views(_stage(arrays, pin_memory=False), arrays)
    assert [tensor.storage_offset() for tensor in sent] == [0, 8, 16]
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent}) == 1


@st.composite
def spans(draw: st.DrawFn) -> list[Span]:
    found, row, request = [], 0, -1
    for _ in range(draw(st.integers(1, 6))):
        row += draw(st.integers(0, 5))
        # Others of the step have no dense rows.
        request += draw(st.integers(1, 3))
        found.append(Span(request, row, draw(st.integers(1, 90)), draw(st.integers(0, 10**6))))
        row += found[-1].num_rows
    return found


@given(spans())
def test_a_batch_has_the_rows_of_its_spans(spans: list[Span]) -> None:
    batch = pseudo_requests(spans)
    rows = [span.first_row + row for span in spans for row in range(span.num_rows)]
    contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
    assert (batch.rows is None) is contiguous
    if batch.rows is not None:
        assert batch.rows.tolist() == rows
    assert batch.num_rows == len(rows)
    assert batch.first_row == rows[0]
    assert batch.longest == max(span.num_rows for span in spans)
    assert np.diff(batch.starts).tolist() == [span.num_rows for span in spans]
    assert batch.indices.tolist() == [span.request for span in spans]
    assert batch.ends.tolist() == [span.position + span.num_rows for span in spans]
