"""``probe`` and ``search`` on models of several kinds of layers, from a folder as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.probing.families import config_of, seeing, toy
from tests.probing.models import circuit
from vllm_trimix.cli.main import main
from vllm_trimix.config.head_files import read_head_file
from vllm_trimix.demo.prompts import make_demo_prompt

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_SIZES = {"vocab_size": 9401, "initializer_range": 0.1}
# Model and text families, and what the report says of the layers that stay as they are.
KINDS: dict[str, tuple[Any, str]] = {
    "qwen3_next": (config_of("qwen3_next", **_SIZES), "0,2 (no attention)"),
    "zamba2": (config_of("zamba2", **_SIZES), "0,2 (no attention)"),
    "nemotron_h": (config_of("nemotron_h", **_SIZES), "0,2 (no attention)"),
    "gemma4_text": (
        config_of("gemma4_text", **_SIZES, vocab_size_per_layer_input=9401, num_kv_shared_layers=0),
        "0,2 (a sliding window of their own)",
    ),
    "gemma3": (seeing("gemma3", **_SIZES), "0,2 (a sliding window of their own)"),
    "qwen2_5_vl": (seeing("qwen2_5_vl", **_SIZES, **_MROPE), ""),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    made = [make_demo_prompt(tokens=120, hops=1, seed=seed) for seed in range(4)]
    path.write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in made))
    return path


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, _ = KINDS[request.param]
    path: Path = tmp_path_factory.mktemp("models") / request.param
    torch.manual_seed(0)
    if hasattr(config, "vision_config"):
        model = AutoModelForImageTextToText.from_config(config).float()
    else:
        model = toy(config)
    model.save_pretrained(path)
    circuit(layers=4, lookup=1, answer=2)[1].save_pretrained(path)
    return path


def test_probe(folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = KINDS[folder.name][1]
    flags = ["--n-init", "4", "--n-local", "20", "--last-n", "8", "--random-orders", "0"]
    flags += ["--method", "both"]
    flags += ["--dtype", "float32"]
    code = main(["probe", str(folder), "--prompts", str(prompts), "--output", str(tmp_path), *flags])
    out, err = capsys.readouterr()
    # A random model doesn't know the answers.
    assert code in (0, 1), err
    assert (tmp_path / "preset.json").exists() is (code == 0)
    assert "No task is solved: the reference is the model's own dense answer" in out
    scores = json.loads((tmp_path / "scores.json").read_text())
    stock = {int(layer) for layer in scores["stock"]}
    assert stock == ({0, 2} if words else set())
    assert sorted(scores["orders"]["gradient"]) == [layer for layer in range(4) if layer not in stock]
    assert not stock & set(scores["chosen"])
    report = (tmp_path / "report.md").read_text()
    assert ("Layers without a choice" in report) is bool(words)
    assert words in report
    assert words in out
    table = report.split("## Middle Q-K by layer")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line[2:3].isdecimal()]
    assert [layer for layer, row in enumerate(rows) if "| - |" in row] == sorted(stock)


def test_search(folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidates = tmp_path / "candidates.json"
    candidates.write_text(json.dumps([{"pattern": "a_shape", "n_init": 4, "n_local": 16}, {"pattern": "dense"}]))
    flags = ["--candidates", str(candidates), "--last-n", "8", "--output", str(tmp_path / "out"), "--dtype", "float32"]
    call = ["search", str(folder), "--prompts", str(prompts), *flags]
    main(call)
    out, err = capsys.readouterr()
    words = KINDS[folder.name][1]
    layers = "1,3" if words else "0-3"
    assert f"layers {layers} read " in out, err
    assert ("layers that stay as they are: 0,2 " in err) is bool(words)
    heads = read_head_file(tmp_path / "out" / "heads.json", where="heads").layers
    assert [None if row is None else len(row) for row in heads] == ([None, 4, None, 4] if words else [4] * 4)
    if words:
        assert main([*call, "--layers", "0-1"]) == 2
        assert "--layers: 0 stay as they are (0 " in capsys.readouterr().err
