"""The GPU run's stages on published weights: where they look, what they skip, and what fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import real_models
from benchmarks.gpu.real_stages import REAL
from benchmarks.gpu.report import load
from tests.benchmarks.reports import failed, make_report
from vllm_trimix.config.resolve import resolve

NAME = "Qwen/Qwen3-8B"
NEEDLES, PROBE, PERPLEXITY = "real_qwen_niah", "real_qwen_probe", "real_qwen_ppl"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="transformers brings the hub's client")
    monkeypatch.delenv(real_models.WEIGHTS, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def write_model(folder: Path) -> Path:
    """A checkpoint in two files, of nothing."""
    folder.mkdir(parents=True)
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name in ("config.json", *names):
        (folder / name).write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    return folder


def write_cached(cache: Path) -> Path:
    """The same as the hub's client keeps it."""
    root = cache / "models--Qwen--Qwen3-8B"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("0" * 40)
    return write_model(root / "snapshots" / ("0" * 40))


def test_models_have_the_presets_that_are_asked_for() -> None:
    assert len(REAL) == 10
    for stage in REAL:
        layers = resolve(stage.settings["trimix"], model="elsewhere", num_layers=36 if "qwen" in stage.name else 32)
        assert len(layers.layers) > 10


def test_weights_are_found_in_the_folder_that_is_named_and_in_the_hubs_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert real_models.find(NAME)[0] is None
    cached = write_cached(cache)
    assert real_models.find(NAME) == (cached, "")
    named = write_model(tmp_path / "weights" / "Qwen3-8B")
    monkeypatch.setenv(real_models.WEIGHTS, str(tmp_path / "weights"))
    assert real_models.find(NAME) == (named, "")


@pytest.mark.parametrize(
    ("lost", "says"), [("config.json", "has no config.json"), ("model-2.safetensors", "lacks model-2.safetensors, one")]
)
def test_half_a_model_is_none(lost: str, says: str, tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    (write_cached(cache) / lost).unlink()
    (write_model(tmp_path / "weights" / "Qwen3-8B") / lost).unlink()
    folder, reason = real_models.find(NAME)
    assert folder is None
    assert says in reason
    assert "cache" in reason
    monkeypatch.setenv(real_models.WEIGHTS, str(tmp_path / "weights"))
    folder, reason = real_models.find(NAME)
    assert folder is None
    assert says in reason
    assert reason.startswith("TRIMIX_REAL_MODELS: ")


@pytest.mark.parametrize("name", [NEEDLES, PROBE])
def test_without_weights_a_line_says_what_was_skipped(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(real_models, "_run", lambda *_: pytest.fail("nothing may run"))
    (real_models.probe if name == PROBE else real_models.evaluate)(make_report(tmp_path, name))
    result = load(tmp_path / f"{name}.json")
    assert result is not None
    assert result["status"] == "skipped"
    assert result["seen"].startswith(f"no weights of {NAME}: the hub's cache on this machine doesn't hold it")
    assert result["seen"].count("\n") == 0


def evaluated(monkeypatch: Any, report: Any, *, status: int = 0, **changes: Any) -> list[str]:
    """Runs the stage on a command that writes one cell; returns what it was called with."""
    calls: list[str] = []
    cell = {
        "task": "needle",
        "length": 8192,
        "measure": "answer",
        "baseline": 1.0,
        "score": 0.5,
        "verdict": "none seen",
    }
    stock = {**cell, "configuration": "stock"}
    result = {
        "settings": {},
        "cells": [stock, {**cell, "difference": {}, **changes}],
        "unavailable": {},
        "notes": [],
        "failed": [],
    }

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.extend(command)
        if status != 2:
            (report.folder / "eval").mkdir()
            (report.folder / "eval" / "result.json").write_text(json.dumps(result))
        return subprocess.CompletedProcess(
            command, status, stderr="vllm-trimix: error: eval needs the package 'scipy'\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    real_models.evaluate(report)
    return calls


@pytest.mark.parametrize(("verdict", "wrong"), [("none seen", []), ("gain", []), ("loss", ["no loss beyond chance"])])
def test_a_loss_beyond_chance_fails(
    verdict: str, wrong: list[str], tmp_path: Path, cache: Path, monkeypatch: Any
) -> None:
    model = write_cached(cache)
    calls = evaluated(monkeypatch, make_report(tmp_path, NEEDLES), verdict=verdict)
    assert failed(tmp_path, NEEDLES) == wrong
    assert calls[0] == sys.executable
    assert calls[3:6] == ["eval", "niah", str(model)]
    assert f'--trimix={{"preset": "{NAME}"}}' in calls


def test_perplexity_gets_a_text_that_every_machine_has(tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    write_cached(cache)
    calls = evaluated(monkeypatch, make_report(tmp_path, PERPLEXITY), measure="perplexity", verdict="loss")
    (text,) = [word.removeprefix("--text=") for word in calls if word.startswith("--text=")]
    samples, length = 3, 32768
    assert {f"--samples={samples}", f"--lengths={length}"} <= set(calls)
    # A token of English prose has some four characters.
    assert len(Path(text).read_text()) > 4 * samples * length
    assert failed(tmp_path, PERPLEXITY) == []


def test_a_missing_package_skips_and_anything_else_fails(tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    write_cached(cache)
    evaluated(monkeypatch, make_report(tmp_path, NEEDLES), status=2)
    result = load(tmp_path / f"{NEEDLES}.json")
    assert result is not None
    assert (result["status"], result["seen"]) == ("skipped", "vllm-trimix: error: eval needs the package 'scipy'")
    monkeypatch.setattr(real_models, "_run", lambda *_: (1, "EngineDied"))
    (tmp_path / "again").mkdir()
    with pytest.raises(RuntimeError, match="vllm-trimix eval: exit status 1: EngineDied"):
        real_models.evaluate(make_report(tmp_path / "again", NEEDLES))
    real_models.probe(make_report(tmp_path, PROBE))
    assert failed(tmp_path, PROBE) == []
    monkeypatch.setattr(real_models, "_run", lambda *_: (2, "out of memory"))
    (tmp_path / "failing").mkdir()
    real_models.probe(make_report(tmp_path / "failing", PROBE))
    assert failed(tmp_path / "failing", PROBE) == ["probed"]
