"""The backend: the platform's own dense backend, with the triangle laid over its prefill.

``compose`` subclasses the dense backend's three classes (backend, metadata builder, implementation), so that whatever
they do besides prefill (cache layout and update, weights post-processing, decode, CUDA-graph buffers, capabilities)
stays theirs, in every version of vLLM.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend

from vllm_trimix.backend.builder import SharedWorkspace, TrimixBuilder
from vllm_trimix.backend.impl import TrimixImpl
from vllm_trimix.backend.names import NAME

DENSE_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "CPU_ATTN")


class TrimixBackend(AttentionBackend):
    """What every composed backend says of itself; the rest is the dense backend's."""

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def supports_pcp(cls) -> bool:
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # The plan is made from the CPU query lengths.
        return False


class RefusedError(ValueError):
    """A server with this model doesn't start."""


def compose(dense_path: str) -> str:
    """Builds on a dense backend.

    Args:
        dense_path: Qualified name of the dense backend's class, as the platform chose it.

    Returns:
        Qualified name of the composed class, an attribute of this module.

    Raises:
        RefusedError: The dense backend can't be built on.
    """
    dense: Any = resolve_obj_by_qualname(dense_path)
    if dense.is_mla():
        # Models that vLLM doesn't list as MLA before it builds them.
        raise RefusedError(
            "TRIMIX does not support MLA models: their cache holds compressed keys. Leave --attention-backend unset"
        )
    if dense.get_name() not in DENSE_BACKENDS or dense.forward_includes_kv_cache_update:
        raise RefusedError(
            f"TRIMIX can't build on {dense.get_name()}, the platform's choice for this model; "
            f"it builds on {', '.join(DENSE_BACKENDS)}. Force one with "
            '--additional-config \'{"trimix": {"dense_backend": ...}}\', or leave --attention-backend unset'
        )
    composed = _compose(dense)
    return f"{composed.__module__}.{composed.__qualname__}"


@functools.cache
def _compose(dense: type[AttentionBackend]) -> type[AttentionBackend]:
    # Model code and metadata builders of the dense backend recognise its classes by isinstance.
    name = f"Trimix{dense.__name__}"
    kernel = "torch_cpu" if dense.get_name() == "CPU_ATTN" else "triton"
    impl = type(f"{name}Impl", (TrimixImpl, dense.get_impl_cls()), {"__module__": __name__, "trimix_kernel": kernel})
    dense_builder = dense.get_builder_cls()
    mixin = SharedWorkspace if hasattr(dense_builder, "set_workspace_buffer") else TrimixBuilder
    builder = type(
        f"{name}Builder",
        (mixin, dense_builder),
        {
            "__module__": __name__,
            "dense_builder_cls": dense_builder,
            "dense_name": dense.get_name(),
            "trimix_kernel": kernel,
        },
    )
    composed = type(
        name,
        (TrimixBackend, dense),
        {
            "__module__": __name__,
            "__qualname__": name,
            "get_impl_cls": staticmethod(lambda: impl),
            "get_builder_cls": staticmethod(lambda: builder),
        },
    )
    globals()[name] = composed
    return composed
