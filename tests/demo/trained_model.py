"""The committed trained model, and what it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm_trimix.demo.trained_spec import SIZES
from vllm_trimix.demo.trained_task import TrainedPrompt, make_trained_prompt

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests/data/trained-small"
SPEC = SIZES["small"]
LENGTHS = (4, 8, 24, 48, 96)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def held_out(records: int, count: int = 100) -> list[TrainedPrompt]:
    """Other prompts than those that training itself checks."""
    return [make_trained_prompt(records=records, seed=1000 + seed) for seed in range(count)]
