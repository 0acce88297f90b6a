"""Defects put into the code, or into what it is given, of which each must be seen; the compiler's process runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from tests.launches.findings import judge
from tests.launches.recorder import recording
from tests.launches.situations import META, TOKENS, Layer, Rows, Situation
from vllm_trimix.backend.dynamic.key_counter import KeyCounter
from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill
from vllm_trimix.kernels import triton_sparse, work_items


@contextlib.contextmanager
def _too_many_parts() -> Iterator[None]:
    """The bound on how often keys are split dropped."""
    parts = work_items._parts

    def unbounded(lengths: np.ndarray, slots: int) -> np.ndarray:
        return parts(lengths, 4 * slots)

    with mock.patch.object(work_items, "_parts", unbounded):
        yield


@contextlib.contextmanager
def _rows_on_y() -> Iterator[None]:
    """A grid whose items lie along y."""

    def launcher(self: JITFunction, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.run(*args, grid=(1, *grid[:2]), warmup=False, **kwargs)

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield


@contextlib.contextmanager
def _queries(offset: int, gap: int) -> Iterator[None]:
    """Queries that start elsewhere in their memory, or lie further apart, by a few elements."""
    plain = Layer._queries

    def moved(self: Layer, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        query, output = plain(self, rows)
        shape, strides = query.shape, (query.stride(0) + gap, *query.stride()[1:])
        memory = torch.empty(offset + shape[0] * strides[0], dtype=query.dtype, device=META)
        return memory.as_strided(shape, strides, offset), output

    with mock.patch.object(Layer, "_queries", moved):
        yield


@contextlib.contextmanager
def _other_strides_while_serving() -> Iterator[None]:
    """Queries whose rows are a multiple of 16 elements apart in the warm-up, and of 8 later."""
    plain = Layer.step

    def step(self: Layer, rows: Rows | None = None) -> None:
        with _queries(0, 8):
            plain(self, rows)

    with mock.patch.object(Layer, "step", step):
        yield


@contextlib.contextmanager
def _length(tokens: int) -> Iterator[None]:
    """A prompt of another length."""
    plain = Layer.step
    rows = Rows([tokens], [8192], [tokens])
    with mock.patch.object(Layer, "step", lambda self: plain(self, rows)):
        yield


@contextlib.contextmanager
def _warm_up_without_merge() -> Iterator[None]:
    plain = TritonPrefill.idle
    with mock.patch.object(TritonPrefill, "idle", lambda *args: plain(*args)._replace(merges=None)):
        yield


@contextlib.contextmanager
def _position_in_the_key() -> Iterator[None]:
    """A sparse kernel that is compiled anew for other positions."""
    (parameter,) = (each for each in triton_sparse.sparse_prefill_kernel.params if each.name == "position")
    with (
        mock.patch.object(parameter, "do_not_specialize", False),
        mock.patch("tests.launches.recorder._binder", _fresh_binder()),
    ):
        yield


def _fresh_binder() -> Any:
    from tests.launches import recorder

    return recorder._binder.__wrapped__


@contextlib.contextmanager
def _around_each_layer(act: Callable[[], Any], owner: Any, name: str) -> Iterator[None]:
    plain = getattr(owner, name)

    def noisy(*args: Any, **kwargs: Any) -> Any:
        act()
        return plain(*args, **kwargs)

    with mock.patch.object(owner, name, noisy):
        yield


def _copy() -> None:
    torch.tensor([1, 2], device=META)


def _enter_stream() -> None:
    with torch.cuda.stream(None):
        pass


@contextlib.contextmanager
def _two_launches() -> Iterator[None]:
    """Half the items in each of two launches, the second of which has the first one's items too."""
    plain = TritonPrefill.run

    def run(self: Any, step: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, step._replace(merges=None), *args, **kwargs)
        plain(self, step, *args, **kwargs)

    with mock.patch.object(TritonPrefill, "run", run):
        yield


@contextlib.contextmanager
def _narrow_table() -> Iterator[None]:
    plain = Layer._table
    with mock.patch.object(Layer, "_table", lambda self, requests: plain(self, requests)[:, : TOKENS // 32]):
        yield


@contextlib.contextmanager
def _read_by_the_host() -> Iterator[None]:
    plain = KeyCounter.add

    def add(self: Any, keys_read: torch.Tensor, index: Any) -> None:
        plain(self, keys_read, index)
        self.causal += int(self.read)

    with mock.patch.object(KeyCounter, "add", add):
        yield


_STEP, _SPARSE = Situation(), Situation(tp=8, pattern="a_shape")
DEFECTS: dict[str, tuple[Situation, Callable[[], Any], str]] = {
    "split": (_STEP, _too_many_parts, "slots outside"),
    "grid": (Situation("whole"), _rows_on_y, "programs along y"),
    "first-query": (_STEP, lambda: _queries(1, 0), "q_ptr: starts 2 bytes"),
    "query-stride": (_STEP, lambda: _queries(0, 4), "q_ptr: stride"),
    "served-otherwise": (_STEP, _other_strides_while_serving, "prefill_kernel: compiled while serving"),
    "positions": (_STEP, lambda: _length(2**31 - 100), "positions past 32 bits"),
    "table": (_STEP, _narrow_table, "keys that no page holds"),
    "warm-up": (_STEP, _warm_up_without_merge, "merge_partials_kernel: compiled while serving"),
    "key": (replace(_SPARSE, step="mixed128"), _position_in_the_key, "sparse_prefill_kernel: compiled while serving"),
    "copy": (_STEP, lambda: _around_each_layer(_copy, TritonPrefill, "run"), "copies from the host"),
    "stream": (_STEP, lambda: _around_each_layer(_enter_stream, TritonPrefill, "run"), "streams"),
    "launches": (_STEP, _two_launches, "a layer launches"),
    "host": (_SPARSE, _read_by_the_host, "cannot be called on meta tensors"),
}
"""Situation, defect, and what must be said of it."""


def seen(name: str) -> str:
    """Problems of the situation with the defect, as one text."""
    situation, defect, _ = DEFECTS[name]
    with defect():
        with recording(situation.capability) as warm:
            layer = Layer(situation)
            layer.warm_up()
        try:
            with recording(situation.capability) as served:
                layer.step()
        except RuntimeError as error:
            return str(error)
        return "\n".join(judge(situation, layer, warm, served)["problems"])
