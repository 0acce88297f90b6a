"""A circuit model in HF transformers, under the triangle as the tests state it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from vllm_trimix.demo import vocabulary
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec

# The whole circuit and an idle layer, at an eighth of the default's attention.
SMALL = CircuitSpec(layers=4, lookup_layer=1, answer_layer=3, heads=2, kv_heads=1)
ALL_LAYERS = range(SMALL.layers)
ALL_BUT_LOOKUP = [layer for layer in ALL_LAYERS if layer != SMALL.lookup_layer]


@dataclass
class Rule:
    """The triangle as the tests state it, and the attention weights it saw, kept on request."""

    layers: Iterable[int] = ()
    n_init: int = 8
    n_local: int = 512
    last_n: int = 128
    prompt_len: int = 0
    keep: bool = False
    kept: dict[int, torch.Tensor] = field(default_factory=dict)


def rule_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention of HF's interface under the rule on the model's config."""
    rule: Rule = module.config.rule
    j = torch.arange(key.shape[2])[None, :]
    i = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
    visible = j <= i
    if module.layer_idx in rule.layers:
        visible = visible & ((j < rule.n_init) | (i - j < rule.n_local) | (i >= rule.prompt_len - rule.last_n))
    if not rule.keep:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    if weights.requires_grad:
        weights.retain_grad()
    rule.kept[module.layer_idx] = weights
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None


AttentionInterface.register("rule", rule_attention)


class Demo:
    """A circuit model on disk, and HF's reading of it."""

    def __init__(self, directory: Path, spec: CircuitSpec) -> None:
        make_demo_model(directory, spec)
        self.directory = directory
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self._models: dict[tuple[torch.dtype, str], Any] = {}

    def model(self, dtype: torch.dtype = torch.float32, attention: str = "rule") -> Any:
        if (dtype, attention) not in self._models:
            self._models[dtype, attention] = AutoModelForCausalLM.from_pretrained(
                self.directory, dtype=dtype, attn_implementation=attention
            )
        return self._models[dtype, attention]

    def ask(
        self, text: str, *, rule: Rule | None = None, dtype: torch.dtype = torch.float32, attention: str = "rule"
    ) -> tuple[str, float]:
        """The words generated before ``</s>``, and the margin of the first one's logit."""
        inputs = self.tokenizer(text, return_tensors="pt")
        prompt_len = inputs.input_ids.shape[1]
        model = self.model(dtype, attention)
        model.config.rule = rule or Rule()
        model.config.rule.prompt_len = prompt_len
        done = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        words = self.tokenizer.convert_ids_to_tokens(done.sequences[0, prompt_len:])
        best, second = done.logits[0][0].float().topk(2).values
        assert words[-1] == vocabulary.EOS, f"never stops: {words}"
        return " ".join(words[:-1]), float(best - second)


MakeDemo = Callable[[CircuitSpec], Demo]
