"""Which class of transformers a model is loaded by, and a model without its weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import __version__ as transformers_version


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
    auto = model_class(config)
    try:
        with torch.device("meta"):
            return auto.from_config(config, **load)
    except ImportError as error:
        raise ValueError(f"{config.model_type}: {_first_line(error)}") from None
    except ValueError:
        raise
    except Exception as error:
        if not getattr(config, "auto_map", None):
            raise
        # The model's own code, often written for another version of transformers: whatever it raises.
        raise ValueError(
            f"{config.model_type}: the code that comes with the model doesn't run with transformers "
            f"{transformers_version}: {type(error).__name__}: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    # Those of transformers begin with an empty line.
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
