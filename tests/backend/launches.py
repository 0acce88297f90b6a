"""What a step of the composed CUDA path does, in order: uploads, launches, calls of the dense kernels, copies.

Triton's interpreter runs the launches; here they are noted on the way. Import after ``cuda_on_cpu``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

import tests.backend.cuda_on_cpu as hardware
from tests.launches.launch import Launch, argument_of
from tests.launches.limits import problems as beyond_limits
from tests.launches.steps import Layer, Step, wrong


class Recorder(TorchDispatchMode):
    """Notes what happens in every step from ``install`` on."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = [Step()]
        self._keys: set[tuple[str, str]] = set()
        self._layer: Layer | None = None
        self._building = False

    def install(self) -> None:
        """Puts itself into what is called; before ``use_cpu``, which hands the stand-ins to vLLM."""
        for name in ("flash_attn", "unified_attention"):
            setattr(hardware, name, partial(self._dense, getattr(hardware, name)))
        run = InterpretedFunction.run
        recorder = self

        def launch(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if function.fn.__module__.startswith("vllm_trimix."):
                recorder._launched(function, args, kwargs, grid)
            return run(function, *args, grid=grid, warmup=warmup, **kwargs)

        InterpretedFunction.run = launch

    def install_backend(self) -> None:
        """The same for this package's backend, once vLLM can be imported, and for streams."""
        from vllm_trimix.backend import builder, impl

        upload, build, forward = builder.upload, builder.TrimixBuilder.build, impl.TrimixImpl.forward
        stream = torch.cuda.stream

        def uploaded(arrays: Any, device: Any) -> Any:
            self.steps[-1].uploads.append(4 * sum(-(-array.size // 4) * 4 for array in arrays))
            if not self._building or self.steps[-1].layers:
                self.steps[-1].problems.append("an upload outside the building of metadata, or after a layer")
            return upload(arrays, device)

        def built(self_: Any, *args: Any, **kwargs: Any) -> Any:
            self._building = True
            try:
                return build(self_, *args, **kwargs)
            finally:
                self._building = False

        def forwarded(self_: Any, *args: Any, **kwargs: Any) -> Any:
            with self._in_layer(self_, args, kwargs):
                return forward(self_, *args, **kwargs)

        def entered(*args: Any) -> Any:
            if _is_ours():
                self.steps[-1].problems.append("another stream was entered")
            return stream(*args)

        owners: tuple[Any, ...] = (builder, builder.TrimixBuilder, impl.TrimixImpl, torch.cuda)
        for owner, name, noted in zip(
            owners, ("upload", "build", "forward", "stream"), (uploaded, built, forwarded, entered), strict=True
        ):
            setattr(owner, name, noted)

    def next_step(self) -> None:
        """What follows belongs to another step."""
        self.steps.append(Step())

    def take(self) -> dict[str, Any]:
        """What was found since the last time."""
        steps, self.steps = self.steps, [Step()]
        keys, self._keys = self._keys, set()
        layers = [layer for step in steps for layer in step.layers]
        return {
            "problems": sorted({problem for step in steps for problem in (*step.problems, *wrong(step))}),
            "layers": dict(Counter(f"{layer.kind}-{layer.rows}" for layer in layers)),
            "merged": sum("merge_partials_kernel" in layer.events for layer in layers),
            "compiled": dict(Counter(kernel for kernel, _ in keys)),
            "uploads": dict(Counter(len(step.uploads) for step in steps if step.layers)),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._layer is not None and _is_ours():
            self._layer.operations[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def _in_layer(self, impl: Any, args: Any, kwargs: Any) -> Iterator[None]:
        metadata = kwargs["attn_metadata"] if "attn_metadata" in kwargs else args[5]
        plan = getattr(metadata, "trimix" if impl.trimix_active else "trimix_dynamic", None)
        kind = "triangle" if impl.trimix_active else "dynamic" if impl.trimix_dynamic is not None else "stock"
        rows = getattr(plan, "dense_rows", None)
        where = "none" if rows is None else "slice" if isinstance(rows, slice) else "gather"
        if plan is None:
            kind = "warm-up" if impl._cold and kind != "stock" else "stock"
        self._layer = Layer(kind, where)
        self.steps[-1].layers.append(self._layer)
        try:
            with self:
                yield
        finally:
            self._layer = None

    def _dense(self, kernel: Any, **call: Any) -> None:
        if self._layer is not None:
            self._layer.events.append("dense")
        kernel(**call)

    def _launched(self, function: Any, args: Any, kwargs: Any, grid: Any) -> None:
        bound = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
        launch = Launch(
            kernel=function.fn.__name__,
            grid=tuple(grid),
            tensors={
                name: argument_of(value, value.numpy() if name in ("items_ptr", "merges_ptr") else None)
                for name, value in bound.items()
                if isinstance(value, torch.Tensor)
            },
            numbers={name: value for name, value in bound.items() if type(value) in (int, float) and name.islower()},
            constants={name: value for name, value in bound.items() if name.isupper()},
            aligned=(),
            key="",
            num_warps=kwargs["num_warps"],
            source=None,
        )
        self.steps[-1].problems += beyond_limits(launch)
        self._keys.add((launch.kernel, _key(bound)))
        if self._layer is None:
            self.steps[-1].problems.append(f"{launch.kernel} outside every layer")
            return
        self._layer.events.append(launch.kernel)
        if "items_ptr" in bound:
            self._layer.arrays.add(bound["items_ptr"].data_ptr())


def _key(bound: dict[str, Any]) -> str:
    """What Triton would key a kernel on that specialises all its arguments: dtypes, and multiples of 16."""
    parts: list[object] = []
    for name, value in sorted(bound.items()):
        if isinstance(value, torch.Tensor):
            parts.append((name, str(value.dtype), value.data_ptr() % 16 == 0))
        elif name.islower() and type(value) is int:
            parts.append((name, value == 1, value % 16 == 0))
        elif type(value) is not float:
            parts.append((name, str(value)))
    return repr(parts)


def _is_ours() -> bool:
    """Whether the innermost code outside torch and this file is this package's; the reference stands for a kernel."""
    frame = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    name = "" if frame is None else frame.f_code.co_filename
    return "/vllm_trimix/" in name and not name.endswith("/kernels/reference.py")
