"""Failures come early and leave nothing behind that is in the way; bars count what they say."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.evaluation import test_run, tokenizers
from tests.evaluation.test_command import said
from vllm_trimix.cli import hf_model
from vllm_trimix.evaluation import askers, lm_eval_ruler, markdown
from vllm_trimix.evaluation.answers import Answers
from vllm_trimix.evaluation.askers import Lost
from vllm_trimix.evaluation.prompts import Prompts
from vllm_trimix.evaluation.run import Outcome, run
from vllm_trimix.evaluation.sample import Measure, Sample
from vllm_trimix.evaluation.suite import Context, MakeSamples, Unavailable
from vllm_trimix.evaluation.suites.niah import NIAH

ABOUT = test_run.ABOUT


def counted(made: list[str], make: MakeSamples = test_run.easy) -> MakeSamples:
    def makes(context: Context, length: int, count: int) -> list[Sample]:
        made.append(f"{length}")
        samples = make(context, length, count)
        for number, _ in enumerate(samples, start=1):
            context.made(number)
        return samples

    return makes


def go(
    folder: Path,
    tasks: dict[str, MakeSamples],
    start: Callable[[Any], Any],
    *,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    about: dict[str, Any] = ABOUT,
    max_answer_tokens: int | None = None,
) -> tuple[Outcome, Answers]:
    prompts = Prompts(tasks, Context(None), lengths=(64, 128, 256), count=4, max_answer_tokens=max_answer_tokens)
    answers = Answers(folder, about)
    configurations = (test_run.STOCK, test_run.SPARSE)
    return run(configurations, prompts, answers, start=start, concurrency=3, progress=progress), answers


def test_the_engine_starts_before_the_other_prompts_are_made(tmp_path: Path) -> None:
    """What is wrong with a model or a flag shows within seconds, not after minutes of making prompts."""
    made: list[str] = []

    def refuses(_: Any) -> Any:
        raise ValueError("engine flags: no")

    with pytest.raises(ValueError, match="engine flags: no"):
        go(tmp_path / "out", {"easy": counted(made)}, refuses)
    assert made == ["64"]
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_ready_ends_if_prompts_fail(tmp_path: Path) -> None:
    ended = []

    class Ready(test_run.Oracle):
        def __exit__(self, *what: object) -> None:
            ended.append(what[0])

    def short(context: Context, length: int, count: int) -> list[Sample]:
        if length > 64:
            raise ValueError("the text is too short")
        return test_run.easy(context, length, count)

    with pytest.raises(ValueError, match="the text is too short"):
        go(tmp_path, {"easy": short}, lambda configuration: Ready(configuration, [], (), None))
    assert ended == [ValueError]


def test_no_engine_starts_twice_or_in_vain(tmp_path: Path) -> None:
    asked: list[str] = []
    started: list[str] = []

    def start(configuration: Any) -> Any:
        started.append(configuration.name)
        return test_run.Oracle(configuration, asked, (), None)

    go(tmp_path, {"far": test_run.missing, "easy": test_run.easy}, start)
    assert started == ["stock", "trimix"]
    go(tmp_path, {"easy": test_run.easy}, start)
    assert started == ["stock", "trimix"]
    outcome, _ = go(tmp_path / "nothing", {"far": test_run.missing}, start)
    assert outcome.samples == {}
    assert started == ["stock", "trimix"]


def test_the_bar_counts_prompts(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(name: str, done: int, total: int) -> None:
        if name == "making prompts":
            seen.append((done, total))

    def fewer(context: Context, length: int, count: int) -> list[Sample]:
        return test_run.easy(context, length, 3)

    tasks = {"easy": counted([]), "fewer": counted([], fewer), "far": test_run.missing}
    go(tmp_path, tasks, lambda configuration: test_run.Oracle(configuration, [], (), None), progress=progress)
    done = [count for count, _ in seen]
    assert sorted(set(done)) == list(range(3 * (4 + 3) + 1))
    assert done == sorted(done)
    assert seen[0] == (0, 3 * 3 * 4)
    assert seen[-1] == (21, 21)


def test_every_prompt_of_a_suite_is_counted() -> None:
    made: list[int] = []
    context = Context(tokenizers.english(), depths=(0.0, 0.5), made=made.append)
    samples = NIAH.tasks["english"]["needle"](context, 600, 3)
    assert made == list(range(1, len(samples) + 1)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("task", ["niah_single_1", "vt", "cwe", "fwe"])
def test_every_prompt_of_lm_eval_is_counted(task: str) -> None:
    try:
        lm_eval_ruler.check_installed()
    except Unavailable as error:
        pytest.skip(str(error))
    made: list[int] = []
    context = Context(tokenizers.english(max_length=10**9), made=made.append)
    lm_eval_ruler.samples(context, task, 3000, 3)
    assert made[-3:] == [1, 2, 3]
    assert set(made) == {1, 2, 3}


def test_bars_follow_a_total_that_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with hf_model.Bars("prompt") as bars:
        for done, total in ((0, 12), (4, 12), (4, 7), (7, 7)):
            bars.update("making prompts", done, total)
        bars.update("stock", 0, 7)
    assert "making prompts: 100%|" in capsys.readouterr().err


def test_an_answer_may_have_more_room(tmp_path: Path) -> None:
    prompts = Prompts({"easy": test_run.easy}, Context(None), lengths=(64,), count=2, max_answer_tokens=500)
    (cell,) = prompts.cells()
    # The prompts are the same.
    plain = Prompts({"easy": test_run.easy}, Context(None), lengths=(64,), count=2).samples(cell)
    assert [sample.max_tokens for sample in prompts.samples(cell)] == [500, 500]
    assert [sample.prompt for sample in prompts.samples(cell)] == [sample.prompt for sample in plain]
    fewer = Prompts({"easy": test_run.easy}, Context(None), lengths=(64,), count=2, max_answer_tokens=8).samples(cell)
    assert [sample.max_tokens for sample in fewer] == [32, 32]


def test_scores_are_of_what_follows_the_thought() -> None:
    sample = Sample("a", 64, 0, (1, 2), ("seven",))
    thinking = dataclasses.replace(sample, thought_end="</think>")
    assert sample.spoken("seven? no") == "seven? no"
    assert thinking.spoken("is it seven?</think> No: eight.") == " No: eight."
    assert thinking.spoken("is it seven?") == ""
    assert sample.digest != thinking.digest
    prompts = Prompts({"easy": test_run.easy}, Context(None, thought_end="</t>"), lengths=(64,), count=1)
    (found,) = prompts.samples(next(prompts.cells()))
    assert (found.thought_end, found.measure) == ("</t>", Measure.ANSWER)


FAILED = {"kind": "evaluation", "engine flags": ["--no-such"]}


@pytest.mark.parametrize("left", ["nothing", "header", "facts", "errors"])
def test_a_failure_without_answers_is_in_nobodys_way(left: str, tmp_path: Path) -> None:
    """Whatever it left, also in the form of earlier releases."""
    lines = [json.dumps(FAILED)]
    if left == "facts":
        lines.append(json.dumps({"configuration": "stock", "facts": {"resolved": None}}))
    if left == "errors":

        def dies(configuration: Any) -> Any:
            return test_run.Oracle(configuration, [], (), dies_at=0)

        go(tmp_path, {"easy": test_run.easy}, dies, about=FAILED)
    elif left != "nothing":
        (tmp_path / "answers.jsonl").write_text("".join(f"{line}\n" for line in lines))
    asked: list[str] = []
    outcome, answers = go(
        tmp_path, {"easy": test_run.easy}, lambda configuration: test_run.Oracle(configuration, asked, (), None)
    )
    assert len(asked) == len(list(answers)) == 24
    assert outcome.failures == {}
    assert json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0]) == ABOUT
    assert len(list(Answers(tmp_path, ABOUT))) == 24
    # Answers are never mixed.
    with pytest.raises(ValueError, match="of an evaluation with another engine flags"):
        Answers(tmp_path, FAILED)


def test_other_settings_after_a_failure(tmp_path: Path) -> None:
    """An entry that fails may be corrected under its name."""

    def start(configuration: Any) -> Any:
        if configuration.entry is not None:
            raise Lost("out of memory")
        return test_run.Oracle(configuration, [], (), None)

    outcome, _ = go(tmp_path, {"easy": test_run.easy}, start)
    assert outcome.failures == {"trimix": "out of memory"}
    Answers(tmp_path, ABOUT).check_settings("trimix", "of another entry")


def test_engine_flags_may_be_corrected(circuit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(askers, "_ENGINE", "no.such.module")
    arguments = ["eval", "ruler", str(circuit), "--lengths", "1000", "--samples", "1", "--output", str(tmp_path / "o")]
    for flags in (["--", "--enforce-eager"], ["--", "--no-such-flag"], []):
        status, line = said([*arguments, *flags])
        assert (status, line.partition(" (status")[0]) == (1, "the engine ended")
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", [["eval", "ruler"], ["probe"], ["search"]], ids=lambda command: command[0])
def test_what_would_fail_at_the_end_fails_first(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is even looked for."""
    (tmp_path / "file").write_text("")
    status, line = said([*command, "no/model", "--output", str(tmp_path / "file" / "out")])
    assert (status, line) == (2, f"--output: {tmp_path / 'file'} is no folder; name another one")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    status, line = said([*command, "no/model", "--output", str(tmp_path / "out")])
    assert status == 2
    extra = "eval" if command[0] == "eval" else "probe"
    assert line == f"this command needs matplotlib, not installed here: pip install 'vllm-trimix[{extra}]'"


@pytest.mark.parametrize("command", [["eval", "ruler"], ["calibrate"]], ids=lambda command: command[0])
def test_vllm_is_missed_before_prompts_are_made(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
    assert said([*command, "no/model"]) == (
        2,
        "this command needs vllm, not installed here: for vllm see Install in the README",
    )


def test_nothing_to_ask_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(askers, "_ENGINE", "no.such.module")
    LlamaConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=64).save_pretrained(tmp_path / "model")
    tokenizers.english().save_pretrained(tmp_path / "model")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    layers = ["--trimix", '{"starting_layer": 1}', "--lengths", "1024", "--output", str(tmp_path / "out")]
    status, line = said(["eval", "ruler", str(tmp_path / "model"), "--tasks", "vt,cwe", *layers])
    assert status == 2
    assert line.startswith("none of vt, cwe can be asked here: RULER's tasks need lm_eval")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["probe", "search"])
def test_a_model_without_weights_is_told_before_prompts_are_made(command: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    status, line = said([command, str(tmp_path), "--output", str(tmp_path / "out")])
    assert status == 2
    assert line.startswith(f"{tmp_path} holds no weights (*.safetensors, *.bin")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--chat-template-kwargs", '{"a": 1}', "--chat-template"], "the chat template takes no 'a'; it takes "),
        (["--max-answer-tokens", "0"], "'0' is not a whole number above 0"),
        (["--max-answer-tokens", "131072"], "--lengths: 1000 tokens: "),
    ],
)
def test_arguments_of_answers(arguments: list[str], says: str, circuit: Path, tmp_path: Path) -> None:
    small = ["--lengths", "1000", "--samples", "1", "--output", str(tmp_path / "out")]
    status, line = said(["eval", "ruler", str(circuit), *small, *arguments])
    assert status == 2, line
    assert says in line


def test_the_report_says_how_prompts_were_put() -> None:
    assert markdown._turns({}) == markdown._turns({"chat_template": False, "chat_template_kwargs": {}}) == ""
    settings = {"chat_template": True, "chat_template_kwargs": {"thinking": False}, "max_answer_tokens": 512}
    said = '; as a user\'s turn of the chat template with `{"thinking": false}`; up to 512 tokens an answer'
    assert markdown._turns(settings) == said
