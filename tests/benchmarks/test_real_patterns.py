"""Dynamic patterns on pretrained models: what is asked, what is kept of it, and the tables; no such model is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import benchmark_ttft
from benchmarks.real_models import calls, density, pattern_results, pattern_tables, patterns, results
from benchmarks.real_models.evaluate import Setting
from benchmarks.real_models.pattern_tables import Measured
from benchmarks.real_models.plan import GEMMA, SMOLLM2, STAGES
from benchmarks.serving.configurations import configurations
from tests.benchmarks import real_answers
from tests.docs.reading import rows
from vllm_trimix.cli import eval_choices
from vllm_trimix.cli.main import build_parser
from vllm_trimix.config.head_files import write_head_file
from vllm_trimix.config.resolve import resolve
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.prompts import make_demo_prompt
from vllm_trimix.evaluation.statistics import Difference
from vllm_trimix.evaluation.suites.registry import SUITES
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.dense import Dense

HEADS = {SMOLLM2.short: (30, 9), GEMMA.short: (18, 4)}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Gemma's triangle leaves layer 17 dense, and each search has written its head file."""
    preset = tmp_path / "gemma.json"
    preset.write_text('{"layers": "5,11"}')
    found = Setting(tmp_path / "out", Path("models"), Path("texts"), {GEMMA.folder: preset})
    for stage in patterns.stages(found):
        if stage.suite == patterns.SEARCH:
            layers, heads = HEADS[stage.model.short]
            path = patterns.head_file(stage.model, stage.length, found)
            path.parent.mkdir(parents=True)
            write_head_file(path, [(AShape(),) * (heads - 1) + (Dense(),)] * layers, model=None, provenance={})
    return found


def stage_of(setting: Setting, name: str) -> patterns.PatternStage:
    return next(stage for stage in patterns.stages(setting) if stage.name == name)


def test_stages_are_told_apart(setting: Setting) -> None:
    names = [stage.name for stage in [*patterns.stages(setting), *STAGES]]
    assert len(set(names)) == len(names)
    folders = {stage.folder for stage in patterns.stages(setting)}
    assert not folders & {stage.folder for stage in STAGES}
    # A configuration of a name has another size at another length.
    assert len(folders) == len(patterns.stages(setting))
    for model, lengths in patterns.LENGTHS.items():
        mine = [s for s in patterns.stages(setting) if s.model.short == model]
        assert {s.length for s in mine if s.suite == "agreement"} == set(lengths)
        assert [s.priority for s in mine] == sorted(s.priority for s in mine)
        # Entries and figures of a length need its head file.
        assert all(s.suite == patterns.SEARCH for s in [next(s for s in mine if s.length == n) for n in lengths])


def test_the_commands_take_every_stage(setting: Setting) -> None:
    timed: list[str] = []
    for stage in patterns.stages(setting):
        words = patterns.command(stage, stage.tasks, setting)
        if stage.suite == patterns.SEARCH:
            args = build_parser("search")[0].parse_args(words)
            assert args.output / "heads.json" == patterns.head_file(stage.model, stage.length, setting)
        elif stage.suite == patterns.DENSITY:
            assert words[0] == "benchmarks.real_models.density"
            assert words[words.index("--heads") + 1] == str(patterns.head_file(stage.model, stage.length, setting))
        elif stage.suite == patterns.TTFT:
            args = benchmark_ttft.build_parser().parse_args(words[1:])
            compared = configurations(args.trimix, args.config, ideal=False)
            assert [c.name for c in compared] == ["stock", "trimix", *stage.tasks]
            timed += stage.tasks if stage.model is SMOLLM2 else []
        else:
            args = build_parser("eval")[0].parse_args(words[: words.index("--")])
            assert eval_choices.suite(args, SUITES)
            of_suite = patterns.needle_names if stage.suite == "niah" else patterns.names
            wanted = of_suite(stage.model, stage.length, setting)
            assert [text.partition("=")[0] for text in args.config] == wanted
            assert stage.configurations == len(wanted) + 2 + stage.noise_floor
        assert stage.seconds(1) > 0
    assert timed == patterns.names(SMOLLM2, 8192, setting)


@pytest.mark.parametrize("model", [SMOLLM2, GEMMA], ids=lambda model: model.short)
def test_every_entry_can_be_served(setting: Setting, model: Any) -> None:
    layers, heads = HEADS[model.short]
    length = max(patterns.LENGTHS[model.short])
    names = patterns.names(model, length, setting)
    assert len(names) == 5 + 6
    for name in names:
        entry = patterns.entry(name, model, length, setting)
        found = resolve(entry, model="m", num_layers=layers, num_heads=heads)
        assert found.min_prompt_len == 0
        assert found.shallow is not None
        assert found.shallow.min_seq_len == 0
        beside = name.startswith("trimix+")
        assert bool(found.layers) is beside
        assert set(found.shallow.layers) | (set(found.layers) if beside else set()) == set(model.layers)
    assert patterns.patterns(length)["vertical_slash"] == {"pattern": "vertical_slash"}
    scaled = patterns.patterns(length)["vertical_slash-scaled"]
    assert scaled["slash_size"] == round(6096 * length / 30000)


def test_what_is_not_there_is_left_out(setting: Setting, tmp_path: Path) -> None:
    whole = replace(setting, presets={}, output=tmp_path / "other")
    # All layers with full attention are in the triangle.
    assert patterns.open_layers(GEMMA, whole) == ()
    assert not [name for name in patterns.names(GEMMA, 16384, whole) if name.startswith("trimix+")]
    words = patterns.command(stage_of(whole, "gemma-patterns-niah-16k"), (), whole)
    assert not [word for word in words if word.startswith("heads=")]
    assert "--heads" not in patterns.command(stage_of(whole, "gemma-patterns-density-16k"), (), whole)


def test_times_are_a_call_of_their_own(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, there in ([], False), (["--times"], True):
        assert patterns.main(["--output", str(setting.output), "--list", *flags]) == 0
        listed = capsys.readouterr().out
        assert ("-ttft-" in listed, "-documents-" in listed) == (there, not there)
    assert patterns.main(["--output", str(setting.output), "--list", "--only", "smollm2-patterns-ttft"]) == 2
    assert "--only: no stage begins with 'smollm2-patterns-ttft'" in capsys.readouterr().err


def test_modules_are_called_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n[[ "$*" != *bad* ]]\n')
    script.chmod(0o755)
    monkeypatch.setattr(calls.sys, "executable", str(script))
    for words in (["a.b", "c"], ["eval", "c"], ["eval", "bad"]):
        assert calls.call(tmp_path, "x", words, seconds=None) == (words[1] == "bad")
        assert calls.is_done(tmp_path, "x", words) is (words[1] != "bad")
    assert (tmp_path / "calls").read_text().splitlines() == [
        *("-m a.b c", "-m vllm_trimix.cli.main eval c", "-m vllm_trimix.cli.main eval bad")
    ]


@pytest.fixture(scope="module")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("circuit")
    make_demo_model(folder, CircuitSpec(layers=3, lookup_layer=1, answer_layer=2))
    (folder / "text.txt").write_text(make_demo_prompt(tokens=1500, hops=1, seed=1).prompt)
    return folder


def test_density_is_measured_once(circuit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = tmp_path / "heads.json"
    config = json.loads((circuit / "config.json").read_text())
    count = config["num_attention_heads"]
    write_head_file(heads, [(AShape(16, 64),) * (count - 1) + (Dense(),)] * 3, model=None, provenance={})
    words = [str(circuit), "--length", "1000", "--samples", "1", "--layers", "1-2", "--heads", str(heads)]
    words += ["--documents", str(circuit / "text.txt"), "--output", str(tmp_path / "out")]
    assert density.main(words) == 0
    path = tmp_path / "out" / density.RESULT
    found = json.loads(path.read_text())
    assert list(found["layers"]) == ["1", "2"]
    for layer in found["layers"].values():
        shares = {name: figures["density"] for name, figures in layer.items()}
        assert set(shares) == {*patterns.patterns(1000), "heads"}
        # At 1000 tokens the published size covers all, the shrunk one doesn't.
        assert shares["vertical_slash"] == 1 > shares["vertical_slash-scaled"] > 0
        narrow = shares["heads"] - 1 / count
        assert 0 < narrow < 0.4 * (count - 1) / count
        assert layer["vertical_slash"]["error"] == pytest.approx(0, abs=1e-5)
    before = path.read_text()
    monkeypatch.setattr(density, "measure_prompt", None)
    assert density.main(words) == 0
    assert path.read_text() == before


def test_density_says_what_is_wrong(circuit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = tmp_path / "heads.json"
    write_head_file(heads, [(AShape(),) * 4, None, None], model=None, provenance={})
    words = [str(circuit), "--length", "1000", "--documents", str(circuit / "text.txt"), "--output", str(tmp_path)]
    assert density.main([*words, "--layers", "9"]) == 1
    assert "--layers" in capsys.readouterr().err
    assert density.main([*words, "--layers", "1-2", "--heads", str(heads)]) == 1
    assert "has no pattern for some of the layers 1-2; search them" in capsys.readouterr().err


def timed(model: str, length: int, ratios: dict[str, tuple[float, float, float]]) -> dict[str, Any]:
    """A result of the time benchmark."""
    rest = {"length": length, "confidence": 0.97, "repeats": 6, "ttft_median_s": 1.0, "density": None, "more": 1}
    found = [
        {"config": n, "ratio_to_stock": m, "ratio_ci95": [low, high], **rest} for n, (m, low, high) in ratios.items()
    ]
    return {"settings": {"model": f"build/{model}"}, "environment": {"cpu": "a CPU"}, "rows": found, "rounds": [1]}


@pytest.fixture
def found(tmp_path: Path) -> dict[str, results.Kept]:
    raw = tmp_path / "raw"
    leans = {"stock": 0, "noise-floor": 1e-4, "trimix": 0.02, "trimix+xattention": 0.03, "xattention": 0.3}
    real_answers.put(raw / "smollm2-patterns-documents-8k", "agreement", real_answers.compared(8192, leans))
    right = {"stock": "r" * 40, "trimix": "r" * 40, "trimix+xattention": "r" * 40, "xattention": "w" * 40}
    real_answers.put(raw / "smollm2-patterns-niah-8k", "niah", real_answers.scored("needle", 8192, right, depth=0.5))
    shares = {str(layer): {"xattention": {"density": layer / 100, "error": 0.0}} for layer in range(30)}
    parts = {
        "smollm2-patterns-density-8k/density.json": {
            "model": SMOLLM2.folder,
            "length": 8192,
            "environment": {"cpu": "another CPU"},
            "layers": shares,
        },
        "smollm2-patterns-ttft-0-8k/result.json": timed(
            SMOLLM2.folder,
            8192 - 64,
            {
                "stock": (1, 1, 1),
                "trimix": (0.8, 0.75, 0.85),
                "trimix+xattention": (0.7, 0.6, 0.79),
                "xattention": (0.5, 0.4, 0.6),
            },
        ),
    }
    for name, content in parts.items():
        (raw / name).parent.mkdir(parents=True)
        (raw / name).write_text(json.dumps(content))
    assert results.write(raw, tmp_path / "kept")[-1] == pattern_results.NAME
    return results.read(tmp_path / "kept")


def test_the_table_has_what_was_measured(found: dict[str, results.Kept]) -> None:
    text = pattern_tables.compared(found)
    assert text.startswith("**SmolLM2-135M-Instruct** at 8192 tokens; noise floor ")
    lines = rows(text)
    assert [line[0] for line in lines] == ["triangle", "triangle + xattention", "xattention"]
    assert [line[3] for line in lines] == ["0.80 (0.75 to 0.85)", "0.70 (0.60 to 0.79)", "0.50 (0.40 to 0.60)"]
    assert [line[5] for line in lines] == ["100", "100", "0"]
    assert lines[0][1:3] == ["", ""]
    assert lines[1][6].startswith("100 to 100: +0.0")
    assert "**" in lines[2][6]


def test_what_is_kept_is_small(found: dict[str, results.Kept]) -> None:
    kept = found[pattern_results.NAME].result
    assert kept["ttft"][0]["length"] == 8192
    assert "more" not in kept["ttft"][0]["rows"][0]
    assert "rounds" not in kept["ttft"][0]
    assert [entry["model"] for entry in kept["density"]] == [SMOLLM2.folder]
    # Where readers of any result look.
    assert kept["environment"] == {"cpu": "a CPU"}


def test_the_choice_loses_no_task(found: dict[str, results.Kept]) -> None:
    [row] = rows(pattern_tables.choice(found))
    # The fastest of all loses the needle, and diverges.
    assert row[:3] == ["SmolLM2-135M-Instruct", "8192", "triangle + xattention"]
    assert row[4] == "0.70 (0.60 to 0.79)"


def test_the_fastest_that_is_sound() -> None:
    cell = {"difference": {"mean": 0.0, "low": -0.1, "high": 0.1}}
    kl = Difference(0.009, 0.0, 0.05)
    base = Measured("trimix", time=(0.8, 0.7, 0.9), kl=kl, tasks={"needle": cell})
    other = Measured("trimix+a_shape", time=(0.6, 0.5, 0.7), kl=kl, tasks={"needle": cell})
    assert pattern_tables.fastest([base, other]) is other
    # Not faster beyond chance; no tasks; not timed; a divergence that is large, or unknown.
    for worse in (
        replace(other, time=(0.75, 0.6, 0.85)),
        replace(other, tasks={}),
        replace(other, time=None),
        replace(other, kl=Difference(0.011, 0.0, 0.05)),
        replace(other, kl=None),
    ):
        assert pattern_tables.fastest([base, worse]) is base
    slow = replace(base, time=(0.97, 0.9, 1.02))
    assert pattern_tables.fastest([slow, replace(other, time=(0.98, 0.97, 0.99))]) is None
    lost = {"needle": {"difference": {"mean": -0.3, "low": -0.5, "high": -0.1}}}
    assert pattern_tables.fastest([replace(base, tasks=lost), replace(other, tasks=lost)]) is None
    assert rows(pattern_tables.choice({})) == []


def test_broken_measurements_are_named(tmp_path: Path) -> None:
    path = tmp_path / "smollm2-patterns-ttft-0-8k" / "result.json"
    path.parent.mkdir()
    for content, says in ("no JSON", "is no JSON"), ("{}", r"holds no times of benchmarks\.benchmark_ttft"):
        path.write_text(content)
        with pytest.raises(ValueError, match=says):
            pattern_results.keep(tmp_path, tmp_path / "kept", "answers.jsonl.gz")
    path.unlink()
    path = tmp_path / "smollm2-patterns-density-8k" / "density.json"
    path.parent.mkdir()
    path.write_text('{"model": "m", "length": 8192, "layers": {}}')
    with pytest.raises(ValueError, match="holds no shares"):
        pattern_results.keep(tmp_path, tmp_path / "kept", "answers.jsonl.gz")
