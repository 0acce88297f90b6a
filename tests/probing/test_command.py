"""The command from end to end on a circuit model: what it writes, going on after a stop, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_trimix.cli.main import main
from vllm_trimix.config.resolve import resolve
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.prompts import make_demo_prompt
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import gradient

ROOT = Path(__file__).parents[2]
FILES = ["importance.png", "preset.json", "progress.json", "quality.png", "report.md", "scores.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "model"
    make_demo_model(path, CircuitSpec(layers=4, lookup_layer=1, answer_layer=2))
    return path


@pytest.fixture(scope="module")
def prompts(model: Path) -> Path:
    path = model.parent / "prompts.jsonl"
    made = [make_demo_prompt(tokens=800, hops=2, seed=seed) for seed in range(4)]
    path.write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in made))
    return path


def arguments(model: Path, prompts: Path, output: Path) -> list[str]:
    return ["probe", str(model), "--prompts", str(prompts), "--output", str(output), "--random-orders", "1"]


def test_finds_the_layers_and_writes_everything(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(model, prompts, tmp_path), "--method", "both", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert "triangle layers: 0,2-3 (3 of 4)" in out
    assert f'--attention-backend TRIMIX --additional-config \'{{"trimix": {{"preset": "{tmp_path}/preset.json"' in out
    assert "4 prompts of a file, held against right answers; about " in err
    assert "4 file, 800-800 tokens" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    resolved = resolve({"preset": str(tmp_path / "preset.json")}, model="any", num_layers=4)
    assert (resolved.layers, resolved.triangle) == ((0, 2, 3), Triangle())
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["chosen"] == [0, 2, 3]
    assert [layer for layer, row in enumerate(scores["ablation"]) if min(row) > 0.1] == [1]
    assert scores["correlations"]["contribution"] > 0.5
    assert [layer for layer, row in enumerate(scores["ablation_losses"]) if min(row) > 5] == [1]
    assert scores["control"] > 5
    report = (tmp_path / "report.md").read_text()
    assert "**Triangle layers: 0,2-3** (3 of 4)" in report
    assert "| 3 (chosen) |" in report
    assert all(f"({name})" in report for name in ("importance.png", "quality.png"))
    command = report.split("Repeat: `")[1].split("`")[0].split()
    assert command[:3] == ["vllm-trimix", "probe", str(model)]
    assert "--method both" in " ".join(command)


def test_ablation_alone(model: Path, prompts: Path, tmp_path: Path) -> None:
    assert main([*arguments(model, prompts, tmp_path), "--method", "ablation"]) == 0
    preset = json.loads((tmp_path / "preset.json").read_text())
    assert preset["layers"] == "0,2-3"
    assert "least divergence with that layer alone in triangle" in preset["provenance"]["source"]
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] is None


def test_goes_on_where_it_was(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, done = gradient.score_sample, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr("vllm_trimix.probing.probe.score_sample", counted)
    assert main(arguments(model, prompts, tmp_path)) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]
    passes = json.loads((tmp_path / "progress.json").read_text())["results"]["passes"]
    done.clear()
    # One of two samples is done: one call is left, and a second would be an interrupt.
    assert main(arguments(model, prompts, tmp_path)) == 0
    assert len(done) == 1
    # All is done: the same call only writes again.
    done.append(1)
    assert main(arguments(model, prompts, tmp_path)) == 0
    # Times are those of the first call: nothing is timed anew that was only read.
    assert json.loads((tmp_path / "progress.json").read_text())["results"]["passes"] == passes
    capsys.readouterr()
    assert main([*arguments(model, prompts, tmp_path), "--score", "gradient", "--last-n", "100"]) == 2
    error = capsys.readouterr().err
    assert "is of a probe with another pattern, score; choose another folder, or remove it" in error


def test_ctrl_c_keeps_what_is_done(model: Path, prompts: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_trimix.cli.main", *arguments(model, prompts, tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "progress.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert json.loads((tmp_path / "progress.json").read_text())["results"]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--length", "600"],
            "--lengths: the triangle hides nothing up to 648 tokens (n_init + n_local + last_n), got 600",
        ),
        (["--lengths", "2048,8k"], "--lengths: '8k' is no number of tokens; write e.g. 2048,8192"),
        (["--lengths", "2048,600"], "--lengths: the triangle hides nothing up to 648 tokens"),
        (["--samples", "1"], "--samples: 1 is too small; the least is 2"),
        (["--scored", "1"], "--scored: 1 is too small; the least is 2"),
        (["--time-budget", "0"], "--time-budget: 0 minutes is no time; choose more than 0"),
        (["--time-budget", "nan"], "--time-budget: nan minutes is no time"),
        (["--documents", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "a.jsonl", "--documents", "b.txt"], "--prompts: a.jsonl brings prompts of its own; leave out"),
        (["--prompts", "a.jsonl", "--lengths", "2048"], "leave out --lengths"),
        (["--n-local", "0"], "--n-local: 0 is too small; the least is 1"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--device", "cuda"], "--device: cuda: this torch sees no CUDA device; use cpu"),
        (["--device", "toaster"], "--device: toaster: "),
        (["--length", "700000"], "--lengths: 700000 tokens: the model takes 131072; take shorter prompts"),
    ],
)
def test_bad_input(
    model: Path, tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", str(model), "--output", str(tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_too_little_memory(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm_trimix.probing.memory.available_bytes", lambda device: 2**20)
    assert main(arguments(model, prompts, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "the probe needs about 0.0 GiB on cpu for 80" in error or "the probe needs about 0.1 GiB on cpu" in error
    assert "take shorter prompts (--lengths)" in error


def test_too_few_prompts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}')
    assert main(arguments(model, path, tmp_path / "out")) == 2
    assert "1 prompts: two to score and two held out" in capsys.readouterr().err


def test_own_language(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The package's own models are asked what they can read: two hops need the lookup layer, which stays dense."""
    command = ["probe", str(model), "--lengths", "900,1000", "--samples", "4", "--scored", "2", "--random-orders", "0"]
    assert main([*command, "--output", str(tmp_path), "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert "1_hop, 2_hop, held against right answers" in err
    asked = [
        f"{hops}_hop {count} of {count} at {length} tokens"
        for length, count in ((900, 4), (1000, 2))
        for hops in (1, 2)
    ]
    assert f"Asked densely: {', '.join(asked)}." in out
    assert json.loads((tmp_path / "preset.json").read_text())["layers"] == "0,2-3"
    tried = json.loads((tmp_path / "scores.json").read_text())["tried"]
    assert [item["length"] for item in tried] == [900, 1000]
    assert "This holds at 900 and 1000 tokens; nothing longer was asked" in out
    # One layer more is the lookup layer: on the prompts that ranked it lost everything.
    curve = json.loads((tmp_path / "scores.json").read_text())["curve"]["gradient"]
    assert curve["3"] < 0.001
    assert curve["4"] > 5


def test_nothing_proven_nothing_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts that the model can't read: its own answer to them is the same whatever is hidden."""
    prompts = tmp_path / "prompts.jsonl"
    foreign = [
        {"prompt": f"Nobody here speaks that language, number {index}. " * 120, "answer": "4821"} for index in range(4)
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in foreign))
    output = tmp_path / "out"
    output.mkdir()
    (output / "preset.json").write_text("{}")
    assert main(arguments(model, prompts, output)) == 1
    out = capsys.readouterr().out
    assert "Asked densely: file 0 of 2 at " in out
    assert "No task is solved: the reference is the model's own dense answer" in out
    assert "Nothing is proven, so there is no preset" in out
    assert "triangle layers: none (0 of 4)" in out
    assert "vllm serve" not in out
    # Not even one that lay there.
    assert not (output / "preset.json").exists()
    assert "Nothing is proven" in (output / "report.md").read_text()


def test_self_consistency(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without known answers the lookup layer shows as well: dense answers change when it is hidden."""
    made = [make_demo_prompt(tokens=800, hops=2, seed=seed).prompt for seed in range(4)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in made))
    command = arguments(model, path, tmp_path / "out")
    assert main(command) == 2
    assert "there is no answer" in capsys.readouterr().err
    assert main([*command, "--self-consistency", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert "held against the model's own dense answers" in err
    assert "losses are divergences from it" in out
    preset = json.loads((tmp_path / "out/preset.json").read_text())
    assert preset["layers"] == "0,2-3"
    assert "answers diverge from the dense ones by at most" in preset["provenance"]["measured"]


def test_documents(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts of records that end anywhere: pieces of them are prompts."""
    paths = [tmp_path / f"{name}.txt" for name in "ab"]
    for number, path in enumerate(paths):
        path.write_text(" ".join(make_demo_prompt(tokens=3000, hops=2, seed=10 * number + s).prompt for s in range(6)))
    command = ["probe", str(model), "--documents", *map(str, paths), "--samples", "4", "--scored", "2"]
    command += ["--random-orders", "0", "--dtype", "float32", "--output", str(tmp_path / "out")]
    assert main([*command, "--lengths", "40000"]) == 2
    assert "--lengths: 40000 tokens: the longest of the --documents has 1" in capsys.readouterr().err
    assert main([*command, "--lengths", "900"]) in (0, 1)
    err = capsys.readouterr().err
    assert "pieces of 2 documents, held against the model's own dense answers" in err
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["reference"] == "own"
    assert (tmp_path / "out/preset.json").exists() is bool(scores["chosen"])


def test_a_hard_time_budget(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["probe", str(model), "--lengths", "900", "--time-budget", "0.001", "--output", str(tmp_path)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--time-budget: 0.001 minutes: even 8 held-out prompts of each length take about " in error
    assert "allow as much, or take shorter --lengths" in error


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert main(["presets", "list"]) == 0
    assert capsys.readouterr().out == listed
    assert "meta-llama/Llama-3.1-8B-Instruct       layers 16-" in listed
    assert all("  " in line and len(line.split("  ")[-1]) > 10 for line in listed.splitlines())
    assert main(["presets", "show", "Qwen/Qwen3-8B"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == "5,7,10,15-35"
    assert main(["presets", "show", "who/knows"]) == 2
    assert "`vllm-trimix probe MODEL` makes one for any model" in capsys.readouterr().err
