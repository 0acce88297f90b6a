"""The command from end to end: real engines, a real server, stops, failing servers, bad input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.evaluation.conftest import ENGINE_FLAGS
from tests.server.server import serve
from vllm_trimix.cli.main import main
from vllm_trimix.evaluation import askers
from vllm_trimix.evaluation.suites.registry import SUITES

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "tests" / "data" / "trained-small"
RIGHT = '{"layers": "0,2", "min_prompt_len": 0}'


def cells(folder: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The results by task, length and configuration."""
    result = json.loads((folder / "result.json").read_text())
    return {(cell["task"], cell["length"], cell["configuration"]): cell for cell in result["cells"]}


def test_engines_tell_the_right_preset_from_the_wrong_one(circuit: Path, tmp_path: Path) -> None:
    """Six of each: the fewest of which all lost are a loss beyond chance."""
    arguments = ["eval", "ruler", str(circuit), "--lengths", "1500", "--samples", "6", "--output", str(tmp_path)]
    arguments += [
        "--trimix",
        RIGHT,
        "--config",
        'all={"layers": "0-2", "min_prompt_len": 0}',
        "--tasks",
        "vt,niah_single_2",
        "--noise-floor",
        "512",
    ]
    assert main([*arguments, *ENGINE_FLAGS]) == 0
    found = cells(tmp_path)
    assert found["vt", 1500, "noise-floor"]["difference"]["mean"] == 0
    assert {name: found["vt", 1500, name]["score"] for name in ("stock", "trimix", "all")} == {
        "stock": 1.0,
        "trimix": 1.0,
        "all": 0.0,
    }
    assert found["vt", 1500, "all"]["verdict"] == "loss"
    assert found["vt", 1500, "trimix"]["verdict"] == "none seen"
    assert found["niah_single_2", 1500, "all"]["score"] == 1.0
    assert found["vt", 1500, "trimix"]["sparse"] == 1.0
    result = json.loads((tmp_path / "result.json").read_text())
    configurations = result["configurations"]
    assert configurations["stock"]["facts"]["resolved"] is None
    assert configurations["noise-floor"]["facts"]["engine"]["max_num_batched_tokens"] == 512
    assert "again with `--max-num-batched-tokens 512`" in (tmp_path / "report.md").read_text()
    # What the log says that ran: twelve prompts, all rows but the last 128 of each.
    assert configurations["trimix"]["facts"]["rows"]["triangle"] == 12 * (1496 - 128)
    assert configurations["trimix"]["facts"]["start_line"].startswith("layers=0,2 of=3 pattern=triangle")
    assert found["vt", 1500, "trimix"]["seconds"] > 0


@pytest.mark.slow
def test_perplexity_sees_what_the_mask_hides(tmp_path: Path) -> None:
    """On the trained model repeated records are foretold from far away: under the mask they can't be."""
    entry = '{"layers": "0-3", "n_init": 2, "n_local": 16, "last_n": 8, "min_prompt_len": 0}'
    arguments = ["eval", "ppl", str(TRAINED), "--lengths", "200", "--samples", "8", "--trimix", entry]
    assert main([*arguments, "--output", str(tmp_path), *ENGINE_FLAGS]) == 0
    found = cells(tmp_path)
    assert found["documents", 200, "trimix"]["verdict"] == "loss"
    assert found["documents", 200, "trimix"]["score"] > found["documents", 200, "stock"]["score"] + 0.2
    assert "**Perplexity scores every prompt row**" in (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module")
def server(circuit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(circuit, log, trimix=json.loads(RIGHT), arguments=("--gpu-memory-utilization=0.3",)) as running:
        yield f"http://127.0.0.1:{running.port}"


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_on_a_server(suite: str, circuit: Path, server: str, tmp_path: Path) -> None:
    """All tasks that can be said in the circuit's language: dense and the right preset answer everything."""
    arguments = ["eval", suite, str(circuit), "--server", server, "--lengths", "1500", "--samples", "2"]
    arguments += ["--depths", "0,0.5,1"] if suite == "niah" else []
    assert main([*arguments, "--concurrency", "2", "--output", str(tmp_path)]) == 0
    found = cells(tmp_path)
    assert {task for task, _, _ in found} == set(SUITES[suite].tasks["vault"])
    for (task, _, _), cell in found.items():
        assert cell["n"] == (6 if suite == "niah" else 2), task
        if suite != "ppl":
            assert cell["score"] == 1.0, task
    text = (tmp_path / "report.md").read_text()
    for picture in tmp_path.glob("*.png"):
        assert f"({picture.name})" in text
    assert list(tmp_path.glob("*.png"))
    if suite == "agreement":
        assert found["prompts", 1500, "trimix"]["kl"] < 0.01
    if suite in ("agreement", "long"):
        assert found[next(iter(found))[0], 1500, "trimix"]["agrees"]["1"] == 1.0
        assert "| first 1 |" in text


def test_a_server_without_trimix_is_refused(circuit: Path, tmp_path: Path) -> None:
    """It would take no notice of the opt-out, and everything would look lossless."""
    with failing_server(knows_trimix=False) as url:
        assert said(
            ["eval", "ruler", str(circuit), "--server", url, "--lengths", "1500", "--output", str(tmp_path)]
        ) == (
            2,
            f"--server: {url} doesn't run TRIMIX: start it with --attention-backend TRIMIX, or leave --server out",
        )


def test_a_server_that_fails_leaves_the_rest(circuit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "ruler", str(circuit), "--lengths", "1500", "--samples", "3", "--tasks", "niah_single_1,vt"]
    with failing_server(fails=lambda number: number in (2, 7)) as url:
        assert main([*arguments, "--server", url, "--output", str(tmp_path)]) == 1
    bodies = failing_server.bodies
    assert [body["vllm_xargs"]["trimix"] for body in bodies] == ["off"] * 6 + ["on"] * 6
    assert [body["prompt"] for body in bodies[:6]] == [body["prompt"] for body in bodies[6:]]
    # No answer may come from rows that were cached under another rule.
    assert len({body["cache_salt"] for body in bodies}) == 12
    out = capsys.readouterr().out
    assert "2 prompts have no answer" in out
    assert "`stock` niah_single_1/1500/1: HTTP 500: out of pages" in out
    # One prompt failed under each: what is compared was answered by both.
    found = cells(tmp_path)
    assert found["niah_single_1", 1500, "stock"]["n"] == 2
    assert found["niah_single_1", 1500, "trimix"]["n"] == 1
    assert found["vt", 1500, "trimix"]["n"] == 3
    # The others are not asked again.
    with failing_server() as url:
        result = tmp_path / "answers.jsonl"
        header = json.loads(result.read_text().splitlines()[0])
        result.write_text(result.read_text().replace(json.dumps(header), json.dumps({**header, "asked": url}), 1))
        assert main([*arguments, "--server", url, "--output", str(tmp_path)]) == 0
        assert failing_server.asked == 2
    assert {cell["n"] for cell in cells(tmp_path).values()} == {3}


def test_a_server_that_leaves_keeps_what_was_said(circuit: Path, tmp_path: Path) -> None:
    arguments = ["eval", "ruler", str(circuit), "--lengths", "1500", "--samples", "3", "--tasks", "vt"]
    with failing_server(leaves_at=2) as url:
        assert main([*arguments, "--server", url, "--output", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["failures"]) == {"stock", "trimix"}
    assert [answer["error"] for answer in result["failed"]] == ["Connection error."] * 2
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 + 2 + 2
    assert "**stock was given up**" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_an_engine_that_dies_keeps_what_was_said(
    circuit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    class Dying(askers.EngineAsker):
        def ask(self, samples: Any) -> list[dict[str, Any]]:
            nonlocal asked
            asked += 1
            if asked == 2:
                os.killpg(self._process._process.pid, signal.SIGKILL)
            return super().ask(samples)

    monkeypatch.setattr(askers, "EngineAsker", Dying)
    arguments = ["eval", "ruler", str(circuit), "--lengths", "1000", "--samples", "2", "--tasks", "niah_single_1"]
    assert main([*arguments, "--configs", "stock", "--output", str(tmp_path), *ENGINE_FLAGS]) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failures"]["stock"].startswith("the engine ended (status -9)")
    assert [entry["sample"] for entry in result["failed"]] == ["niah_single_1/1000/1"]
    (cell,) = result["cells"]
    assert cell["n"] == cell["failed"] == cell["score"] == 1


def test_ctrl_c_goes_on_where_it_was(circuit: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_trimix.cli.main", "eval", "ruler", str(circuit), "--lengths", "1500"]
    command += ["--samples", "40", "--tasks", "vt", "--output", str(tmp_path)]
    with failing_server(seconds=0.1) as url:
        process = subprocess.Popen([*command, "--server", url], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        path = tmp_path / "answers.jsonl"
        deadline = time.monotonic() + 120
        while not path.exists() or len(path.read_text().splitlines()) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "the same command goes on where it was" in err
        kept = len(path.read_text().splitlines()) - 1
        assert main([*command[3:], "--server", url]) == 0
        assert failing_server.asked <= 80 + 1
        assert path.read_text().count('"sample"') == 80
        assert kept >= 5


class failing_server:
    """Speaks as vLLM's server does as far as the command listens, and fails on purpose, which a real one won't."""

    asked = 0
    bodies: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self,
        *,
        knows_trimix: bool = True,
        fails: Any = lambda number: False,
        leaves_at: int | None = None,
        seconds: float = 0.0,
    ) -> None:
        self.knows_trimix, self.fails, self.leaves_at, self.seconds = knows_trimix, fails, leaves_at, seconds

    def __enter__(self) -> str:
        failing_server.asked = 0
        failing_server.bodies.clear()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, body: str, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def do_GET(self) -> None:
                self.answer(200, json.dumps({"object": "list", "data": [{"id": "demo", "object": "model"}]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                wants = body["vllm_xargs"]["trimix"]
                if wants not in ("on", "off"):
                    error = {"error": {"message": "vllm_xargs.trimix: not a value", "code": 400}}
                    self.answer(*((400, json.dumps(error)) if outer.knows_trimix else (200, "{}")))
                    return
                failing_server.asked += 1
                failing_server.bodies.append(body)
                number = failing_server.asked
                time.sleep(outer.seconds)
                if outer.leaves_at is not None and number > outer.leaves_at:
                    self.connection.close()
                elif outer.fails(number):
                    self.answer(500, json.dumps({"error": {"message": "out of pages", "code": 500}}))
                else:
                    part = {"id": "1", "object": "text_completion", "choices": [{"index": 0, "text": " 1234"}]}
                    self.answer(200, f"data: {json.dumps(part)}\n\ndata: [DONE]\n\n", "text/event-stream")

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.http.server_port}"

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def said(arguments: list[str]) -> tuple[int, str]:
    """The exit status and the error's line."""
    import io

    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        try:
            status = main(arguments)
        except SystemExit as error:
            status = int(error.code or 0)
    lines = [line for line in out.getvalue().splitlines() if "error: " in line]
    return status, lines[-1].partition("error: ")[2] if lines else ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["rulr"],
            "SUITE: 'rulr' is not a suite; did you mean 'ruler'?; there are ruler, niah, retrieval, ppl, agreement",
        ),
        (["ruler", "--tasks", "vtt"], "--tasks: 'vtt' is not a task; did you mean 'vt'?"),
        (["ruler", "--tasks", "cwe"], "--tasks: 'cwe' can't be said in the language of this model (vault)"),
        (["ruler", "--lengths", "262144"], "--lengths: 262144 tokens: MODEL takes 131072; choose at most that"),
        (["ruler", "--lengths", "4k"], "--lengths: '4k' is not a number of tokens; write e.g. 4096,16384"),
        (["ruler", "--lengths", "20"], "20 tokens leave no room"),
        (["niah", "--depths", "0.5,7"], "--depths: '7' is not a share from 0 (start) to 1 (end)"),
        (["ruler", "--text", "book.txt"], "--text: book.txt: only the suite ppl reads it; leave it out for ruler"),
        (
            ["niah", "--documents", "a.txt", "b.txt"],
            "--documents: a.txt, b.txt: only the suite agreement reads it; leave it out for niah",
        ),
        (["agreement", "--documents", "a", "--chat-template"], "ask nothing; leave --chat-template or them out"),
        (
            ["agreement", "--noise-floor", "512", "--server", "http://localhost:1"],
            "--noise-floor: a running server cuts prompts in one way; leave --noise-floor or --server out",
        ),
        (
            ["agreement", "--noise-floor", "512", "--", "--max-num-batched-tokens=512"],
            "--noise-floor: 512 tokens is what --max-num-batched-tokens gives stock; take another",
        ),
        (["ruler", "--samples", "0"], "'0' is not a whole number above 0"),
        (["ruler", "--configs", "trimix"], "--configs: 'trimix' has no 'stock'"),
        (["ruler", "--config", "a=1"], "trimix: expected a JSON object"),
        (["ruler", "--trimix", '{"n_last": 3}'], "unknown key 'n_last' in trimix config; did you mean 'last_n'?"),
        (
            ["ruler", "--trimix", '{"layers": "40"}'],
            "configuration trimix: trimix.layers: '40' is outside this model's 3",
        ),
        (["ruler", "--ablation", "lastn"], "--ablation: 'lastn' is not an ablation"),
        (["ruler", "--chat-template"], "--chat-template: the tokenizer of MODEL has no chat template"),
        (["ruler", "--server", "http://127.0.0.1:9"], "--server: http://127.0.0.1:9: Connection error."),
        (["ruler", "--server", "http://127.0.0.1:9", "--config", "a={}"], "--server: a running server has its"),
        (["agreement", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["ruler", "--ablation", "num_layers", "--probe", "nowhere"], "nowhere"),
    ],
    ids=lambda value: value[-1][:24] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, circuit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(askers, "_ENGINE", "no.such.module")
    if "--chat-template" in arguments:
        plain = tmp_path / "plain"
        plain.mkdir()
        for path in circuit.iterdir():
            if "chat_template" not in path.name:
                text = path.read_bytes()
                if path.name == "tokenizer_config.json":
                    text = json.dumps({k: v for k, v in json.loads(text).items() if k != "chat_template"}).encode()
                (plain / path.name).write_bytes(text)
        circuit = plain
    small = ["--lengths", "1000", "--samples", "1", "--output", str(tmp_path / "out")]
    arguments = ["eval", arguments[0], str(circuit), *small, *arguments[1:]]
    status, line = said(arguments)
    assert status == 2, line
    assert says.replace("MODEL", str(circuit)) in line
