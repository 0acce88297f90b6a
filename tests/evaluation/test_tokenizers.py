"""The tokenizer that makes prompts: another one by name, none at all, and such as make no prompt of any length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from tests.evaluation.test_command import said
from tests.evaluation.tokenizers import characters
from vllm_trimix.measurement.tokenizers import load_tokenizer

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(params=[LlamaConfig, Qwen3Config], ids=lambda kind: kind.__name__)
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model's folder without its tokenizer; for some kinds transformers makes an empty one."""
    folder = tmp_path / "bare"
    request.param(**SMALL).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("command", [["eval", "niah"], ["probe"], ["search"]], ids=lambda command: command[0])
def test_no_tokenizer_in_the_folder(command: list[str], bare: Path, tmp_path: Path) -> None:
    status, line = said([*command, str(bare), "--output", str(tmp_path / "out")])
    assert status == 2
    assert line == (
        f"{bare} holds no tokenizer (tokenizer.json, tokenizer.model, tekken.json); name one by --tokenizer "
        "(HF id or path)"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["eval", "niah"], ["probe"], ["search"]], ids=lambda command: command[0])
def test_another_tokenizer_is_taken(command: list[str], bare: Path, tmp_path: Path) -> None:
    """As far as to the next thing that is wrong: it has no chat template."""
    characters().save_pretrained(tmp_path / "other")
    arguments = [*command, str(bare), "--tokenizer", str(tmp_path / "other"), "--output", str(tmp_path / "out")]
    status, line = said([*arguments, "--chat-template-kwargs", '{"thinking": true}'])
    assert (status, line) == (
        2,
        "--chat-template-kwargs: this tokenizer has no chat template that could take arguments; leave them out",
    )
    status, line = said([*arguments[:-3], str(tmp_path / "nowhere"), *arguments[-2:]])
    assert status == 2
    assert line.startswith(f"--tokenizer: {tmp_path / 'nowhere'}: its tokenizer can't be loaded: ")


def test_arguments_must_be_an_object(bare: Path, tmp_path: Path) -> None:
    characters("{{ messages }}").save_pretrained(bare)
    for value, says in (("[1]", "'[1]' is no JSON object"), ("{", "'{' is not JSON"), ('{"a": 1}', "takes no 'a'")):
        status, line = said(["probe", str(bare), "--chat-template-kwargs", value, "--output", str(tmp_path)])
        assert status == 2
        assert line.startswith("--chat-template-kwargs: ")
        assert says in line


def test_texts_that_stay_short(tmp_path: Path) -> None:
    """One token, whatever the text: nothing splits it, so that it is one unknown word."""
    whole = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"makes 1 tokens of \d+ characters and 1 of \d+: texts don't get longer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_cuts_texts_off(tmp_path: Path) -> None:
    """Its file may say so: it is for other uses."""
    characters().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    cut = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation": cut}))
    assert len(load_tokenizer(str(tmp_path))("word " * 100).input_ids) > 300


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"its tokenizer can't be loaded: .*; name one by --tokenizer") as refused:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(refused.value)
