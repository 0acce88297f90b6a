"""What a server with these arguments would run: its configuration is made, and its model built without weights."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_trimix.backend import announce, settings
from vllm_trimix.backend.attention import RefusedError
from vllm_trimix.backend.engines.job import CONTEXT, engine_arguments, one_line
from vllm_trimix.backend.names import NAME
from vllm_trimix.backend.registration import register_trimix
from vllm_trimix.backend.survey import Survey, is_attention, survey
from vllm_trimix.config.entry import Resolved


class Preview(NamedTuple):
    """What would run.

    Attributes:
        resolved: The settings.
        sparse: Layers that would be sparse.
        stock: Chosen layers that would stay stock, with the reasons, as in the line; empty where there are none.
        dense: Name of the dense backend.
        kernel: Name of the triangle kernel.
        line: The start-up line.
        warning: That nothing would be sparse, or None.
        unsure: Why the line is made from the configuration alone, or None.
    """

    resolved: Resolved
    sparse: frozenset[int]
    stock: str
    dense: str
    kernel: str
    line: str
    warning: str | None
    unsure: str | None


def preview(model: str, additional: dict[str, Any], flags: list[str]) -> Preview:
    """What ``vllm serve MODEL --attention-backend TRIMIX`` would run.

    Args:
        model: HF id or path.
        additional: The server's ``--additional-config``.
        flags: Engine flags of ``vllm serve``.

    Raises:
        ValueError: As at server start.
    """
    register_trimix()
    arguments = engine_arguments(model, flags)
    arguments.attention_backend = NAME
    arguments.additional_config = additional
    vllm_config = arguments.create_engine_config(CONTEXT)
    resolved = settings.of(vllm_config)
    # One process looks at all layers; how many devices share them changes nothing about a layer.
    arguments.tensor_parallel_size = arguments.pipeline_parallel_size = 1
    arguments.enable_expert_parallel = False
    unsure = None
    dense, kernel = _planned(resolved)
    # Some models compute with small tensors while they are built, which the meta device can't.
    for placement in (torch.device("meta"), _EmptyOnMeta()):
        whole = arguments.create_engine_config(CONTEXT)
        try:
            with built(whole, placement):
                found = survey(whole, resolved)
                dense, kernel = _composed(whole) or (dense, kernel)
            unsure = None
            break
        except RefusedError:
            raise
        except Exception as error:
            unsure = f"the model could not be built without weights: {one_line(error)}"
    if unsure is not None:
        known = settings.ineligible_layers(whole.model_config)
        chosen = {*resolved.layers, *(() if resolved.shallow is None else resolved.shallow.layers)}
        stock = {layer: known[layer] for layer in sorted(chosen & known.keys())}
        found = Survey(frozenset(chosen - known.keys()), stock, frozenset())
    return Preview(
        resolved,
        sparse=found.sparse,
        stock=announce.stock_label(found.stock) if found.stock else "",
        dense=dense,
        kernel=kernel,
        line=announce.start_line(resolved, dense=dense, kernel=kernel, stock=found.stock),
        warning=announce.nothing_sparse(resolved, found),
        unsure=unsure,
    )


def _planned(resolved: Resolved) -> tuple[str, str]:
    if current_platform.is_cpu():
        return "CPU_ATTN", "torch_cpu"
    return resolved.dense_backend or "the platform's", "triton"


def _composed(vllm_config: Any) -> tuple[str, str] | None:
    """Names of the dense backend and of the kernel that the first layer of ours got."""
    for module in vllm_config.compilation_config.static_forward_context.values():
        if is_attention(module) and hasattr(module.impl, "trimix_active"):
            builder = module.get_attn_backend().get_builder_cls()
            return builder.dense_name, builder.trimix_kernel
    return None


class _EmptyOnMeta(TorchFunctionMode):
    """Puts what is made without values, as weights are, on the meta device, and computes the rest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``torch.empty`` elsewhere."""
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


@contextlib.contextmanager
def built(vllm_config: Any, placement: Any = None) -> Iterator[Any]:
    """The model: its modules without memory for their weights.

    Args:
        vllm_config: vLLM's, not used before.
        placement: Where tensors are made; None: on the meta device.

    A process that did this can't run a model any more: vLLM keeps rotary embeddings for the next one.
    """
    # What model code says while it is built is about a server that doesn't run.
    loud = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        try:
            parallel_state.init_distributed_environment(
                world_size=1,
                rank=0,
                local_rank=0,
                distributed_init_method=f"file://{Path(folder, 'store')}",
                backend="gloo",
            )
            parallel_state.ensure_model_parallel_initialized(1, 1)
            with set_default_torch_dtype(vllm_config.model_config.dtype), placement or torch.device("meta"):
                yield initialize_model(vllm_config)
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            logging.disable(loud)
