"""``vllm-trimix calibrate`` as a user meets it, over an engine whose timings are known."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.calibration.fake_engine import DENSITY, SHALLOW
from vllm_trimix.calibration import break_even, overlay
from vllm_trimix.cli.main import main
from vllm_trimix.config.resolve import resolve

ROOT = Path(__file__).parents[2]
FAKE = "tests.calibration.fake_engine"
LAYERS = '{"layers": "4-7"}'

Calibrate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Calibrate:
    """Runs the command in an empty folder; returns the status, the output and what was said on standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "logs"))
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr("vllm_trimix.cli.calibrate._ENGINE", FAKE)
    monkeypatch.setattr("vllm_trimix.calibration.asking._LOG_SECONDS", 0.5)
    monkeypatch.setattr("vllm_trimix.calibration.asking._SETTLE_SECONDS", 0)

    def run(*argv: str, **how: Any) -> tuple[int, str, str]:
        monkeypatch.setenv("FAKE_ENGINE", json.dumps(how))
        status = main(["calibrate", *argv])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_it_writes_an_overlay_and_says_how_to_use_it(calibrate: Calibrate, tmp_path: Path) -> None:
    flags = ["--dtype", "bfloat16", "--hf-overrides", '{"a": "b c"}']
    status, out, err = calibrate("org/A model", "--trimix", LAYERS, "--max-length", "8192", "--", *flags)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].split() == "tokens dense (s) triangle (s) ratio 95% interval verdict".split()
    table = {int(line.split()[0]): line for line in lines[1:] if line[:7].strip().isdecimal()}
    assert sorted(table) == [512, 1024, 1536, 2048, 4096, 8192]
    assert [table[length].split(maxsplit=5)[-1] for length in sorted(table)] == ["same code", "slower", *["faster"] * 4]
    assert "break-even: 1536 tokens" in out
    assert "refining: 1536 tokens" in err
    assert list((tmp_path / "logs").iterdir()) == []

    file = tmp_path / "trimix-A-model.json"
    overlay = json.loads(file.read_text())
    assert list(overlay) == ["layers", "n_init", "n_local", "last_n", "min_prompt_len", "provenance"]
    provenance = overlay["provenance"]
    assert provenance["source"] == "vllm-trimix calibrate"
    assert provenance["engine_args"] == flags
    assert provenance["ran"] == "layers=4-7 of=8 kernel=fake"
    assert [sample["length"] for sample in provenance["samples"]] == sorted(table)
    assert {len(sample["dense_s"]) for sample in provenance["samples"]} == {break_even.DEFAULT_REPEATS}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    command = shlex.split(lines[-1])
    assert command[:5] == ["vllm", "serve", "org/A model", "--attention-backend", "TRIMIX"]
    assert command[5:-2] == flags
    entry = json.loads(command[-1])["trimix"]
    resolved = resolve(entry, model="org/A model", num_layers=8)
    assert (resolved.layers, resolved.min_prompt_len) == ((4, 5, 6, 7), 1536)
    assert resolved.source == "preset:trimix-A-model.json"


SHALLOW_ENTRY = '{"layers": "4-7", "shallow": {"pattern": "flexprefill", "gamma": 0.9}}'


def test_a_shallow_pattern_has_a_break_even_of_its_own(calibrate: Calibrate, tmp_path: Path) -> None:
    status, out, err = calibrate("m", "--trimix", SHALLOW_ENTRY, "--max-length", "8192", resolved={"shallow": SHALLOW})
    assert status == 0, err
    assert "tokens triangle (s) dynamic (s) ratio 95% interval density verdict" in " ".join(out.split())
    assert "break-even: 1536 tokens. From there on the triangle was not slower than dense at" in out
    dynamic = "From there on flexprefill was not slower than the triangle with dense shallow layers at"
    assert f"break-even: 3072 tokens. {dynamic}" in out
    overlay = json.loads((tmp_path / "trimix-m.json").read_text())
    assert overlay["min_prompt_len"] == 1536
    assert overlay["shallow"] == {"pattern": "flexprefill", "gamma": 0.9, "min_seq_len": 3072}
    provenance = overlay["provenance"]
    assert {"dense_s", "triangle_s"} <= provenance["samples"][0].keys()
    assert {"triangle_s", "dynamic_s"} <= provenance["dynamic_samples"][0].keys()
    assert len(provenance["dynamic_samples"]) > 5
    assert {sample["density"] for sample in provenance["dynamic_samples"]} == {DENSITY}
    entry = json.loads(shlex.split(out.splitlines()[-1])[-1])["trimix"]
    shallow = resolve(entry, model="m", num_layers=8).shallow
    assert shallow is not None
    assert (shallow.label, shallow.layers, shallow.min_seq_len) == ("flexprefill", (0, 1, 2, 3), 3072)
    assert shallow.patterns[0]["gamma"] == 0.9


def test_a_pattern_that_never_pays_is_left_out(calibrate: Calibrate, tmp_path: Path) -> None:
    argv = ["m", "--trimix", SHALLOW_ENTRY, "--max-length", "4096"]
    status, out, err = calibrate(*argv, resolved={"shallow": SHALLOW}, dynamic_crossing=9000)
    assert status == 0, err
    assert out.count("break-even: ") == 1
    warning = "flexprefill has no break-even up to 4096 tokens: the overlay leaves the shallow layers dense"
    assert f"warning: {warning}" in err
    overlay = json.loads((tmp_path / "trimix-m.json").read_text())
    assert (overlay["shallow"], overlay["min_prompt_len"]) == ("dense", 1536)
    assert overlay["provenance"]["warnings"] == [warning]
    # Without the triangle's break-even there is nothing to serve, whatever the pattern gives.
    (tmp_path / "trimix-m.json").unlink()
    status, out, _ = calibrate(*argv, resolved={"shallow": SHALLOW}, crossing=9000)
    assert status == 1
    assert "no break-even up to 4096 tokens: the triangle is not proven" in out
    assert list(tmp_path.glob("*.json")) == []


def test_a_pattern_without_a_triangle_is_compared_with_dense(calibrate: Calibrate, tmp_path: Path) -> None:
    entry = '{"layers": [], "shallow": {"pattern": "flexprefill"}}'
    shallow = {**SHALLOW, "layers": list(range(8))}
    argv = ["m", "--trimix", entry, "--max-length", "8192"]
    status, out, err = calibrate(*argv, resolved={"layers": [], "shallow": shallow}, crossing=0)
    assert status == 0, err
    assert "triangle" not in out
    overlay = json.loads((tmp_path / "trimix-m.json").read_text())
    assert overlay["shallow"] == {"pattern": "flexprefill", "min_seq_len": 1024}
    assert "min_prompt_len" not in overlay
    resolved = resolve({"preset": str(tmp_path / "trimix-m.json")}, model="m", num_layers=8)
    assert resolved.layers == ()
    assert resolved.shallow is not None
    assert resolved.shallow.layers == tuple(range(8))
    status, out, _ = calibrate(*argv, resolved={"layers": [], "shallow": shallow}, crossing=0, dynamic_crossing=90000)
    assert status == 1
    assert "flexprefill is not proven to be as fast as dense there" in out


def test_a_pattern_that_never_runs_measures_nothing(calibrate: Calibrate, tmp_path: Path) -> None:
    status, _, err = calibrate("m", "--trimix", SHALLOW_ENTRY, resolved={"shallow": SHALLOW}, dynamic_rows=False)
    assert status == 2
    assert "no row of a prompt of 512 tokens ran flexprefill" in err
    assert list(tmp_path.glob("*.json")) == []


def test_only_an_earlier_overlay_is_overwritten(calibrate: Calibrate, tmp_path: Path) -> None:
    argv = ["m", "--trimix", LAYERS, "--max-length", "2048", "--output", "o.json"]
    assert calibrate(*argv)[0] == 0
    assert calibrate(*argv, crossing=900)[0] == 0
    assert json.loads((tmp_path / "o.json").read_text())["min_prompt_len"] == 1024
    (tmp_path / "o.json").write_text('{"layers": "1"}')
    status, _, err = calibrate(*argv)
    assert status == 2
    assert "'o.json' exists and is not an overlay of vllm-trimix calibrate; choose another name" in err
    assert (tmp_path / "o.json").read_text() == '{"layers": "1"}'


def test_no_break_even_writes_nothing(calibrate: Calibrate, tmp_path: Path) -> None:
    status, out, _ = calibrate("m", "--trimix", LAYERS, "--max-length", "4096", crossing=9000)
    assert status == 1
    assert "no break-even up to 4096 tokens" in out
    assert list(tmp_path.glob("*.json")) == []


def test_few_repeats_say_what_they_are_worth(calibrate: Calibrate, tmp_path: Path) -> None:
    status, out, err = calibrate("m", "--trimix", LAYERS, "--max-length", "4096", "--repeats", "3")
    assert status == 0
    assert "75% interval" in out
    assert "warning: 3 repeats give an interval of 75% only; 95% needs 6 or more" in err
    assert "75%" in json.loads((tmp_path / "trimix-m.json").read_text())["provenance"]["warnings"][0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["./nope"], "MODEL: './nope' does not exist"),
        (["m", "--trimix", "{"], "--trimix: '{' is not JSON"),
        (["m", "--trimix", "[]"], "trimix: expected a JSON object"),
        (["m", "--trimix", '{"startin_layer": 3}'], "did you mean 'starting_layer'?"),
        (["m", "--trimix", '{"min_prompt_len": 3}'], "--trimix: min_prompt_len (3) is what is measured; leave it out"),
        (
            ["m", "--trimix", '{"shallow": {"pattern": "flexprefill", "min_seq_len": 3}}'],
            "--trimix: shallow.min_seq_len (3) is what is measured; leave it out",
        ),
        (["m", "--max-length", "100"], "--max-length: 100 is below 512 tokens"),
        (["m", "--repeats", "2"], "--repeats: 2 is too few; the least is 3"),
        (["m", "--output", "o.yaml"], "--output: 'o.yaml' must end in .json"),
        (["m", "--output", "nowhere/o.json"], "--output: cannot write to the folder 'nowhere': No such file"),
        (["m", "--output", "folder.json"], "--output: 'folder.json' exists and is not an overlay"),
        (["m", "--trimix", '{"preset": "old.json"}', "--output", "old.json"], "would build on itself"),
        (["m", "--", "--help"], "for help on them run: vllm serve --help=all"),
    ],
)
def test_mistakes_are_named_before_an_engine_starts(
    argv: list[str], message: str, calibrate: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_trimix.cli.calibrate._ENGINE", "no.such.module")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "old.json").write_text(json.dumps({"layers": "1", "provenance": {"source": overlay.SOURCE}}))
    status, out, err = calibrate(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("vllm-trimix: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["m", "--dtype", "bfloat16"], "unrecognized arguments: --dtype bfloat16; engine flags go after --"),
        (["m", "--budget", "0"], "argument --budget: '0' is not a number of minutes above 0"),
        (["m", "--max-length", "1e3"], "argument --max-length: '1e3' is not a whole number above 0"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_bad_command_lines(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_the_engine_refuses_is_one_line(calibrate: Calibrate) -> None:
    status, out, err = calibrate("m", error="--max-length: 9 exceed", pids="pids")
    assert (status, out) == (2, "")
    assert err.splitlines()[1:] == ["vllm-trimix: error: --max-length: 9 exceed"]
    assert not any(alive(int(pid)) for pid in Path("pids").read_text().split())
    _, _, err = calibrate("m", error="Set them, e.g. --additional-config '{}'")
    assert "calibrate takes that entry by --trimix" in err


def test_an_engine_that_runs_no_triangle_measures_nothing(calibrate: Calibrate, tmp_path: Path) -> None:
    status, _, err = calibrate("m", "--trimix", LAYERS, rows=False)
    assert status == 2
    assert "no row of a prompt of 1024 tokens ran the triangle" in err
    assert list(tmp_path.glob("*.json")) == []


def test_a_dying_engine_shows_its_last_lines(calibrate: Calibrate, tmp_path: Path) -> None:
    status, _, err = calibrate("m", "--trimix", LAYERS, die_at=25, pids=str(tmp_path / "pids"))
    assert status == 1
    assert "RuntimeError: EngineCore died\n" in err
    last = err.splitlines()[-1]
    assert last.startswith("vllm-trimix: error: the engine ended (status 1): ValueError: out of pages; the whole log")
    assert "TRIMIX rows" in Path(last.rpartition(" in ")[2]).read_text()
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert list(tmp_path.glob("*.json")) == []


def test_an_engine_that_hangs_costs_no_more_than_the_budget(calibrate: Calibrate, tmp_path: Path) -> None:
    start = time.monotonic()
    status, out, err = calibrate(
        "m", "--trimix", LAYERS, "--budget", "0.1", hang_at=45, pids=str(tmp_path / "pids"), crossing=900
    )
    assert time.monotonic() - start < 15
    assert status == 0
    assert "break-even: 1024 tokens" in out
    assert "out of --budget: not measured: 2048, 4096" in err
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_an_engine_that_is_never_ready(calibrate: Calibrate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_trimix.cli.calibrate._ENGINE", "tests.calibration.sleeper")
    status, _, err = calibrate("m", "--trimix", LAYERS, "--budget", "0.02")
    assert status == 2
    assert "--budget: 0.02 minutes were over before the engine was ready; allow more" in err


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"import sys; from vllm_trimix.cli import calibrate as c; c._ENGINE = {FAKE!r}; "
    code += "from vllm_trimix.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "calibrate", "m", "--trimix", LAYERS, "--output", str(tmp_path / "o.json")],
        cwd=ROOT,
        env={**os.environ, "FAKE_ENGINE": json.dumps({"hang_at": 30, "pids": str(pids)}), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        while "same code" not in process.stdout.readline():
            assert process.poll() is None
        engine = [int(pid) for pid in pids.read_text().split()]
        assert all(alive(pid) for pid in engine)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert not any(alive(pid) for pid in engine)
        assert process.stdout.read().count("Traceback") == 0
        assert [path.name for path in tmp_path.iterdir()] == ["pids"]
    finally:
        process.kill()
        process.wait()
