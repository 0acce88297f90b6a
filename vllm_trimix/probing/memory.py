"""How much memory a probe or a search needs, before it starts."""

from __future__ import annotations

from typing import Any

import torch

from vllm_trimix.hf_attention.layers import check_model, layer_value
from vllm_trimix.probing.gradient import BLOCK_BYTES, BLOCK_ROWS, BLOCK_TENSORS

# Tensors of the size of the MLP's inner activations, and of the hidden state, while one layer is differentiated.
_INNER_TENSORS = 6
_HIDDEN_TENSORS = 12


def needed_bytes(model: Any, *, length: int, dtype: torch.dtype) -> int:
    """Estimate of a probe's peak: a forward pass, one hidden state a layer, and the blocks of one layer's map.

    Args:
        model: Of transformers; without its weights is enough.
        length: Longest prompt with its answer, in tokens.
        dtype: Of weights and activations.
    """
    text = model.config.get_text_config()
    hidden = length * text.hidden_size * dtype.itemsize
    block = BLOCK_ROWS * largest_group(model) * length * BLOCK_BYTES
    return int(
        forward_bytes(model, length=length, dtype=dtype) + (text.num_hidden_layers + 1) * hidden + BLOCK_TENSORS * block
    )


def largest_group(model: Any) -> int:
    """Query heads that share a KV head, in the layer where most do."""
    return max(int(getattr(module, "num_key_value_groups", 1)) for module in check_model(model).values())


def forward_bytes(model: Any, *, length: int, dtype: torch.dtype) -> int:
    """Estimate of weights and one layer's activations."""
    text = model.config.get_text_config()
    hidden = length * text.hidden_size * dtype.itemsize
    sizes = [layer_value(text, layer, "intermediate_size") for layer in range(text.num_hidden_layers)]
    inner = length * max(size or 4 * text.hidden_size for size in sizes) * dtype.itemsize
    return weight_bytes(model, dtype) + int(_HIDDEN_TENSORS * hidden + _INNER_TENSORS * inner)


def weight_bytes(model: Any, dtype: torch.dtype) -> int:
    """Of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # Of the extra `probe`.
    import psutil

    return int(psutil.virtual_memory().available)


def total_bytes() -> int:
    """The machine's memory."""
    # Of the extra `probe`.
    import psutil

    return int(psutil.virtual_memory().total)


def check(
    needed: int, *, length: int, dtype: torch.dtype, device: torch.device, what: str = "probe", flag: str = "--length"
) -> None:
    """Refuses work that would run out of memory.

    Args:
        needed: Bytes.
        length: Longest prompt, in tokens.
        dtype: Of weights and activations.
        device: Where it runs.
        what: The work in a word.
        flag: The setting that makes prompts shorter.

    Raises:
        ValueError: With what is needed, what there is, and what to do.
    """
    free = available_bytes(device)
    if needed > free:
        raise ValueError(
            f"the {what} needs about {needed / 2**30:.1f} GiB on {device} for {length} tokens in {dtype}, and "
            f"{free / 2**30:.1f} GiB are free; take shorter prompts ({flag}), --dtype bfloat16, or another --device"
        )
