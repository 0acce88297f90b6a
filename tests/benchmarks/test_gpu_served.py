"""The stage of served engines: its processes when they fail, and real engines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.report import load
from benchmarks.gpu.served import child as child_process
from benchmarks.gpu.served import stage
from benchmarks.gpu.served.engine import Engine, EngineLost
from benchmarks.gpu.served.results import MODES
from tests.benchmarks import fake_engines
from tests.benchmarks.fake_engines import child, failures, make_report, run


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("die", "trimix_256 ended with status 7: RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("half", "trimix_256 ended with status 3: it logged nothing"),
        ("garbage", "trimix_256 answered 'half a line of something', which is no JSON object"),
        ("hang", "trimix_256 was not ready within 1 s"),
    ],
)
def test_an_engine_that_does_not_start_says_why(tmp_path: Path, deed: str, said: str) -> None:
    job = {"stock": False, "engine": {"max_num_batched_tokens": 256}}
    command = child({"trimix_256": {"start": deed}})
    with Engine("trimix_256", job, tmp_path / "trimix_256.log", command=command) as engine:
        with pytest.raises(EngineLost) as lost:
            engine.wait_ready(1 if deed == "hang" else 30)
        # It may hold memory of the device: it is gone before the others go on.
        assert engine._process.returncode is not None
    assert str(lost.value) == f"{said}; its log is trimix_256.log"


def test_an_engine_that_ends_between_two_questions(tmp_path: Path) -> None:
    job = {"stock": False, "engine": {"max_num_batched_tokens": 256}}
    with Engine("e", job, tmp_path / "e.log", command=child()) as engine:
        engine.wait_ready(30)
        assert engine.ask("generate", limit=30, mode="off", length=512)["ttft_s"] == 1.0
        engine._process.kill()
        engine._process.wait()
        with pytest.raises(EngineLost, match="e ended with status -9: it logged nothing"):
            engine.ask("generate", limit=30, mode="off", length=512)


def test_all_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, monkeypatch, {"trimix_256": {}}, profile={"length": 512, "step": 1})
    assert failures(result) == {}
    counted = Counter((each["engine"], each["mode"], each["length"]) for each in result["samples"])
    rounds = dict.fromkeys([("trimix_256", "triangle", 512), ("trimix_256", "on", 512)], 2)
    rounds |= {("trimix_128", mode, 512): 2 for mode in MODES}
    # Beside stock's own engine once more.
    rounds |= {("trimix_256", "off", 512): 3, ("stock", None, 512): 1}
    rounds |= {("trimix_256", mode, 128): 2 for mode in ("off", "triangle")}
    assert counted == rounds
    # The second round asks in the reverse order.
    modes = [each["mode"] for each in result["samples"] if (each["engine"], each["length"]) == ("trimix_128", 512)]
    assert modes == ["off", "triangle", "on", "on", "triangle", "off"]
    assert result["rounds_left_out"] == []
    assert len(result["between_tokens_s"]["stock"]) == len(result["between_tokens_s"]["trimix_256"]) == 2
    assert result["seen"] == (
        "512: stock 1 s, triangle 0.5 s 2.00x, pattern (density 0.10) 0.25 s 4.00x; "
        "trimix_128 512: stock 1 s, triangle 0.5 s 2.00x, pattern (density 0.10) 0.25 s 4.00x; "
        "opted out as fast as stock's engine (1.000 at 512); between tokens 20.00 ms, stock 20.00 (1.000)"
    )
    assert [target["met"] for target in result["targets"]] == [True, True, None, True, True, True]
    assert result["engines"]["trimix_128"]["first_prompt_s"] == {"off": 0.5, "triangle": 0.25, "on": 0.125}


@pytest.mark.parametrize(
    ("deeds", "failed", "asked"),
    [
        # Warm-ups are three questions of an engine; the fifth of this one is the first round's second.
        ({"trimix_256": {"4": "die"}}, "trimix_256 ended with status 7", {"trimix_256", "trimix_128", "stock"}),
        ({"trimix_256": {"4": "garbage"}}, "trimix_256 answered 'half a line", {"trimix_256", "trimix_128", "stock"}),
        ({"trimix_256": {"4": "hang"}}, "trimix_256 did not answer within 2 s", {"trimix_256", "trimix_128", "stock"}),
        ({"trimix_128": {"start": "die"}}, "trimix_128 ended with status 7", {"trimix_256", "stock"}),
        ({"trimix_256": {"start": "die"}}, "trimix_256 ended with status 7", {"trimix_128", "stock"}),
        ({"stock": {"0": "die"}}, "stock ended with status 7", {"trimix_256", "trimix_128"}),
    ],
)
def test_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deeds: dict[str, dict[str, str]], failed: str, asked: set[str]
) -> None:
    result = run(tmp_path, monkeypatch, deeds, answer_limit=2)
    lost = next(iter(deeds))
    found = failures(result)
    assert set(found) == {f"{lost} answers"}
    assert found[f"{lost} answers"].startswith(failed)
    assert {each["engine"] for each in result["samples"]} == asked
    assert result["samples"][0]["ttft_s"] == 1.0
    assert "512: stock 1 s" in result["seen"]
    # A round in which an engine was lost does not come again, the others do.
    if lost == "trimix_256" and "start" not in deeds[lost]:
        assert result["rounds_cut_short"] == ["trimix_256 512", "stock", "decode", "profile", "short"]
        assert sum(each["engine"] == "trimix_128" for each in result["samples"]) == 6


def test_what_does_not_start_is_started_once_more_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine can't compile must not cost every figure."""
    script = fake_engines.CHILD.replace(
        'do(deeds.get("start"))', 'do(None if "enforce_eager" in job["engine"] else deeds.get("start"))'
    )
    monkeypatch.setattr(fake_engines, "CHILD", script)
    result = run(tmp_path, monkeypatch, {"trimix_256": {"start": "die"}}, engine={"dtype": "float32"})
    assert list(failures(result)) == ["trimix_256 starts compiled"]
    assert failures(result)["trimix_256 starts compiled"].endswith("it is started again, eagerly")
    assert {each["engine"] for each in result["samples"]} == {"trimix_256", "trimix_128", "stock"}
    assert {path.name for path in (tmp_path / "served").glob("trimix_256*.log")} == {
        "trimix_256.log",
        "trimix_256_eager.log",
    }


@pytest.mark.parametrize(("mode", "left"), [("on", ["off", "triangle"]), ("triangle", ["off"])])
def test_a_mode_that_ends_an_engine_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, left: list[str]
) -> None:
    result = run(tmp_path, monkeypatch, {"trimix_256": {mode: "die"}})
    assert list(failures(result)) == [f"trimix_256 answers {mode}"]
    assert failures(result)[f"trimix_256 answers {mode}"].endswith(f"started again, for {', '.join(left)} alone")
    asked = {(each["engine"], each["mode"]) for each in result["samples"]}
    assert asked == {
        *(("trimix_256", each) for each in left),
        *(("trimix_128", each) for each in MODES),
        ("stock", None),
    }
    assert list(result["profiles"]) == left
    assert len(result["between_tokens_s"]["trimix_256"]) == 2
    assert (tmp_path / "served" / "trimix_256_again.log").exists()


def test_a_profiler_that_fails_costs_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(engine: Any, *, stock: bool) -> None:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    class Idle:
        def has_unfinished_requests(self) -> bool:
            return False

    monkeypatch.setattr(child_process, "install_ranges", refuse)
    found = child_process.profile(Idle(), stock=False, mode="off", length=8, step=1)
    assert found == {"failed": "RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"}


def test_an_engine_that_starts_in_no_way_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, monkeypatch, {"trimix_256": {"start": "die"}}, engine={"dtype": "float32"})
    assert list(failures(result)) == ["trimix_256 starts compiled", "trimix_256 answers"]
    assert {each["engine"] for each in result["samples"]} == {"trimix_128", "stock"}


def test_no_engine_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deeds = {name: {"start": "die"} for name in ("trimix_256", "trimix_128", "stock")}
    result = run(tmp_path, monkeypatch, deeds)
    assert len(failures(result)) == 3
    assert result["rounds_left_out"] == ["every round"]


def test_a_wrong_count_and_a_wrong_backend_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fake_engines, "CHILD", fake_engines.CHILD.replace('asked["length"] - 32', 'asked["length"] - 31')
    )
    monkeypatch.setattr(fake_engines, "CHILD", fake_engines.CHILD.replace('["FLASH_ATTN"]', '["TRIMIX"]'))
    found = failures(run(tmp_path, monkeypatch, {}))
    assert "stock: backend" in found
    assert "'triangle': 481" in found["trimix_256 triangle 512: rows"]
    assert "trimix_256 off 512: rows" not in found


@pytest.mark.slow
def test_real_engines_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    stage.served(make_report(tmp_path))
    result = load(tmp_path / "served.json")
    assert result is not None
    assert failures(result) == {}
    assert result["rounds_left_out"] == []
    assert {each["engine"] for each in result["samples"]} == {"trimix_256", "trimix_128", "stock"}
    for each in result["samples"]:
        # vLLM's clock starts when the request is handed in.
        assert 0 < each["vllm_ttft_s"] <= each["ttft_s"]
        assert (each["density"] is not None) == (each["mode"] == "on")
        assert each["density"] is None or 0 < each["density"] < 1
    assert all(len(times) == 7 for engine in result["between_tokens_s"].values() for times in engine)
    for mode, profile in result["profiles"].items():
        assert profile["steps"] == 1
        assert sum(profile["seconds"].values()) == pytest.approx(profile["window_s"])
        assert (profile["seconds"]["triangle body"] > 0) == (mode == "triangle")
        assert len(profile["kernels"]) == 12
    assert result["device_seconds"] > 0
