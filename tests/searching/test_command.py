"""The command from end to end on a circuit model: what it writes and prints, going on after a kill, bad input."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_trimix.cli.main import main
from vllm_trimix.config.head_files import read_head_file
from vllm_trimix.config.resolve import resolve
from vllm_trimix.config.shallow import resolve_shallow
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.prompts import make_demo_prompt
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.searching import search

ROOT = Path(__file__).parents[2]
FILES = ["costs.png", "heads.json", "patterns.png", "progress", "report.md", "search.json"]
LOCAL = {"pattern": "a_shape", "n_init": 4, "n_local": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "model"
    make_demo_model(path, CircuitSpec(layers=3, lookup_layer=1, answer_layer=2, heads=4))
    return path


@pytest.fixture(scope="module")
def prompts(model: Path) -> Path:
    path = model.parent / "prompts.jsonl"
    made = [make_demo_prompt(tokens=800, hops=2, seed=seed) for seed in range(2)]
    path.write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in made))
    return path


@pytest.fixture(scope="module")
def candidates(model: Path) -> Path:
    path = model.parent / "candidates.json"
    path.write_text(json.dumps([LOCAL, {"pattern": "dense"}]))
    return path


def arguments(model: Path, prompts: Path, candidates: Path, output: Path) -> list[str]:
    flags = ["--candidates", str(candidates), "--output", str(output), "--budget", "0.7"]
    return ["search", str(model), "--prompts", str(prompts), *flags]


def served(out: str) -> dict[str, Any]:
    """The ``trimix`` entry of the command that is printed."""
    words = shlex.split(out.split("serve: ")[1].splitlines()[0])
    assert words[:2] == ["vllm", "serve"]
    assert words[3:6] == ["--attention-backend", "TRIMIX", "--additional-config"]
    entry: dict[str, Any] = json.loads(words[6])["trimix"]
    return entry


def test_finds_the_heads_and_writes_everything(
    model: Path, prompts: Path, candidates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, prompts, candidates, tmp_path)) == 0
    out, err = capsys.readouterr()
    assert "2 file, 800-800 tokens" in err
    assert "measure: 100%" in err
    assert "Answers with the choice in place: 2 of 2 right, dense 2" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES

    # The preset makes layer 2 a triangle layer: 0 and 1 are searched.
    heads = tmp_path / "heads.json"
    file = read_head_file(heads, where="test")
    local = (AShape(4, 16),) * 4
    assert file.layers == (local, (Dense(), *local[1:]), None)
    assert file.model == str(model)
    assert file.provenance["prompts"] == ["2 file, 800-800 tokens"]
    assert file.provenance["budget"] == {"share": 0.7, "of": "layer"}
    assert file.provenance["answers"]["right_sparse"] == 2
    shallow = resolve_shallow({"heads": str(heads)}, triangle_layers=[2], num_layers=3, num_heads=4, last_n=128)
    assert shallow is not None
    assert [shallow.heads_of(layer, 0, 4) for layer in (0, 1)] == [file.layers[0], file.layers[1]]

    entry = served(out)
    assert entry == {"shallow": {"heads": str(heads)}}
    config = json.loads((model / "config.json").read_text())
    resolved = resolve(entry, model=str(model), num_layers=3, model_entry=config["trimix"], num_heads=4)
    assert (resolved.layers, resolved.shallow and resolved.shallow.layers) == ((2,), (0, 1))

    figures = json.loads((tmp_path / "search.json").read_text())
    assert figures["layers"]["1"]["chosen"] == [1, 0, 0, 0]
    errors = [row[0] for row in figures["layers"]["1"]["mean"]["error"]]
    assert errors[0] > 0.3
    assert errors[1:] == [0, 0, 0]
    each = [prompt["1"]["error"][0][0] for prompt in figures["by_prompt"]]
    assert errors[0] == pytest.approx(sum(each) / 2)
    assert figures["mean_density"] == pytest.approx(file.provenance["mean_density"])
    report = (tmp_path / "report.md").read_text()
    assert f"**Layers 0-1 read {figures['mean_density']:.1%} of dense attention's keys.**" in report
    assert "each layer's heads together at most 70%" in report
    assert all(f"({name})" in report for name in ("patterns.png", "costs.png"))
    assert "| 1 | " in report.split("## Layers")[1]
    command = shlex.split(report.split("Repeat: `")[1].split("`")[0])
    assert command == ["vllm-trimix", *_normal(arguments(model, prompts, candidates, tmp_path))]


def _normal(words: list[str]) -> list[str]:
    """Flags in the order of the parser."""
    pairs = dict(zip(words[2::2], words[3::2], strict=True))
    order = ["--output", "--prompts", "--candidates", "--budget"]
    return [*words[:2], *(word for flag in order for word in (flag, pairs[flag]))]


def test_a_choice_that_spoils_answers_is_not_recommended(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By head no candidate is affordable that keeps the record; the head that needs it is named."""
    path = tmp_path / "crippled.json"
    path.write_text(json.dumps([LOCAL]))
    flags = ["--candidates", str(path), "--output", str(tmp_path / "out")]
    assert main(["search", str(model), "--prompts", str(prompts), *flags]) == 1
    out = capsys.readouterr().out
    assert "1 heads lose more than 10% with the best candidate that they can afford: layer 1 head 0 (0." in out
    assert "0 of 2 right, dense 2" in out
    assert "The choice spoils answers" in out
    assert "vllm serve" not in out


def test_another_budget_measures_nothing_anew(
    model: Path,
    prompts: Path,
    candidates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, measured = search.measure_prompt, []

    def counted(*positional: Any, layers: tuple[int, ...], **named: Any) -> None:
        measured.append(layers)
        done = named.pop("done")

        def interrupted(layer: int, result: Any) -> None:
            done(layer, result)
            if len(measured) == 2:
                raise KeyboardInterrupt

        real(*positional, layers=layers, done=interrupted, **named)

    monkeypatch.setattr(search, "measure_prompt", counted)
    call = arguments(model, prompts, candidates, tmp_path)
    # The first prompt is whole, of the second one layer.
    assert main(call) == 130
    assert measured == [(0, 1), (0, 1)]
    assert main(call) == 0
    assert measured[2:] == [(1,)]
    first = (tmp_path / "heads.json").read_text()
    assert main([*call, "--budget", "0.1", "--score", "recall"]) == 1
    assert len(measured) == 3
    assert (tmp_path / "heads.json").read_text() != first
    assert main([*call, "--last-n", "100"]) == 2
    error = capsys.readouterr().err
    assert "is of a search with another last_n; choose another folder, or remove it" in error
    (tmp_path / "progress/prompt-0.json").write_text('{"settings": ')
    assert main(call) == 2
    assert "prompt-0.json holds no results of a search" in capsys.readouterr().err


def test_a_kill_keeps_what_is_done(model: Path, prompts: Path, tmp_path: Path) -> None:
    """The published candidates, which take longer."""
    command = ["search", str(model), "--prompts", str(prompts), "--output", str(tmp_path), "--budget", "0.7"]
    run = [sys.executable, "-m", "vllm_trimix.cli.main", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(run, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "progress/prompt-0.json"
    try:
        deadline = time.monotonic() + 240
        while not first.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    before = json.loads(first.read_text())["results"]
    assert before
    assert not (tmp_path / "heads.json").exists()
    assert main(command) in (0, 1)
    after = json.loads(first.read_text())["results"]
    assert set(after) == {"layer 0", "layer 1"}
    assert {key: after[key] for key in before} == before
    assert (tmp_path / "heads.json").exists()


def test_own_tasks_and_texts(model: Path, candidates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--candidates", str(candidates), "--layers", "0,2", "--budget", "1"]
    command = ["search", str(model), "--lengths", "800, 900", "--samples", "1", *flags]
    assert main([*command, "--output", str(tmp_path / "kv")]) == 0
    out, err = capsys.readouterr()
    # The hardest task in the model's own language, which it does.
    assert "2 2_hop, " in err
    assert "right, dense 2; " in out
    assert "the check proves little" not in out
    # Layer 2 is a triangle layer by the preset; searched beside another one, it stays one.
    assert served(out) == {"shallow": {"heads": str(tmp_path / "kv/heads.json"), "layers": "0"}}
    text = tmp_path / "text.txt"
    text.write_text("The vault code of amber is 4821. " * 200)
    command = ["search", str(model), "--prompts", str(text), "--lengths", "300,200", "--last-n", "64", "--chunk", "128"]
    assert main([*command, *flags[:2], "--layers", "2", "--output", str(tmp_path / "text")]) == 0
    out, err = capsys.readouterr()
    assert "2 text, 200-300 tokens" in err
    assert "No prompt has an answer" in out
    # Only triangle layers were searched: they become shallow ones.
    shallow = {"heads": str(tmp_path / "text/heads.json"), "layers": "2", "last_n": 64}
    assert served(out) == {"layers": "", "shallow": shallow}
    assert "in chunks of 128 tokens" in (tmp_path / "text/report.md").read_text()
    assert main([*command, "--lengths", "5000", "--output", str(tmp_path / "long")]) == 2
    assert "--lengths: 5000 tokens: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lengths", "128"], "--lengths: '128' is no length of more than 128 tokens, the last rows that stay dense"),
        (["--lengths", "4096,"], "--lengths: '' is no length"),
        (["--lengths", "700000"], "--lengths: 700000 tokens: the model takes 131072; take shorter prompts"),
        (["--lengths", "200"], "--lengths: 200: tokens: 200 is too short for a 2-hop document"),
        (["--budget", "0"], "--budget: 0.0 is no share of dense attention's keys"),
        (["--head-budget", "nan"], "--head-budget: nan is no share"),
        (["--samples", "0"], "--samples: 0 is too small; the least is 1"),
        (["--tolerance", "nan"], "--tolerance: nan is too small; the least is 0"),
        (["--also", "dense"], "--also: 'dense' is not an adaptive pattern (valid: flexprefill, xattention)"),
        (["--also", "xattention", "--candidates", "x.json"], "name the patterns in the --candidates file instead"),
        (["--layers", "7"], "--layers: '7' is outside this model's 3 layers (0-2)"),
        (["--layers", ""], "--layers: '' names no layer"),
        (["--candidates", "nowhere.json"], "nowhere.json"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--device", "toaster"], "--device: toaster: "),
    ],
)
def test_bad_input(
    model: Path, tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(model), "--output", str(tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_little_memory_and_short_prompts(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", str(model), "--prompts", str(prompts), "--output", str(tmp_path / "out")]
    assert main([*command, "--last-n", "800", "--lengths", "900"]) == 2
    assert "prompt 1 has 800 tokens: all its rows are among the last 800" in capsys.readouterr().err
    monkeypatch.setattr("vllm_trimix.probing.memory.available_bytes", lambda device: 2**20)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "the search needs about 0." in error
    assert "take shorter prompts (--lengths or --prompts)" in error
