"""The stage of served engines: its processes when they fail, its box of seconds, its arithmetic, and real engines."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import served, served_child, served_plan, served_results
from benchmarks.gpu.box import Round, fill
from benchmarks.gpu.report import Report, granted_file, load, save, waiting_file
from benchmarks.gpu.served_engine import Engine, EngineLost
from benchmarks.gpu.served_results import Results, Rule

TOY: dict[str, Any] = {
    "shape": "bench-8l",
    "trimix": {
        "starting_layer": 4,
        "min_prompt_len": 0,
        "n_init": 8,
        "n_local": 64,
        "last_n": 32,
        "shallow": {"pattern": "block_sparse", "top_k": 2, "min_seq_len": 0},
    },
    "chunks": [256, 128],
    "lengths": [512],
    "lengths_of_other_chunks": [512],
    "rounds": 2,
    "stock_length": 512,
    "stock_rounds": 1,
    "decode": {"length": 64, "prompts": 4, "tokens": 8, "repeats": 2},
    "profile": {"length": 512, "step": 1},
    "short": [128],
    "short_repeats": 2,
    "warm_up": 256,
    "cost": [1e-4, 0.0],
    "target_density": 0.11,
    # Many times as fast as bf16 on a CPU without instructions for that.
    "engine": {"enforce_eager": True, "dtype": "float32"},
    "reserve_gib": 0,
    "start_limit": 300,
    "answer_limit": 120,
    "box": 120,
}

# Answers like ``served_child``, from a script of what to do at which question: {"NAME": {"start" | N | MODE: deed}}.
CHILD = """
import json, os, sys, time
answers = os.fdopen(int(sys.argv[-1]), "w", buffering=1)
job = json.loads(sys.stdin.readline())
name = "stock" if job["stock"] else f"trimix_{job['engine']['max_num_batched_tokens']}"
deeds = json.loads(sys.argv[1]).get(name, {})

def do(deed):
    if deed == "die":
        print("(EngineCore) RuntimeError: CUDA error: an illegal memory access was encountered", flush=True)
        os._exit(7)
    if deed == "hang":
        time.sleep(600)
    if deed == "garbage":
        answers.write("half a line of something\\n")
    if deed == "half":
        answers.write('{"ready": 1')
        answers.flush()
        os._exit(3)
    return deed is not None

if not do(deeds.get("start")):
    backends = ["FLASH_ATTN"] if job["stock"] else ["TRIMIX"]
    answers.write(json.dumps({"ready": 1.5, "backends": backends, "chunk": job["engine"]["max_num_batched_tokens"],
                              "kv_tokens": 4096}) + "\\n")
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    if do(deeds.get(str(number)) or deeds.get(asked["mode"])):
        continue
    seconds = {"on": 0.25, "triangle": 0.5}.get(asked["mode"], 1.0) * asked["length"] / 512
    rows = {"opt_out": asked["length"]} if asked["mode"] == "off" else {"triangle": asked["length"] - 32}
    rows["triangle_layer_rows"] = 4 * rows.get("triangle", 0)
    if asked["mode"] == "on":
        rows |= {"dynamic_layer_rows": 4 * rows["triangle"], "keys_read": 10, "keys_causal": 100}
    timed = {"ttft_s": seconds, "vllm_ttft_s": seconds, "between_s": [0.02] * 7}
    answers.write(json.dumps({**timed, "rows": rows}) + "\\n")
"""


def child(deeds: dict[str, dict[str, str]] | None = None) -> list[str]:
    """The command of a child that misbehaves as told."""
    return [sys.executable, "-c", CHILD, json.dumps(deeds or {})]


def make_report(tmp_path: Path, **settings: Any) -> Report:
    """A report whose stage is granted the device, for 100 s, as soon as it asks."""
    path = tmp_path / "served.json"
    settings = {"toy": True, "device": "cpu", "group": None, **TOY, **settings}
    common = {"environment": {"device": "cpu"}, "checks": [], "source": ""}
    save(path, {"stage": "served", "status": "running", "settings": settings, **common})

    def grant() -> None:
        while not waiting_file(path).exists():
            time.sleep(0.01)
        granted_file(path).write_text("100")
        waiting_file(path).unlink()

    threading.Thread(target=grant, daemon=True).start()
    return Report(path)


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deeds: dict[str, dict[str, str]], **settings: Any) -> Any:
    """The stage's result with such children."""
    monkeypatch.setattr(served, "Engine", functools.partial(Engine, command=child(deeds)))
    served.served(make_report(tmp_path, **settings))
    return load(tmp_path / "served.json")


def failures(result: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in result["checks"] if not check["passed"]}


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
    rounds |= {("trimix_128", mode, 512): 2 for mode in served_results.MODES}
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
    script = CHILD.replace(
        'do(deeds.get("start"))', 'do(None if "enforce_eager" in job["engine"] else deeds.get("start"))'
    )
    monkeypatch.setattr(sys.modules[__name__], "CHILD", script)
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
        *(("trimix_128", each) for each in served_results.MODES),
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

    monkeypatch.setattr(served_child, "install_ranges", refuse)
    found = served_child.profile(Idle(), stock=False, mode="off", length=8, step=1)
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
    monkeypatch.setattr(sys.modules[__name__], "CHILD", CHILD.replace('asked["length"] - 32', 'asked["length"] - 31'))
    monkeypatch.setattr(sys.modules[__name__], "CHILD", CHILD.replace('["FLASH_ATTN"]', '["TRIMIX"]'))
    found = failures(run(tmp_path, monkeypatch, {}))
    assert "stock: backend" in found
    assert "'triangle': 481" in found["trimix_256 triangle 512: rows"]
    assert "trimix_256 off 512: rows" not in found


class Clock:
    """Time that passes only where a round says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rounds_of(clock: Clock, ran: list[str], *each: tuple[str, float, float, int]) -> list[Round]:
    """Rounds by name, estimate, true seconds and how often."""

    def make(name: str, true: float) -> Callable[[int], bool]:
        def run(number: int) -> bool:
            clock.now += true
            ran.append(f"{name}{number}")
            return name != "once"

        return run

    return [Round(name, make(name, true), estimate, most) for name, estimate, true, most in each]


def test_the_box_runs_everything_once_then_again_while_it_fits() -> None:
    clock, ran = Clock(), []
    rounds = rounds_of(clock, ran, ("a", 20, 21, 9), ("b", 5, 3, 2), ("c", 10, 10, 9), ("once", 1, 1, 9))
    assert fill(rounds, 100, clock=clock) == []
    # 35 seconds, then 34 more; a third "a" ends at 90, and a third "c" just fits.
    assert ran == ["a0", "b0", "c0", "once0", "a1", "b1", "c1", "a2", "c2"]
    assert clock.now - 1000 == 100


def test_the_box_leaves_out_what_does_not_fit_and_goes_on_with_what_does() -> None:
    clock, ran = Clock(), []
    rounds = rounds_of(clock, ran, ("a", 20, 30, 1), ("b", 25, 25, 1), ("c", 10, 10, 1))
    assert fill(rounds, 45, clock=clock) == ["b"]
    assert ran == ["a0", "c0"]
    clock, ran = Clock(), []
    assert fill(rounds_of(clock, ran, ("a", 20, 20, 1)), 19, clock=clock) == ["a"]
    assert ran == []


def test_an_estimate_gives_way_to_what_was_measured() -> None:
    clock, ran = Clock(), []
    assert fill(rounds_of(clock, ran, ("a", 90, 10, 9)), 100, clock=clock) == []
    assert ran == [f"a{number}" for number in range(9)]
    clock, ran = Clock(), []
    assert fill(rounds_of(clock, ran, ("a", 10, 60, 9)), 100, clock=clock) == []
    assert ran == ["a0"]


def test_rows_that_are_due() -> None:
    rule = Rule(chunk=256, last_n=32, dense_len=104, triangle_layers=4, pattern_layers=3, block_size=64)
    assert rule.rows("off", 600)["opt_out"] == 600
    assert rule.rows("triangle", 600) == {
        "triangle": 568,
        "opt_out": 0,
        "triangle_layer_rows": 4 * 568,
        "dynamic_layer_rows": 0,
    }
    # The last chunk has 600 - 512 rows, 56 of them before the last 32: less than a tile.
    assert rule.rows("on", 600)["dynamic_layer_rows"] == 3 * 512
    assert rule.rows("on", 620)["dynamic_layer_rows"] == 3 * 588
    assert rule.rows("triangle", 104)["triangle"] == 0


def test_densities_and_targets() -> None:
    assert served_results.density({"keys_read": 10, "keys_causal": 40}) == 0.25
    assert served_results.density({"triangle": 3}) is None
    results = Results()

    def add(engine: str, mode: str | None, seconds: list[float], rows: dict[str, int] | None = None) -> None:
        for number, each in enumerate(seconds):
            results.add(engine, mode, 1024, number, {"ttft_s": each, "vllm_ttft_s": None, "rows": rows or {}})

    add("a", "off", [10.0, 12.0, 11.0])
    add("a", "triangle", [7.0, 8.0, 9.0])
    add("a", "on", [4.0, 4.0], {"keys_read": 12, "keys_causal": 100})
    add("b", "off", [10.0])
    add("b", "triangle", [8.0])

    def found(at_density: float) -> list[Any]:
        reached = served_results.targets(results, ["a", "b"], longest=1024, at_density=at_density, short=[512, 1024])
        return [target["met"] for target in reached]

    # 12 / 8 is the median of the pairs, 11 / 8 that of the medians.
    assert results.speedups("a", "triangle", 1024) == [10 / 7, 12 / 8, 11 / 9]
    assert found(0.2) == [False, True, None, None, True, None]
    # Denser than the promise is made for: nothing is known of it.
    assert found(0.1) == [False, None, None, None, True, None]
    # Stock's own engine: 10 / 9.9, 12 / 11.9 and 11 / 10.9 are within 2%, tokens that come 3% later are not.
    add("stock", None, [9.9, 11.9, 10.9])
    results.between = {"a": [[0.0103] * 3], "stock": [[0.01] * 3]}
    assert found(0.1)[-2:] == [True, False]
    results.between["a"] = [[0.0101] * 3, [0.0103] * 3, [0.0101] * 3]
    assert found(0.1)[-2:] == [True, True]
    results.samples.extend({**each, "ttft_s": 9.0} for each in results.samples[-3:])
    assert found(0.1)[-2:] == [False, True]
    share = served_results.targets(results, ["a", "b"], longest=1024, at_density=1, short=[])[2]["seen"]
    assert share == pytest.approx(1.25 / (10 / 7))


def test_which_engines_fit() -> None:
    settings = {
        **TOY,
        "shape": "llama-3.1-8b",
        "chunks": [8192, 2048],
        "lengths": [131072, 32768],
        "stock_length": 32768,
        "decode": {"length": 1024, "prompts": 16, "tokens": 64},
        "reserve_gib": 10,
    }
    gib = 2**30
    h200 = served_plan.plan_engines(settings, 139 * gib)
    assert list(h200) == ["trimix_8192", "trimix_2048", "stock"]
    # 16.06 GB of weights, 16.5 GiB and 4.5 GiB of keys and values, 4 GiB beside them.
    assert [round(job["bytes"] / gib, 1) for job in h200.values()] == [35.5, 35.5, 23.5]
    assert all(job["max_model_len"] < job["kv"] / (2 * 32 * 8 * 128 * 2) for job in h200.values())
    assert list(served_plan.plan_engines(settings, 90 * gib)) == ["trimix_8192", "trimix_2048"]
    assert list(served_plan.plan_engines(settings, 80 * gib)) == ["trimix_8192"]
    assert list(served_plan.plan_engines(settings, 40 * gib)) == []


def test_stock_is_started_without_the_plugin() -> None:
    job = {"max_model_len": 600, "chunk": 256, "kv": 2**20, "bytes": 0}
    mine, stock = (served_plan.engine_arguments(TOY, name, job, "model") for name in ("trimix_256", "stock"))
    assert mine["additional_config"]["trimix"] == TOY["trimix"]
    assert not stock.keys() & {"attention_backend", "additional_config"}
    assert {key: mine[key] for key in stock} == stock


@pytest.mark.slow
def test_real_engines_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    served.served(make_report(tmp_path))
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
