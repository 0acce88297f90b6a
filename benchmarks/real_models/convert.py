"""A GGUF file as a folder for transformers and vLLM: weights in bf16, the tokenizer with what GGUF leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path, *, needs_bos: bool) -> None:
    """Writes weights, configuration and tokenizer.

    Args:
        gguf: The file, of quantised weights.
        folder: Where the model goes.
        needs_bos: Whether prompts must begin with the token that begins a sequence (BOS).

    Raises:
        ValueError: transformers can't read the file, or prompts would begin otherwise.
        ImportError: gguf or accelerate is not installed.
        OSError: What can't be written.
    """
    source: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    if needs_bos:
        add_bos(tokenizer)
    tokenizer.save_pretrained(folder)
    check_bos(folder, needs_bos=needs_bos)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = read.config
    # It says that it is quantised, so that it can't be saved as it is; its weights no longer are.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"the weights can't be written: {error}") from None


def add_bos(tokenizer: Any) -> None:
    """Makes the tokenizer put the token that begins a sequence before each prompt.

    Raises:
        ValueError: It has none.
    """
    name, token = tokenizer.bos_token, tokenizer.bos_token_id
    if token is None:
        raise ValueError("the tokenizer has no token that begins a sequence (BOS), which the model needs; pin another")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, token)]
    )


def check_bos(folder: Path, *, needs_bos: bool) -> None:
    """Refuses a tokenizer, as it lies on disk, that begins prompts otherwise than the model was trained with.

    Raises:
        ValueError: With what they begin with.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begins, bos = tokenizer("a").input_ids[:1], tokenizer.bos_token_id
    if (begins == [bos]) is not needs_bos:
        rule = "must, or the model babbles" if needs_bos else "must not: the chat template brings its own"
        raise ValueError(
            f"prompts begin with token {begins}; with BOS ({bos}) they {rule}. This transformers reads the saved "
            "tokenizer otherwise than the pinned one does: install that of requirements/constraints-cpu.txt"
        )
