"""Records the launches of the Triton kernels instead of running them: arguments, grid, and what Triton would compile.

On the meta device the code before a launch runs as on a GPU, on tensors of any size that hold no memory; a number that
the host would have to wait for raises. Triton's own binder makes of each launch the key and the source of its kernel.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.launches.launch import Launch, argument_of
from vllm_trimix.backend import builder
from vllm_trimix.backend.triangle import triton_prefill
from vllm_trimix.kernels import triton_launch

MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}
"""Of the largest GPU of each compute capability: A100, A40, L40S, H200, B200, RTX PRO 6000."""


@dataclass
class Recording:
    """What happened, in order.

    Attributes:
        launches: Launches of Triton kernels.
        uploads: Bytes of each copy of the plan's arrays to the device.
        order: ``upload``, or a launch's kernel.
        copies: Where else numbers of the host went to the device: on a GPU each waits for it.
        streams: Streams that were entered.
    """

    launches: list[Launch] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    streams: int = 0


@contextlib.contextmanager
def recording(capability: int) -> Iterator[Recording]:
    """Launches are recorded as on a GPU of this compute capability, times ten."""
    found = Recording()
    host: list[tuple[torch.Tensor, np.ndarray]] = []

    def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
        with _unwatched():
            sent = _upload(arrays, device)
        host.extend(zip(sent, arrays, strict=True))
        # As the staging buffer is laid out: each array from a multiple of 16 bytes on.
        found.uploads.append(4 * sum(-(-array.size // 4) * 4 for array in arrays))
        found.order.append("upload")
        return sent

    def run(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        found.launches.append(_launch(self, args, kwargs, grid, capability, host))
        found.order.append(self.__name__)

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        found.streams += 1
        yield

    _upload = builder.upload
    with contextlib.ExitStack() as stack:
        for module in (triton_launch, triton_prefill):
            stack.enter_context(mock.patch.object(module, "capability_of", return_value=capability))
        count = MULTIPROCESSORS[capability]
        stack.enter_context(mock.patch.object(triton_prefill, "_multiprocessors", return_value=count))
        stack.enter_context(mock.patch.object(builder, "upload", upload))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", stream))
        # Of a list a tensor is made without any dispatch.
        stack.enter_context(mock.patch.object(torch, "tensor", functools.partial(_of_list, found, torch.tensor)))
        stack.enter_context(_Copies(found))
        yield found


class _Copies(TorchDispatchMode):
    """Notes what goes from the host to the meta device."""

    watches: ClassVar[bool] = True

    def __init__(self, found: Recording) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.watches and isinstance(out, torch.Tensor) and out.device.type == "meta":
            given = [arg for arg in args if isinstance(arg, torch.Tensor)]
            # A number alone is an argument of the kernel that reads it.
            if any(arg.device.type == "cpu" and arg.ndim for arg in given):
                self._found.copies.append(_origin())
        return out


def _of_list(found: Recording, make: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    made: torch.Tensor = make(*args, **kwargs)
    if made.device.type == "meta":
        found.copies.append(_origin())
    return made


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    with mock.patch.object(_Copies, "watches", False):
        yield


def _origin() -> str:
    """The innermost line of this package that runs."""
    frames = [frame for frame in traceback.extract_stack() if "vllm_trimix" in Path(frame.filename).parts]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "tests"


def _launch(
    kernel: JITFunction,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    grid: tuple[int, ...],
    capability: int,
    host: list[tuple[torch.Tensor, np.ndarray]],
) -> Launch:
    bind, backend, target = _binder(kernel, capability)
    bound, specialisation, options = bind(*args, **kwargs)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, kwargs, bound, specialisation, options)
    names = list(bound)
    # The tensors' contents: those that the host uploaded.
    values = {id(tensor): array for tensor, array in host}
    tensors = {
        name: argument_of(value, values.get(id(value)))
        for name, value in bound.items()
        if isinstance(value, torch.Tensor)
    }
    constants = {name: value for name, value in bound.items() if signature[name] == "constexpr" and value is not None}
    source = ASTSource(kernel, signature, constexprs, attributes)
    return Launch(
        kernel=kernel.__name__,
        grid=tuple(grid),
        tensors=tensors,
        numbers={
            name: value
            for name, value in bound.items()
            if isinstance(value, int | float) and name not in constants and name == name.lower()
        },
        constants=constants,
        aligned=tuple(names[place] for (place,), found in attributes.items() if found),
        key=f"{kernel.__name__} sm_{capability} {specialisation} {options}",
        num_warps=parsed.num_warps,
        source=functools.partial(compile_source, source, target=target, options=parsed.__dict__),
    )


@functools.cache
def _binder(kernel: JITFunction, capability: int) -> tuple[Any, Any, GPUTarget]:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    return create_function_from_signature(kernel.signature, kernel.params, backend), backend, target
