"""What the GPU run says of failures: defects put into launches, processes that die, a sanitizer that refuses."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu import sanitizer
from benchmarks.gpu.crew import Crew, Ended, Task
from benchmarks.gpu.report import Report, load, save
from benchmarks.gpu.variants import interpreter_is_sound
from tests.benchmarks.misbehaving import die, misbehave, nothing, pass_slowly, spoilt
from tests.kernels.triton_interpreter import Case, Launch, use_interpreter

pytest.importorskip("triton", reason="the kernels need Triton (Linux)")

# The second span's window starts behind pages that were never written; its last tile has 6 rows.
CASE = Case(((0, 9), (200, 22)), group=3, n_local=50, num_kv_heads=1, n_init=4, tile_rows=8)
HEAD, NOISE = 2, 0.5


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(1, prepare=use_interpreter, sound=interpreter_is_sound) as crew:
        yield crew


def _before(launch: Launch, defect: str) -> None:
    """Defects of what a launch is given."""
    arguments = launch.arguments
    if defect == "window":
        arguments["n_local"] -= 1
    elif defect == "scale":
        arguments["v_scale"] = torch.tensor([1.25])
    elif defect == "reads freed pages":
        # Hidden by the mask, but zero times NaN is NaN.
        begin = arguments["items"][:, 4]
        begin -= torch.where(begin > 100, 64, 0)
    elif defect == "tile":
        arguments["items"] = arguments["items"][:-1]


def _after(launch: Launch, defect: str, launches: int) -> None:
    """Defects of what a launch gives."""
    out = launch.arguments["out"]
    if defect == "head":
        out[:, HEAD] += NOISE
    elif defect == "nan":
        out[launch.places()[1][1] + 5, 1, 40] = torch.nan
    elif defect == "half":
        out[:, :, 32:] *= -1
    elif defect == "race":
        out[launch.places()[0][1]] += launches


def spoiled(defect: str, function: Any, *arguments: Any) -> Any:
    """Calls a function of a worker with a defect in every launch of the triangle kernel."""
    run, launches = Launch.run, iter(range(100))

    def broken(launch: Launch) -> None:
        if not hasattr(launch, "spoiled"):
            _before(launch, defect)
            launch.spoiled = True
        run(launch)
        _after(launch, defect, next(launches))

    with mock.patch.object(Launch, "run", broken):
        return function(*arguments)


def steps(crew: Crew, defect: str, names: list[str]) -> dict[str, Any]:
    from benchmarks.gpu.case_steps import step

    tasks = [Task(name, spoiled, (defect, step, CASE, "cpu", name)) for name in names]
    ended = list(crew.run(tasks, limit=200))
    assert [each.how for each in ended] == ["returned"] * len(names), [each.error for each in ended]
    return {each.task.name: each.value for each in ended}


def line(crew: Crew, defect: str, *names: str) -> str:
    from benchmarks.gpu.case_triage import conclude

    return conclude("over budget", steps(crew, defect, ["look", *names]))


def test_nothing_is_wrong_with_a_right_launch(crew: Crew) -> None:
    found = steps(crew, "", ["look", "clean"])
    assert found["look"]["parts"] == found["look"]["faults"] == []
    assert (found["look"]["unwritten"], found["look"]["second_launch"]) == (0, "the same bits")
    assert found["clean"]["right"]


def test_a_window_that_is_off_by_one(crew: Crew) -> None:
    found = steps(crew, "window", ["look", "reference"])
    # The first span's rows see all keys in any case.
    [part] = found["look"]["parts"]
    assert part["part"] == "22 rows at 200"
    assert (part["first"]["row"], part["first"]["position"], part["first"]["kind"]) == (0, 200, "triangle")
    assert found["reference"]["right"]


def test_a_scale_that_is_applied_twice(crew: Crew) -> None:
    said = line(crew, "scale")
    assert "got is 1.25 times what is expected" in said
    assert "heads" not in said


def test_one_head(crew: Crew) -> None:
    said = line(crew, "head")
    assert f"heads {HEAD} of 3 only" in said
    assert f"first row 0 (position 0, triangle) head {HEAD} dim 0" in said
    assert "rows outside the spans were written" not in said


def test_half_of_the_dims(crew: Crew) -> None:
    said = line(crew, "half")
    assert "dims 32-63 of 64 only" in said
    assert "got is -1 times what is expected" in said


def test_one_value_that_is_no_number(crew: Crew) -> None:
    said = line(crew, "nan", "clean")
    assert "1 values" in said
    assert "first row 5 (position 205, triangle) head 1 dim 40: nan" in said
    assert "1 are NaN" in said
    assert "right when slots" not in said


def test_a_launch_that_reads_freed_pages(crew: Crew) -> None:
    said = line(crew, "reads freed pages", "clean", "reference")
    assert "are NaN" in said
    assert "right when slots that no row may read hold zeros: it reads them" in said
    assert "PyTorch on the device is right with the same inputs: the kernel is wrong" in said


def test_a_tile_that_is_never_written(crew: Crew) -> None:
    # The second span's last tile: rows 16 to 21, three heads of 64.
    said = line(crew, "tile")
    assert f"{6 * 3 * 64} values are never written" in said
    assert "rows 16-21 of 22 only" in said
    assert "whole tiles of 8 rows: 2" in said


def test_two_launches_that_differ(crew: Crew) -> None:
    said = line(crew, "race")
    assert f"two launches differ in {3 * 64} values: a race" in said


def test_inputs_that_are_wrong(crew: Crew) -> None:
    from benchmarks.gpu.case_triage import conclude

    found = crew.run([Task("reference", wrong_inputs, (CASE,))], limit=100)
    [ended] = list(found)
    assert ended.how == "returned", ended.error
    assert "the inputs are wrong" in conclude("over budget", {"reference": ended.value})


def wrong_inputs(case: Case) -> dict[str, Any]:
    from benchmarks.gpu.case_steps import step

    init = Launch.__init__

    def broken(launch: Launch, *arguments: Any) -> None:
        init(launch, *arguments)
        launch.arguments["block_table"] += 1
        launch.arguments["block_table"] %= launch.arguments["k_cache"].shape[0]

    with mock.patch.object(Launch, "__init__", broken):
        return step(case, "cpu", "reference")


def ended(crew: Crew, *defects: str, **limits: Any) -> dict[str, Ended]:
    """Small tasks, each with its defect, by how they ended."""
    return {each.task.name: each for each in crew.run([Task(d, misbehave, (d,)) for d in defects], **limits)}


def test_a_process_that_dies_takes_no_other_task_with_it() -> None:
    with Crew(2, prepare=nothing, sound=nothing) as crew:
        found = ended(crew, "a", "abort", "b", "exit", "c", "hang", "d", limit=2.0)
    assert {name: found[name].how for name in found} == {
        "a": "returned", "b": "returned", "c": "returned", "d": "returned",
        "abort": "died", "exit": "died", "hang": "hung",
    }  # fmt: skip
    assert found["abort"].error == f"its process died, {signal.SIGABRT.name}"
    assert found["exit"].error == "its process died, exit status 77"
    assert found["hang"].error.startswith("stopped after 2 s")


@pytest.mark.parametrize("sound", [nothing, spoilt])
def test_a_spoiled_process_gets_no_further_task(sound: Any) -> None:
    with Crew(1, prepare=nothing, sound=sound) as crew:
        found = ended(crew, "a", "raise", "b", limit=20.0)
    assert found["raise"].how == "raised"
    assert found["raise"].error.startswith("RuntimeError: CUDA error: an illegal memory access")
    assert (found["a"].value == found["b"].value) is (sound is nothing)


def test_what_does_not_fit_in_the_box_is_left_or_cut() -> None:
    with Crew(1, prepare=nothing, sound=nothing) as crew:
        crew.wait()
        until = time.monotonic() + 0.8
        found = ended(crew, "a", "hang", "b", limit=50.0, start_until=until, end_by=until + 0.2)
        assert time.monotonic() - until < 2
        assert [found[name].how for name in ("a", "b", "hang")] == ["returned", "left", "cut"]
        # The crew goes on.
        assert ended(crew, "c", limit=20.0)["c"].how == "returned"


def test_processes_that_never_start_are_no_endless_loop() -> None:
    with (
        pytest.raises(RuntimeError, match="processes died while they started, exit status 3"),
        Crew(1, prepare=die, sound=nothing) as crew,
    ):
        crew.wait()


CLEAN = """========= COMPUTE-SANITIZER
case {case} is right
========= ERROR SUMMARY: 0 errors
"""
INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at triangle_prefill_kernel+0x1a30
=========     by thread (96,0,0) in block (3,0,0)
=========     Access at 0x7f4c1e001000 is out of bounds
========= Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "unspecified launch failure" on CUDA API call.
========= ERROR SUMMARY: 33 errors
"""
HAZARD = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at estimate_kernel+0x9d0
=========     and Read access at estimate_kernel+0xa10 [128 hazards]
case {case} is right
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
========= ERROR SUMMARY: 0 errors
"""
# Of the real tool on a program that uses no GPU, and of a version that runs nothing and calls it clean.
UNSEEN = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
"""
FALSE_PASS = """========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""


@pytest.mark.parametrize(
    ("prints", "tool", "outcome", "sentence"),
    [
        (CLEAN, "memcheck", "clean", "memcheck of gqa4: no error, and the answer is right"),
        (CLEAN.replace("right", "wrong: error 3"), "memcheck", "clean", "no error, though the answer is wrong"),
        (INVALID, "memcheck", "errors", "33 errors, the first: Invalid __global__ read of size 16 bytes"),
        (HAZARD, "racecheck", "errors", "1 errors, the first: Error: Race reported between Write access"),
        (
            CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed"),
            "racecheck",
            "clean",
            "no",
        ),
        (REFUSED, "memcheck", "refused", "it refuses this device: Error: Device not supported."),
        (UNSEEN, "memcheck", "proved nothing", "Target application terminated before first instrumented API call"),
        (FALSE_PASS, "memcheck", "proved nothing", "the case did not run to its end under it"),
        ("", "memcheck", "proved nothing", "it printed nothing"),
    ],
)
def test_what_the_sanitizer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, tool: sanitizer.Tool, outcome: str, sentence: str
) -> None:
    fake_sanitizer(tmp_path, monkeypatch, f"cat <<'END'\n{prints.format(case='gqa4')}END")
    finding = sanitizer.Run("gqa4", tool, 20.0).finish()
    assert finding.outcome == outcome, finding
    assert sentence in finding.sentence
    asked = (tmp_path / "asked").read_text().split("\n")
    assert asked[:2] == ["--tool", tool]
    assert asked[-7:-1] == [sys.executable, "-m", "benchmarks.gpu.one_case", "gqa4", "--device", "cuda"]


def fake_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/asked\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_sanitizer_that_hangs_is_killed_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sanitizer(tmp_path, monkeypatch, f"sleep 60 & echo $! >{tmp_path}/child; echo begun; wait")
    started = time.monotonic()
    finding = sanitizer.Run("gqa4", "memcheck", 1.0).finish()
    assert time.monotonic() - started < 10
    assert (finding.outcome, finding.lines) == ("time ran out", ["begun"])
    assert finding.sentence == "memcheck of gqa4: it had not ended after 1 s"
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_where_the_sanitizer_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer, "_TOOLKIT", tmp_path / "toolkit")
    assert sanitizer.find([str(tmp_path)]) is None
    assert sanitizer.Run("gqa4", "memcheck", 1.0).finish().outcome == "missing"
    for part in ("nvidia/cuda_sanitizer_api/bin", "nvidia/cu13/bin"):
        program = tmp_path / part / "compute-sanitizer"
        program.parent.mkdir(parents=True)
        program.touch()
        assert sanitizer.find([str(tmp_path / "none"), str(tmp_path)]) != str(program), "it is no program"
        program.chmod(0o755)
        assert sanitizer.find([str(tmp_path / "none"), str(tmp_path)]) == str(program)


def make_report(tmp_path: Path, **settings: Any) -> Report:
    path = tmp_path / "kernel_reference.json"
    environment = {"device": "cpu"}
    settings = {"toy": True, "device": "cpu", **settings}
    save(path, {"stage": "", "settings": settings, "environment": environment, "source": "", "checks": [], "seen": ""})
    return Report(path)


SMALL = {
    "fine": CASE,
    "one head": replace(CASE, n_init=3),
    "crashes": replace(CASE, n_init=2),
    "also fine": replace(CASE, n_init=1),
}


def attempted(case: Case, device: str) -> dict[str, Any]:
    """What comes of ``SMALL``; a case that is fine isn't launched."""
    from benchmarks.gpu.case_steps import attempt

    if case == SMALL["crashes"]:
        os.abort()
    if case == SMALL["one head"]:
        return spoiled("head", attempt, case, device)
    return pass_slowly(case, device)


def followed(case: Case, device: str, name: str) -> dict[str, Any]:
    """The first two steps on ``SMALL``."""
    from benchmarks.gpu.case_steps import step

    if name not in ("look", "reference"):
        return {"skipped": "seen above"}
    if case == SMALL["crashes"] and name == "look":
        os.abort()
    return spoiled("head", step, case, device, name)


def test_the_stage_follows_its_failures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import case_triage, kernel_reference

    monkeypatch.setattr(kernel_reference, "attempt", attempted)
    monkeypatch.setattr(kernel_reference, "choose", lambda _: SMALL)
    monkeypatch.setattr(case_triage, "step", followed)
    fake_sanitizer(tmp_path, monkeypatch, f"cat <<'END'\n{REFUSED}END")
    kernel_reference.kernel_reference(make_report(tmp_path, cases=None, triage=120, sanitize=20))
    result = load(tmp_path / "kernel_reference.json")
    assert result is not None
    wrong = {check["name"]: check["detail"] for check in result["checks"] if not check["passed"]}
    assert set(wrong) == {"one head", "crashes", "cases"}
    assert wrong["crashes"] == "its process died, SIGABRT"
    assert wrong["cases"].startswith("2 of 4 cases in the interpreter within the error budget; 0 did not fit, 0 were")
    lines = {each["name"]: each["line"] for each in result["triage"]}
    assert set(lines) == {"one head", "crashes"}
    assert lines["crashes"].startswith("crashes: it ends in its process died, SIGABRT; PyTorch on the device is right")
    assert "heads 2 of 3 only" in lines["one head"]
    assert "PyTorch on the device is right" in lines["one head"]
    assert [each["outcome"] for each in result["sanitizer"]] == ["refused"]
    assert "2 of 4 cases" in result["seen"]
    assert result["device_seconds"] > 0


@pytest.mark.parametrize(("box", "enough"), [(0.3, False), (60.0, True)])
def test_cases_that_the_box_leaves_are_no_failures_but_the_first_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, box: float, enough: bool
) -> None:
    from benchmarks.gpu import kernel_reference

    with Crew(1, prepare=nothing, sound=nothing) as crew:
        # Imports are not to take from the box.
        list(crew.run([Task("", pass_slowly, (None, ""))], limit=60))
        monkeypatch.setattr(kernel_reference, "_crew", lambda *_: crew)
        monkeypatch.setattr(kernel_reference, "attempt", pass_slowly)
        monkeypatch.setattr(kernel_reference, "MUST_RUN", 3)
        cases = dict(list(kernel_reference.first_cases().items())[:4])
        monkeypatch.setattr(kernel_reference, "choose", lambda _: cases)
        kernel_reference.kernel_reference(make_report(tmp_path, cases="ranked", box=box))
    result = load(tmp_path / "kernel_reference.json")
    assert result is not None
    checks = {check["name"]: check["passed"] for check in result["checks"]}
    assert checks == {"cases": True, "first cases": enough}
    assert result["cases_left"] == ([] if enough else list(cases)[1:])
    assert result["cases_passed"] == (4 if enough else 1)


def test_the_ranking() -> None:
    from benchmarks.gpu.kernel_cases import MUST_RUN, SMALLEST, all_cases, choose, first_cases, kernel_of, ranked

    cases = list(ranked().values())
    first = cases[:MUST_RUN]
    assert cases[: len(first_cases())] == list(first_cases().values())
    assert {kernel_of(case) for case in first} == {"triangle", "sparse", "estimate"}
    assert {case.head_size for case in first} == {64, 128, 256}
    assert {case.group for case in first} == {1, 4, 7, 8}
    assert {case.q_dtype for case in first} == {"bfloat16", "float16", "float8_e4m3fn"}
    assert {case.cache_dtype for case in first} == {"", "float8_e4m3fn"}
    assert any(getattr(case, "last_rows", ()) and case.programs for case in first)
    assert {case.order for case in first} == {"BHS", "BSH"}
    assert {case.block_size for case in first if kernel_of(case) == "sparse"} == {64, 128}
    # Each once, those that fill the memory excepted.
    assert {repr(case) for case in cases} == {repr(case) for case in all_cases().values() if not case.huge}
    assert [kernel_of(all_cases()[name]) for name in SMALLEST] == ["triangle", "sparse", "estimate"]
    with pytest.raises(ValueError, match=r"cases: \['gqa5'\] unknown; expected 'ranked', None, or names"):
        choose(["gqa5", "gqa4"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="the truth is Hugging Face's")
    from benchmarks.gpu.small_model import save_small_model

    return save_small_model(tmp_path_factory.mktemp("small"))


# Sinks 4, window 16, last rows 8; chunks of 32 tokens.
PROMPTS = [20, 60, 72]


def served(small: Path, mistake: str, *, only: Any = lambda request: True) -> tuple[list[Any], Any]:
    """A wave, and what an engine with a mistake in some of its requests would have answered."""
    from benchmarks.gpu import triage
    from benchmarks.gpu.small_model import prompts
    from tests.engine.ledger import Chunk
    from tests.engine.models import true_logprobs
    from tests.engine.run import both_ways

    wave, answers, chunks = both_ways(prompts(PROMPTS), max_tokens=3), [], []
    for index, request in enumerate(wave):
        layers, pattern = triage._MISTAKES[mistake] if only(request) else triage._own(request)
        tokens = [7, 8, 9]
        logprobs = true_logprobs(small, request["prompt"], tokens, layers=layers, pattern=pattern)
        answers.append({"tokens": tokens, "logprobs": [value + 1e-6 for value in logprobs]})
        size = len(request["prompt"])
        chunks += [Chunk(index, first, min(32, size - first), 0, 0) for first in range(0, size, 32)]
    return wave, SimpleNamespace(waves=[answers], ledgers=[SimpleNamespace(chunks=chunks)])


def under_triangle(request: dict[str, Any]) -> bool:
    return request["extra_args"] is None


@pytest.mark.parametrize(
    "mistake", ["all rows dense", "without sinks", "without dense last rows", "with a window one key short"]
)
def test_engine_answers_by_a_wrong_rule(tmp_path: Path, small: Path, mistake: str) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, result = served(small, mistake, only=under_triangle)
    said = triage_engine(make_report(tmp_path, runner="v2", graphs=True), "float16", small, wave, result)
    # A prompt of 20 tokens hides nothing but under a shorter window or without last rows.
    assert f"right if computed {mistake}" in said
    assert "0 of them opted out" in said
    assert "request 2 (60 tokens, triangle): token 0 is the first of 3 wrong ones" in said
    saved = load(tmp_path / "kernel_reference.json")
    assert saved is not None
    assert saved["triage_float16"]["graphs"]
    assert saved["triage_float16"]["line"] == said


def test_engine_answers_of_those_that_opted_out(tmp_path: Path, small: Path) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, result = served(small, "masked as if not opted out")
    said = triage_engine(make_report(tmp_path), "x", small, wave, result, budget=1e-4)
    assert "2 of 6 requests are wrong, 2 of them opted out" in said
    assert "right if computed masked as if not opted out" in said


def test_engine_answers_of_straddling_chunks(tmp_path: Path, small: Path) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, result = served(small, "all rows dense", only=lambda r: under_triangle(r) and len(r["prompt"]) == 60)
    said = triage_engine(make_report(tmp_path), "x", small, wave, result)
    # 72 tokens are chunks of 32, 32 and 8: the last rows are a chunk of their own.
    assert "exactly those that are under the triangle with a chunk that straddles the last rows" in said


def test_engine_answers_that_are_no_numbers_from_the_second_token_on(tmp_path: Path, small: Path) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, result = served(small, "all rows dense", only=lambda request: False)
    result.waves[0][4]["logprobs"][1] = float("nan")
    said = triage_engine(make_report(tmp_path), "x", small, wave, result)
    assert "1 of 6 requests are wrong, 0 of them opted out" in said
    assert "request 4 (72 tokens, triangle): token 1 is the first of 1 wrong ones, 1 of 3 are no numbers" in said
    assert "first tokens are right: decode, not prefill" in said


@pytest.mark.parametrize(
    ("right", "graphs", "reruns", "verdict"),
    [
        ({"eager": False, "graphs": True}, True, 2, "alone and eager it is wrong as well"),
        ({"eager": True, "graphs": False}, True, 2, "alone it is right eagerly and wrong with graphs"),
        ({"eager": True, "graphs": True}, True, 2, "right, eagerly and with graphs: only in a batch"),
        ({"eager": True}, True, 1, "alone and eager it is right: only in a batch, or only under graphs"),
        ({"eager": True}, False, 2, "alone and eager it is right: only in a batch"),
        ({}, True, 0, "no engine was started again"),
        ({"eager": None, "graphs": True}, True, 2, "an engine failed: eager: AssertionError: no memory"),
    ],
)
def test_engine_answers_alone(
    tmp_path: Path, small: Path, right: dict[str, bool | None], graphs: bool, reruns: int, verdict: str
) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, wrong = served(small, "all rows dense", only=under_triangle)
    _, fine = served(small, "all rows dense", only=lambda request: False)
    asked = []

    def rerun(requests: list[dict[str, Any]], with_graphs: bool) -> Any:
        way = "graphs" if with_graphs else "eager"
        asked.append(way)
        assert right[way] is not None, "no memory"
        [number] = [index for index, request in enumerate(wave) if [request] == requests]
        assert number == 2, "the shortest that is wrong"
        return SimpleNamespace(waves=[[(fine if right[way] else wrong).waves[0][number]]])

    said = triage_engine(make_report(tmp_path, graphs=graphs, reruns=reruns), "x", small, wave, wrong, rerun=rerun)
    assert asked == list(right)
    assert verdict in said.rsplit("; ", 1)[1]
