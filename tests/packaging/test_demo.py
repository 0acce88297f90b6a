"""`vllm-trimix demo` against a stand-in for the server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vllm_trimix.cli.main import main
from vllm_trimix.demo.prompts import make_demo_prompt

TOKENS = 2048


class Server(ThreadingHTTPServer):
    """Answers as told, and keeps what it was asked."""

    requests: list[dict[str, Any]]
    triangle_text: str
    dense_text: str
    status = 200


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "demo", "max_model_len": 4096}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.status != 200:
            self._send(self.server.status, json.dumps({"error": {"message": "no room"}}).encode())
            return
        dense = body.get("vllm_xargs") == {"trimix": "off"}
        time.sleep(0.2 if dense else 0.1)
        text = self.server.dense_text if dense else self.server.triangle_text
        events: list[dict[str, Any]] = [
            {"choices": [{"text": f" {text}"}]},
            {"choices": [], "usage": {"prompt_tokens": TOKENS}},
        ]
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self._send(200, lines.encode())


@pytest.fixture
def server() -> Iterator[Server]:
    stub = Server(("127.0.0.1", 0), Handler)
    stub.requests = []
    stub.triangle_text = stub.dense_text = make_demo_prompt(tokens=TOKENS, hops=2, seed=0).answer
    thread = threading.Thread(target=stub.serve_forever)
    thread.start()
    yield stub
    stub.shutdown()
    thread.join()
    stub.server_close()


def _demo(server: Server, tokens: int = TOKENS) -> int:
    return main(["demo", "--port", str(server.server_address[1]), "--tokens", str(tokens)])


def test_compares_the_same_request_with_cold_caches(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert _demo(server) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("TRIMIX", "dense"))}
    assert all("(right)" in row and str(TOKENS) in row for row in rows.values())
    assert set(rows) == {"TRIMIX", "dense"}
    ratio = float(out.splitlines()[-1].split()[-1])
    assert 0.3 < ratio < 0.8, "0.1 s against 0.2 s, with room for a busy machine"

    assert len({request["cache_salt"] for request in server.requests}) == 4
    warm_up, measured = server.requests[:2], server.requests[2:]
    assert [request.get("vllm_xargs") for request in measured] == [None, {"trimix": "off"}]
    assert measured[0]["prompt"] == measured[1]["prompt"] != warm_up[0]["prompt"]


def test_a_wrong_answer_shows(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.triangle_text = "amber"
    assert _demo(server) == 1
    out = capsys.readouterr().out
    assert "amber (WRONG)" in out
    assert out.count("(right)") == 1


def test_a_refused_request_is_quoted(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.status = 400
    assert _demo(server) == 2
    assert "the server answered 400: no room" in capsys.readouterr().err


def test_a_document_that_does_not_fit_is_not_sent(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert _demo(server, tokens=4096) == 2
    assert "--tokens: 4096" in capsys.readouterr().err
    assert server.requests == []
