"""How the GPU run's stages are run, resumed and ended, and what is taken home, on stages that do next to nothing."""

from __future__ import annotations

import json
import signal
import tarfile
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu.report import save
from benchmarks.gpu.running.source import source_digest
from tests.benchmarks.trivial import Trivial


def test_a_failing_stage_stops_nothing(trivial: Trivial) -> None:
    status, out = trivial.run("bad,raises,empty,skips,good")
    assert status == 1, out
    good = trivial.result("good")
    assert (good["status"], good["speed"], good["seen"]) == ("passed", 3, "1 checks passed")
    assert good["checks"] == [{"name": "two and two", "passed": True, "detail": "four"}]
    assert good["settings"] == {"toy": False, "device": "cuda", "group": None, "n": 1}
    assert good["environment"]["versions"] == {"v": "1"}
    assert trivial.result("bad")["status"] == "failed"
    raised = trivial.result("raises")
    assert raised["status"] == "failed"
    assert raised["checks"][-1]["detail"] == "RuntimeError: no device"
    assert "RuntimeError: no device" in (trivial.output / "raises.log").read_text()
    assert trivial.result("empty")["seen"] == "it checked nothing"
    assert trivial.result("skips")["status"] == "skipped"
    summary = (trivial.output / "summary.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line for line in summary if line.startswith("|")}
    assert "| passed |" in rows["good"]
    assert "| failed |" in rows["bad"]
    assert "pipes \\| and lines: seven" in rows["bad"]
    assert rows["bad"].endswith("... |")
    assert "too small a device" in rows["skips"]


@pytest.mark.parametrize("device", ["cuda", "cpu"], ids=["in-turn", "side-by-side"])
def test_only_what_passed_is_not_run_again(trivial: Trivial, device: str) -> None:
    for _ in range(2):
        assert trivial.run("good,bad", device=device)[0] == 1
    assert trivial.ran() == {"good": 1, "bad": 2}
    assert (trivial.output / "bad" / "rounds").exists()
    # Other settings: again, and nothing of the others is continued.
    (trivial.output / "good").mkdir(exist_ok=True)
    (trivial.output / "good" / "stale").touch()
    assert trivial.run("good", "--toy", device=device)[0] == 0
    assert trivial.ran()["good"] == 2
    assert trivial.result("good")["settings"]["n"] == 2
    assert not (trivial.output / "good" / "stale").exists()
    # Another machine's, or another code's, result doesn't count.
    for field, value in (("environment", {"device": device}), ("source", "other")):
        save(trivial.output / "good.json", {**trivial.result("good"), field: value})
        assert trivial.run("good", "--toy", device=device)[0] == 0
    assert trivial.ran()["good"] == 4


def test_half_a_result_is_none(trivial: Trivial) -> None:
    trivial.run("good")
    (trivial.output / "good.json").write_text('{"stage": "good", "stat')
    assert trivial.run("good")[0] == 0
    assert trivial.ran() == {"good": 2}


def test_a_stage_over_its_time_is_ended_with_its_servers(trivial: Trivial) -> None:
    status, out = trivial.run("hangs,good", "--stage-limit=6")
    assert status == 1, out
    result = trivial.result("hangs")
    assert (result["status"], result["checks"][0]["detail"]) == ("timeout", "kept")
    assert "ended after 6 s; 1 checks had passed" in result["seen"]
    assert not any(psutil.pid_exists(server) for server in trivial.servers())
    assert trivial.tidied
    assert trivial.result("good")["status"] == "passed"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_an_interrupted_run_leaves_no_process(trivial: Trivial, number: signal.Signals, status: int) -> None:
    process = trivial.start("hangs,good")
    servers = trivial.servers()
    below = psutil.Process(process.pid).children(recursive=True)
    assert all(psutil.pid_exists(server) for server in servers)
    assert len(below) >= 2, "supervisor and stage"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status, out
    assert not any(psutil.pid_exists(server) for server in servers)
    assert trivial.tidied
    assert not any(child.is_running() for child in below)
    assert trivial.result("hangs")["seen"] == "interrupted"
    assert "| hangs | failed |" in (trivial.output / "summary.md").read_text()
    assert not (trivial.output / "good.json").exists()


def test_stages_are_chosen_in_their_order(trivial: Trivial) -> None:
    status, out = trivial.run("good,bad,empty", "--only=empty,good", "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["good", "empty"]
    assert (
        trivial.run("good,bad", "--only=godo")[1]
        == "run_all.sh: error: --only: unknown stage 'godo'; did you mean 'good'?\n"
    )
    assert "names no stage; stages: good, bad" in trivial.run("good,bad", "--only=,")[1]
    assert "unknown stage '12345'; stages: good" in trivial.run("good", "--only=12345")[1]
    assert not trivial.output.exists()


def test_any_changed_source_counts(tmp_path: Path) -> None:
    file = tmp_path / "vllm_trimix" / "kernels" / "one.py"
    file.parent.mkdir(parents=True)
    digests = [source_digest(tmp_path)]
    for path, text in ((file, "a"), (file, "b"), (file.with_name("two.py"), "b")):
        path.write_text(text)
        digests.append(source_digest(tmp_path))
    assert len(set(digests)) == 4


def test_what_is_taken_home_is_renewed_after_each_stage(trivial: Trivial, tmp_path: Path) -> None:
    home = tmp_path / "home"
    process = trivial.start("good,hangs", f"--bundle={home}")
    trivial.servers()
    assert json.loads((home / "results.json").read_text())["stages"]["good"]["status"] == "passed"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert sorted(path.name for path in home.iterdir()) == ["logs.tar.gz", "results.json", "summary.md"]
    found = json.loads((home / "results.json").read_text())
    assert found["stages"]["hangs"]["seen"] == "interrupted"
    assert "| hangs | failed |" in (home / "summary.md").read_text()
    with tarfile.open(home / "logs.tar.gz") as logs:
        assert {"good.log", "hangs.log"} <= set(logs.getnames())


def test_what_was_taken_home_counts_on_the_next_machine(trivial: Trivial, tmp_path: Path) -> None:
    home = tmp_path / "home"
    trivial.run("good,bad", f"--bundle={home}")
    (trivial.output / "good.json").unlink()
    trivial.run("good,bad", f"--resume={home / 'results.json'}")
    assert trivial.ran() == {"good": 1, "bad": 2}
    for text in ("", "[]", '{"stages": [1]}', '{"stages": {"good": 1}}'):
        (home / "results.json").write_text(text)
        status, out = trivial.run("good", f"--resume={home / 'results.json'}")
        assert status == 2
        assert out.startswith(f"run_all.sh: error: --resume: {home / 'results.json'} is not a bundle's results.json")


def test_a_long_log_keeps_its_ends(tmp_path: Path) -> None:
    from benchmarks.gpu.running.bundle import _MOST_LOG_BYTES, _ends

    log = tmp_path / "a.log"
    log.write_bytes(b"first " + bytes(_MOST_LOG_BYTES) + b" last")
    kept = _ends(log)
    assert kept.startswith(b"first ")
    assert kept.endswith(b" last")
    assert b"[11 bytes left out]" in kept


def test_bad_numbers_of_jobs_are_refused(trivial: Trivial) -> None:
    assert trivial.run("good", "--jobs=0")[1] == "run_all.sh: error: --jobs: 0 is below 1, one stage at a time\n"


def test_a_budget_that_is_none_and_a_folder_that_cannot_be_are_refused(trivial: Trivial, tmp_path: Path) -> None:
    assert trivial.run("good", "--budget=0")[1] == (
        "run_all.sh: error: --budget: 0 s is no time; give more than 0, or leave it out\n"
    )
    (tmp_path / "file").touch()
    status, out = trivial.run("good", f"--bundle={tmp_path / 'file' / 'home'}")
    assert status == 2
    assert out.startswith("run_all.sh: error: ")
    assert not (trivial.output / "ran").exists()


def test_a_bundle_that_fails_stops_nothing(trivial: Trivial, tmp_path: Path) -> None:
    home = tmp_path / "home"
    # A folder where a file must go.
    (home / "results.json").mkdir(parents=True)
    (home / "results.json" / "x").touch()
    status, out = trivial.run("good,b1", f"--bundle={home}")
    assert status == 0
    assert trivial.result("good")["status"] == trivial.result("b1")["status"] == "passed"
    assert out.count("--bundle: ") >= 2
