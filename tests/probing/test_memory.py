"""Estimates of memory for models whose code comes with them."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from vllm_trimix.cli.hf_model import share_trust
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.probing import memory
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
    wanted: dict[str, Any] = {"length": 16, "dtype": torch.float32}
    # First: transformers remembers code that was trusted.
    with pytest.raises(ValueError, match="trust_remote_code"):
        memory.needed_bytes(config, **wanted)
    assert memory.weight_bytes(config, torch.float32, trust_remote_code=True) == 8 * 32 * 4
    assert memory.needed_bytes(config, **wanted, trust_remote_code=True) > 8 * 32 * 4
    assert measure.needed_bytes(config, **wanted, candidates=[Dense()], trust_remote_code=True) > 8 * 32 * 4


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
