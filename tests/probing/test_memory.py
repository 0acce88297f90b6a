"""Estimates of memory for models whose code comes with them."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.probing.families import config_of, toy
from vllm_trimix.cli.hf_model import share_trust
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.probing import memory
from vllm_trimix.probing.loading import outline
from vllm_trimix.searching import measure

CONFIGURATION = """
from transformers import PretrainedConfig
class MineConfig(PretrainedConfig):
    model_type = "mine"
    hidden_size = 8
    num_attention_heads = 2
    num_hidden_layers = 1
"""
MODEL = """
import torch
from transformers import PreTrainedModel
from .configuration_mine import MineConfig
class MineForCausalLM(PreTrainedModel):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        self.inner = torch.nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.post_init()
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mine")
    names = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    (folder / "configuration_mine.py").write_text(CONFIGURATION)
    (folder / "modeling_mine.py").write_text(MODEL)
    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_trust_reaches_the_estimates(config: Any) -> None:
    # First: transformers remembers code that was trusted.
    with pytest.raises(ValueError, match="trust_remote_code"):
        outline(config)
    assert memory.weight_bytes(outline(config, trust_remote_code=True), torch.float32) == 8 * 32 * 4


@pytest.mark.parametrize(
    ("family", "group", "inner"),
    [("llama", 2, 96), ("gemma4_text", 2, 96), ("gemma3n_text", 2, 96), ("qwen3_next", 2, 96), ("gpt2", 1, 256)],
)
def test_estimates_take_each_layers_own_sizes(family: str, group: int, inner: int) -> None:
    """Layers may differ in heads and in the MLP: the largest counts."""
    model = outline(config_of(family))
    weights = memory.weight_bytes(model, torch.bfloat16)
    assert weights == 2 * sum(parameter.numel() for parameter in toy(config_of(family)).parameters())
    assert memory.largest_group(model) == group
    wanted: dict[str, Any] = {"length": 1000, "dtype": torch.bfloat16}
    assert memory.forward_bytes(model, **wanted) > weights + 2 * 1000 * inner
    assert memory.needed_bytes(model, **wanted) > memory.forward_bytes(model, **wanted)
    assert measure.needed_bytes(model, **wanted, candidates=[Dense()]) > memory.forward_bytes(model, **wanted)


@pytest.mark.parametrize(
    ("trusted", "flags", "server", "expected"),
    [
        (False, [], None, (False, [])),
        (True, ["--dtype", "float32"], None, (True, ["--dtype", "float32", "--trust-remote-code"])),
        (False, ["--trust-remote-code"], None, (True, ["--trust-remote-code"])),
        (True, ["--trust_remote_code"], None, (True, ["--trust_remote_code"])),
        (True, [], "http://localhost", (True, [])),
    ],
)
def test_trust_is_shared_with_the_engines(trusted: bool, flags: list[str], server: str | None, expected: Any) -> None:
    args = argparse.Namespace(trust_remote_code=trusted, flags=flags, server=server)
    share_trust(args)
    assert (args.trust_remote_code, args.flags) == expected
