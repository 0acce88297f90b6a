"""Models that transformers can't run as the probe needs them: one line, before anything is made or loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, T5Config

from tests.probing.families import config_of, seeing
from tests.probing.models import circuit
from vllm_trimix.cli.main import main
from vllm_trimix.probing.loading import model_class, outline

_CONFIGURATION = """
from transformers import PretrainedConfig
class MineConfig(PretrainedConfig):
    model_type = "mine"
    model_dim = 8
    max_context_length = 4096
"""
_MODEL = """
import torch
from transformers import PreTrainedModel
from .configuration_mine import MineConfig
class MineForCausalLM(PreTrainedModel):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        {code}
        self.post_init()
"""


def _folder(path: Path, *, code: str, sizes: dict[str, object]) -> Path:
    names = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (path / "configuration_mine.py").write_text(_CONFIGURATION)
    (path / "modeling_mine.py").write_text(_MODEL.format(code=code))
    circuit(layers=4, lookup=1, answer=2)[1].save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names, **sizes}))
    # Nothing comes to be loaded.
    (path / "model.safetensors").touch()
    return path


@pytest.mark.parametrize("command", ["probe", "search"])
@pytest.mark.parametrize(
    ("code", "sizes", "message"),
    [
        ("", {"num_hidden_layers": 2}, "none of its 2 layers goes through transformers' AttentionInterface"),
        # As OpenELM's: other names, and heads by layer.
        ("", {"num_transformer_layers": 2, "num_query_heads": [2, 4]}, "its configuration has no num_hidden_layers"),
        ("self.missing(1)", {"num_hidden_layers": 2}, "mine: the code that comes with the model doesn't run with"),
    ],
)
def test_code_of_a_models_own(
    command: str, code: str, sizes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _folder(tmp_path, code=code, sizes=sizes)
    assert main([command, str(folder), "--trust-remote-code", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vllm-trimix: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["probe", "search"])
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bloom", "its attention can't be replaced"),
        ("deepseek_v2", "MLA models"),
        ("mamba", "MambaForCausalLM has no attention layers"),
        ("gpt_oss", "no layer can be sparse: all stay stock (0,2 sliding_window, 1,3 learned_sinks)"),
    ],
)
def test_models_that_cannot_be_measured(
    command: str, family: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    circuit(layers=4, lookup=1, answer=2)[1].save_pretrained(tmp_path)
    assert main([command, str(tmp_path), "--length" if command == "probe" else "--lengths", "700"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_the_class_of_a_model() -> None:
    assert model_class(config_of("llama")).__name__ == "AutoModelForCausalLM"
    vision = seeing("qwen3_vl")
    assert type(vision) not in MODEL_FOR_CAUSAL_LM_MAPPING
    assert model_class(vision).__name__ == "AutoModelForImageTextToText"
    assert outline(vision).device.type == "meta"
    with pytest.raises(ValueError, match="transformers knows t5 neither as a causal language model nor"):
        model_class(T5Config())
