"""What is asked, what is kept, and what a stopped evaluation asks again; with somebody who answers by formula."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vllm_trimix.config.resolve import resolve
from vllm_trimix.evaluation import ablations, cells, report
from vllm_trimix.evaluation.answers import Answers
from vllm_trimix.evaluation.askers import Lost
from vllm_trimix.evaluation.configurations import Configuration, noise_floor, parse
from vllm_trimix.evaluation.outcome import Evaluation
from vllm_trimix.evaluation.prompts import Prompts
from vllm_trimix.evaluation.run import Outcome, run
from vllm_trimix.evaluation.sample import Measure, Sample
from vllm_trimix.evaluation.suite import Context, Unavailable

STOCK, SPARSE = Configuration("stock", None), Configuration("trimix", {"starting_layer": 2})
ABOUT = {"kind": "evaluation", "model": "m"}


def easy(context: Context, length: int, count: int) -> list[Sample]:
    """Right under every configuration."""
    return [Sample("?", length, i, tuple(range(i, i + length - 40)), (f"code {i}",)) for i in range(count)]


def hard(context: Context, length: int, count: int) -> list[Sample]:
    """Wrong for odd numbers unless the answer is dense."""
    return [dataclasses.replace(sample, prompt=(7, *sample.prompt[1:])) for sample in easy(context, length, count)]


def missing(context: Context, length: int, count: int) -> list[Sample]:
    raise Unavailable("its data needs a network; give --text")


TASKS = {"easy": easy, "hard": hard}


class Oracle:
    """Answers by formula; ``refuses`` names samples, ``dies_at`` is the number of the request."""

    def __init__(self, configuration: Configuration, asked: list[str], refuses: Sequence[str], dies_at: int | None):
        self.configuration, self.asked, self.refuses, self.dies_at = configuration, asked, refuses, dies_at
        self.facts: dict[str, Any] = {"resolved": None, "hardware": "oracle"}

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        for sample in samples:
            if self.dies_at is not None and len(self.asked) >= self.dies_at:
                raise Lost("nobody there")
            self.asked.append(f"{self.configuration.name} {sample.name}")
            right = self.configuration.entry is None or sample.task == "easy" or sample.index % 2 == 0
            if sample.name in self.refuses:
                said.append({"error": "HTTP 400: too long"})
            else:
                said.append(
                    {
                        "text": f"Code {sample.index}." if right else "no idea",
                        "seconds": (1.0 + sample.index) * (1.0 if self.configuration.entry is None else 0.25),
                    }
                )
        return said


def evaluate(
    folder: Path,
    *,
    lengths: tuple[int, ...] = (64, 128),
    count: int = 4,
    tasks: dict[str, Any] = TASKS,
    refuses: Sequence[str] = (),
    dies_at: int | None = None,
    about: dict[str, Any] = ABOUT,
    configurations: Sequence[Configuration] = (STOCK, SPARSE),
) -> tuple[Outcome, Answers, list[str], Prompts]:
    asked: list[str] = []
    prompts = Prompts(tasks, Context(None), lengths=lengths, count=count)
    answers = Answers(folder, about)
    outcome = run(
        configurations,
        prompts,
        answers,
        start=lambda configuration: Oracle(configuration, asked, refuses, dies_at),
        concurrency=3,
        progress=lambda *_: None,
    )
    return outcome, answers, asked, prompts


def test_asks_everything_once_and_compares(tmp_path: Path) -> None:
    outcome, answers, asked, _ = evaluate(tmp_path)
    assert len(asked) == len(set(asked)) == 2 * 2 * 2 * 4
    found = {(r.configuration, r.task, r.length): r for r in cells.results(answers, {"stock": None, "trimix": None})}
    assert {r.score for key, r in found.items() if key[:2] != ("trimix", "hard")} == {1.0}
    hard_result = found["trimix", "hard", 128]
    assert hard_result.score == 0.5
    assert hard_result.n == 4
    assert hard_result.difference is not None
    assert hard_result.difference.mean == -0.5
    assert hard_result.ratio == 0.25
    assert hard_result.seconds == 0.25 * 2.5
    assert outcome.failures == {}
    # What ran is known as soon as a configuration is done, to a later call too.
    assert Answers(tmp_path, ABOUT).facts == {
        name: {"resolved": None, "hardware": "oracle"} for name in ("stock", "trimix")
    }


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    evaluate(tmp_path)
    _, _, asked, _ = evaluate(tmp_path)
    assert asked == []
    # More samples and another length: only what is new.
    _, _, asked, _ = evaluate(tmp_path, lengths=(64, 128, 256), count=5)
    assert len(asked) == 2 * 2 * (2 + 5)
    assert not any(name.endswith(("64/0", "128/3")) for name in asked)


def test_another_prompt_of_the_same_name_is_asked_anew(tmp_path: Path) -> None:
    evaluate(tmp_path, tasks={"hard": easy})
    _, answers, asked, _ = evaluate(tmp_path, tasks={"hard": hard})
    assert len(asked) == len(set(asked)) == 2 * 2 * 4
    assert len(list(answers)) == 2 * 2 * 4


def test_perplexity_is_better_when_lower() -> None:
    found = cells.difference(Measure.PERPLEXITY, [2.0, 2.1, 2.2, 2.1], [1.0, 1.1, 1.2, 1.0])
    assert found.mean == pytest.approx(-1.025)
    assert found.verdict == "loss"


def test_goes_on_after_everybody_left(tmp_path: Path) -> None:
    outcome, answers, asked, _ = evaluate(tmp_path, dies_at=7)
    assert set(outcome.failures) == {"stock", "trimix"}
    assert any(answer.error for answer in answers)
    kept = [name for name in asked if not name.endswith("?")]
    outcome, answers, again, _ = evaluate(tmp_path)
    assert not outcome.failures
    assert not any(answer.error for answer in answers)
    # A batch in flight is lost; nothing else is asked again.
    assert len(set(kept) & set(again)) <= 3
    assert len(set(kept) | set(again)) == 32


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    evaluate(tmp_path)
    path = tmp_path / "answers.jsonl"
    facts = path.read_text().splitlines()[-1]
    path.write_text(path.read_text().removesuffix(f"{facts}\n")[:-25])
    _, answers, asked, _ = evaluate(tmp_path)
    assert len(asked) == 1
    assert len(list(answers)) == 32
    assert [json.loads(line) for line in path.read_text().splitlines()]


def test_a_refused_prompt_is_listed_and_left_out_of_both_sides(tmp_path: Path) -> None:
    outcome, answers, _, prompts = evaluate(tmp_path, refuses=["hard/128/0"])
    found = {(r.configuration, r.task, r.length): r for r in cells.results(answers, {"stock": None, "trimix": None})}
    assert found["trimix", "hard", 128].n == 3
    assert found["trimix", "hard", 128].failed == 1
    assert found["trimix", "hard", 128].score == pytest.approx(1 / 3)
    evaluation = make_report(tmp_path, outcome, answers, prompts)
    text = (tmp_path / "report.md").read_text()
    assert "2 prompts have no answer" in text
    assert "HTTP 400: too long" in text
    assert len(evaluation["failed"]) == 2


def test_gives_up_where_everything_fails(tmp_path: Path) -> None:
    names = [f"{task}/{length}/{index}" for task in TASKS for length in (64, 128) for index in range(40)]
    outcome, _, asked, _ = evaluate(tmp_path, refuses=names, count=40)
    assert "in a row failed" in outcome.failures["stock"]
    assert len(asked) < 2 * 15


def make_report(folder: Path, outcome: Outcome, answers: Answers, prompts: Prompts) -> dict[str, Any]:
    results = cells.results(answers, {"stock": None, "trimix": None})
    evaluation = Evaluation(
        suite="mine",
        model="m",
        settings={"samples": 4, "seed": 1, "asked": "an oracle", "concurrency": 1},
        environment={"hardware": "oracle", "versions": {"vllm": "0"}},
        configurations=[STOCK, SPARSE],
        facts={},
        results=results,
        answers=list(answers),
        samples=outcome.samples,
        unavailable=prompts.unavailable,
        notes=prompts.notes,
        failures=outcome.failures,
        command="vllm-trimix eval mine m",
    )
    report.write(folder, evaluation)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_report_names_the_worst_first_and_what_is_missing(tmp_path: Path) -> None:
    outcome, answers, _, prompts = evaluate(tmp_path, count=12, tasks={**TASKS, "far": missing})
    found = make_report(tmp_path, outcome, answers, prompts)
    text = (tmp_path / "report.md").read_text()
    assert "Worst: hard at 64 tokens, -50.0" in text
    assert "**far was left out**: its data needs a network; give --text" in text
    assert "| hard | 128 | 12 | 100.0 | 50.0 | -50.0 (" in text
    assert "| *mean of tasks* | 128 |  | 100.0 | 75.0 | -25.0 (" in text
    assert (tmp_path / "tasks.png").stat().st_size > 5000
    assert found["prompts"]
    assert found["unavailable"] == {"far": "its data needs a network; give --text"}
    verdicts = {(c["task"], c["length"]): c.get("verdict") for c in found["cells"] if c["configuration"] == "trimix"}
    assert verdicts == {
        ("easy", 64): "none seen",
        ("hard", 64): "loss",
        ("easy", 128): "none seen",
        ("hard", 128): "loss",
    }


def test_folder_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    evaluate(tmp_path)
    with pytest.raises(ValueError, match="of an evaluation with another model"):
        evaluate(tmp_path, about={**ABOUT, "model": "other"})
    other = dataclasses.replace(SPARSE, entry={"starting_layer": 3})
    with pytest.raises(ValueError, match="another configuration named 'trimix'"):
        evaluate(tmp_path, configurations=[STOCK, other])
    (tmp_path / "answers.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="holds no answers of an evaluation"):
        evaluate(tmp_path)


def test_a_task_may_not_exceed_its_length(tmp_path: Path) -> None:
    def long(context: Context, length: int, count: int) -> list[Sample]:
        return [Sample("?", length, 0, tuple(range(length)), ("x",))]

    with pytest.raises(ValueError, match="more than 64"):
        evaluate(tmp_path, tasks={"long": long})


def _answer(tokens: Sequence[int], rows: Sequence[Any], name: str) -> Any:
    from vllm_trimix.evaluation.answers import answer_of

    sample = Sample("a", 64, 0, (1, 2), measure=Measure.AGREEMENT)
    return answer_of(name, "s", sample, {"text": "", "tokens": tokens, "likeliest": rows})


def test_agreement_counts_what_both_begin_with(tmp_path: Path) -> None:
    sure = [[5, -0.01], [6, -4.6]]
    dense = _answer([5, 5, 5, 5], [sure] * 4, "stock")
    mine = _answer([5, 5, 6, 5], [sure, sure, [[6, -0.01], [5, -4.6]], sure], "trimix")
    found = {r.configuration: r for r in cells.results([dense, mine], {"stock": None, "trimix": None})}
    assert found["stock"].score == 1.0
    assert found["trimix"].score == 0.5
    assert found["trimix"].kl_first == pytest.approx(0, abs=1e-9)
    # The place where they part still has the same answer before it; the one after it has not.
    assert found["trimix"].kl == pytest.approx((0.99 * 4.59 - 0.01 * 4.59) / 3, rel=0.02)


BASE = ablations.Base(resolve({"layers": "2-7"}, model="m", num_layers=8), able=range(8))


def test_ablations_change_one_thing() -> None:
    entry = {"layers": "2-7", "n_local": 64}
    asked = [
        "last_n=0,32",
        "starting_layer=0,4",
        "num_layers=3",
        "shape",
        "random_layers=0,1",
        "static=a_shape_everywhere",
    ]
    probed = dataclasses.replace(BASE, order=[7, 0, 5, 1, 2, 3, 4, 6])
    made = ablations.configurations(asked, entry, probed)
    found = {c.name: c.entry for c in made}
    assert found["last_n=0"] == {**entry, "last_n": 0}
    assert found["starting_layer=4"] == {"n_local": 64, "starting_layer": 4}
    assert found["num_layers=3"] == {"n_local": 64, "layers": "0,5,7"}
    assert found["shape=last_rows"] == {**entry, "n_init": 0, "n_local": 1}
    assert found["static=a_shape_everywhere"] == {"n_local": 64, "last_n": 0, "starting_layer": 0}
    random_sets = [found[f"random_layers={number}"]["layers"] for number in (0, 1)]  # type: ignore[index]
    assert random_sets[0] != random_sets[1]
    for made_entry in found.values():
        resolved = resolve(made_entry, model="m", num_layers=8)
        assert len(resolved.layers) in (3, 4, 6, 8)
    asked = ["random_layers=" + ",".join(map(str, range(27)))]
    many = ablations.configurations(asked, entry, dataclasses.replace(BASE, seed=3))
    assert len({c.entry["layers"] for c in many if c.entry} - {"2-7"}) == 27
    hybrid = dataclasses.replace(BASE, able=[2, 5, 7])
    made = ablations.configurations(["num_layers=1,2"], entry, hybrid)
    assert [c.entry["layers"] for c in made if c.entry] == ["7", "5,7"]
    fewer = dataclasses.replace(hybrid, resolved=resolve({"layers": "5,6"}, model="m", num_layers=8))
    made = ablations.configurations(["random_layers=0,1"], entry, fewer)
    assert {c.entry["layers"] for c in made if c.entry} == {"2", "7"}
    defaults = ablations.configurations(list(ablations.ABLATIONS), entry, BASE)
    assert {c.ablation for c in defaults} == set(ablations.ABLATIONS)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("lastn", "'lastn' is not an ablation; there are last_n"),
        ("last_n=x", "last_n='x' is not a whole number"),
        ("num_layers=9", "more than the 8 layers"),
        ("random_layers=28", "of the 8 layers that can be triangle layers there are 27 other sets of 6"),
        ("shape=square", "'square' is not known; there are triangle, a_shape"),
    ],
)
def test_bad_ablations(asked: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ablations.configurations([asked], {}, BASE)


def test_configurations(tmp_path: Path) -> None:
    overlay = tmp_path / "mine.json"
    overlay.write_text('{"starting_layer": 3}')
    found = parse(f"trimix,{overlay},stock", {"starting_layer": 2}, ['wide={"n_local": 9}'])
    assert [(c.name, c.entry) for c in found] == [
        ("stock", None),
        ("trimix", {"starting_layer": 2}),
        ("mine", {"preset": str(overlay)}),
        ("wide", {"n_local": 9}),
    ]
    floor = noise_floor(512)
    assert (floor.name, floor.entry, floor.flags) == ("noise-floor", None, ("--max-num-batched-tokens", "512"))
    assert len({floor.settings, noise_floor(256).settings, STOCK.settings}) == 3
    for names, more, says in (
        ("trimix", [], "has no 'stock'"),
        ("stock,nowhere.json", [], "'nowhere.json' is neither"),
        ("stock,stock", [], "'stock' is taken"),
        ("stock", ["a b={}"], "is not NAME=JSON"),
        ("stock", ['x={"n_locl": 3}'], "did you mean 'n_local'"),
    ):
        with pytest.raises(ValueError, match=says):
            parse(names, {}, more)
