"""Which class of transformers a model is loaded by, and a model without its weights."""

from __future__ import annotations

from typing import Any

import torch


def model_class(config: Any) -> Any:
    """The class that loads a model for its text: a causal language model, else one that sees images besides.

    Args:
        config: Of transformers.

    Raises:
        ValueError: Neither.
    """
    # Heavy.
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    named = getattr(config, "auto_map", None) or {}
    for auto, mapping in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in mapping or auto.__name__ in named:
            return auto
    raise ValueError(
        f"transformers knows {config.model_type} neither as a causal language model nor as one for images and text: "
        "its layers can't be measured here; choose layers by hand"
    )


def outline(config: Any, **load: Any) -> Any:
    """A model without its weights, on the meta device.

    Args:
        config: Of transformers.
        load: What else ``from_config`` takes.

    Raises:
        ValueError: No class for it, or a package that it needs is missing.
    """
    try:
        with torch.device("meta"):
            return model_class(config).from_config(config, **load)
    except ImportError as error:
        # Those of transformers begin with an empty line.
        raise ValueError(f"{config.model_type}: {str(error).strip().splitlines()[0]}") from None
