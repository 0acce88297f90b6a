"""How much memory a probe or a search needs, before it starts."""

from __future__ import annotations

from typing import Any

import torch

from vllm_trimix.probing.gradient import BLOCK_BYTES, BLOCK_ROWS, BLOCK_TENSORS

# Tensors of the size of the MLP's inner activations, and of the hidden state, while one layer is differentiated.
_INNER_TENSORS = 6
_HIDDEN_TENSORS = 12


def needed_bytes(config: Any, *, length: int, dtype: torch.dtype, trust_remote_code: bool = False) -> int:
    """Estimate of a probe's peak: a forward pass, one hidden state a layer, and the blocks of one layer's map.

    Args:
        config: The model's configuration, of transformers.
        length: Longest prompt with its answer, in tokens.
        dtype: Of weights and activations.
        trust_remote_code: Whether code that comes with the model may be run, to know its weights.
    """
    text = config.get_text_config()
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    hidden = length * text.hidden_size * dtype.itemsize
    block = BLOCK_ROWS * (heads // kv_heads) * length * BLOCK_BYTES
    return int(
        forward_bytes(config, length=length, dtype=dtype, trust_remote_code=trust_remote_code)
        + (text.num_hidden_layers + 1) * hidden
        + BLOCK_TENSORS * block
    )


def forward_bytes(config: Any, *, length: int, dtype: torch.dtype, trust_remote_code: bool = False) -> int:
    """Estimate of weights and one layer's activations."""
    text = config.get_text_config()
    hidden = length * text.hidden_size * dtype.itemsize
    inner = length * getattr(text, "intermediate_size", 4 * text.hidden_size) * dtype.itemsize
    return weight_bytes(config, dtype, trust_remote_code=trust_remote_code) + int(
        _HIDDEN_TENSORS * hidden + _INNER_TENSORS * inner
    )


def weight_bytes(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> int:
    """Of a model of transformers."""
    # Heavy.
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # Of the extra `probe`.
    import psutil

    return int(psutil.virtual_memory().available)


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
