"""A GGUF file as a folder for transformers and vLLM: weights in bf16, the tokenizer with what GGUF leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path, *, needs_bos: bool) -> None:
    """Writes weights, configuration and tokenizer.

    Args:
        gguf: The file, of quantised weights.
        folder: Where the model goes.
        needs_bos: Whether prompts must begin with the token that begins a sequence.

    Raises:
        ValueError: transformers can't read the file, or the tokenizer has no such token.
        OSError: What can't be written.
    """
    source: dict[str, Any] = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = read.config
    # It says that it is quantised, so that it can't be saved as it is; its weights no longer are.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    if needs_bos:
        add_bos(tokenizer)
    tokenizer.save_pretrained(folder)
    if needs_bos:
        check_bos(folder)


def add_bos(tokenizer: Any) -> None:
    """Makes the tokenizer put the token that begins a sequence before each prompt.

    Raises:
        ValueError: It has none.
    """
    name, token = tokenizer.bos_token, tokenizer.bos_token_id
    if token is None:
        raise ValueError("the tokenizer has no token that begins a sequence (BOS), which the model needs")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, token)]
    )


def check_bos(folder: Path) -> None:
    """Refuses a tokenizer, as it lies on disk, that begins prompts with anything else.

    Raises:
        ValueError: With what they begin with.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begins = tokenizer("a").input_ids[:1]
    if begins != [tokenizer.bos_token_id]:
        raise ValueError(
            f"{folder}: prompts begin with token {begins}, not with BOS ({tokenizer.bos_token_id}), without which the "
            "model babbles; convert it anew"
        )
