"""TRIMIX as its users meet it: a served demo model, asked over HTTP."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cpu import has_wide_vectors
from tests.server.server import Server, serve
from tests.tiers import Tier
from vllm_trimix.cli.main import main
from vllm_trimix.demo.prompts import make_demo_prompt

LENGTHS = [2048, 8192, 16384] if has_wide_vectors() else [2048, 8192]


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    assert main(["make-demo-model", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The preset comes from the model's own config.json: layers after the lookup layer."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serve(demo_model, log, trimix={"min_prompt_len": 0, "stats_log_interval": 1.0}) as running:
        yield running


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_answers_right(server: Server, tokens: int, hops: int) -> None:
    before = server.rows()
    prompt = make_demo_prompt(tokens=tokens, hops=hops, seed=hops * tokens)
    answer = server.complete(prompt.prompt)
    assert answer["text"] == prompt.answer
    assert tokens - 8 <= answer["prompt_tokens"] <= tokens
    after = server.rows()
    assert after["triangle"] - before.get("triangle", 0) == answer["prompt_tokens"] - 128
    assert after["triangle_layer_rows"] - before.get("triangle_layer_rows", 0) == 4 * (answer["prompt_tokens"] - 128)
    assert after["last_n"] - before.get("last_n", 0) == 128


def test_start_line_is_said_once(server: Server) -> None:
    lines = [line for line in server.log.splitlines() if "TRIMIX: " in line]
    assert len(lines) == 1
    assert lines[0].endswith(
        "TRIMIX: layers=4-7 of=8 pattern=triangle n_init=8 n_local=512 last_n=128 min_prompt_len=0 "
        "dense=CPU_ATTN kernel=torch_cpu stock_layers=none source=model shallow=dense"
    )


def test_opt_out_on_every_api(server: Server) -> None:
    prompt = make_demo_prompt(tokens=3000, hops=2, seed=11)
    before = server.rows()
    off = {"vllm_xargs": {"trimix": "off"}, "temperature": 0}
    assert server.complete(prompt.prompt, trimix="off")["text"] == prompt.answer
    chat = server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": prompt.prompt}], "max_completion_tokens": 8, **off},
    )
    assert chat.status_code == 200, chat.text
    assert chat.json()["choices"][0]["message"]["content"].strip() == prompt.answer
    responses = server.post("/v1/responses", {"input": prompt.prompt, "max_output_tokens": 16, **off})
    assert responses.status_code == 200, responses.text
    assert prompt.answer in responses.text
    after = server.rows()
    assert after.get("triangle", 0) == before.get("triangle", 0)
    # The three prompts are the same document: only what was not cached had to be computed densely.
    assert after["opt_out"] - before.get("opt_out", 0) + after.get("cached", 0) - before.get("cached", 0) >= 3 * 2900


def test_prefix_cache_namespaces(server: Server) -> None:
    first, second = (make_demo_prompt(tokens=2500, hops=1, seed=seed).prompt for seed in (21, 22))

    def cached(prompt: str, mode: str) -> int:
        return int(server.complete(prompt, trimix=mode)["cached_tokens"])

    assert cached(first, "on") == 0
    assert cached(first, "on") > 2000
    assert cached(first, "off") == 0
    assert cached(second, "off") == 0
    assert cached(second, "off") > 2000
    assert cached(second, "on") == 0


def test_requests_that_read_prompt_rows_measure_stock(server: Server) -> None:
    prompt = make_demo_prompt(tokens=2000, hops=1, seed=31)
    before = server.rows()
    response = server.post(
        "/v1/completions", {"prompt": prompt.prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    )
    assert response.status_code == 200
    after = server.rows()
    assert after["prompt_logprobs"] - before.get("prompt_logprobs", 0) >= 1990
    assert after.get("triangle", 0) == before.get("triangle", 0)
    assert "TRIMIX dense (prompt_logprobs)" in server.log


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("value", ["of", "", 1, 0.5, False, ["off"], "off" * 10_000], ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_bad_xargs_are_refused(server: Server, path: str, value: Any, stream: bool) -> None:
    body: dict[str, Any] = {"stream": stream, "vllm_xargs": {"trimix": value}}
    body |= {
        "/v1/completions": {"prompt": "amber", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "amber"}]},
        "/v1/responses": {"input": "amber"},
    }[path]
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    assert "vllm_xargs.trimix" in response.text
    assert "allowed values: 'on' (default), 'triangle'" in response.text


@pytest.mark.tier("I")
@pytest.mark.parametrize("value", [None, {"off": 1}, [["off"]], [None], {}], ids=repr)
def test_xargs_of_types_that_vllm_itself_refuses(server: Server, value: Any, tier: Tier) -> None:
    response = server.post("/v1/completions", {"prompt": "amber", "max_tokens": 2, "vllm_xargs": {"trimix": value}})
    assert response.status_code == 400, response.text
    assert "vllm_xargs" in response.text
    tier.case("http", repr(value))


@pytest.mark.tier("I")
@pytest.mark.parametrize("key", ["trimix_off", "Trimix", "trimix-shallow", "trimix\0"])
def test_unknown_xargs_that_begin_with_the_name_are_refused(server: Server, key: str, tier: Tier) -> None:
    response = server.post("/v1/completions", {"prompt": "amber", "max_tokens": 2, "vllm_xargs": {key: "off"}})
    assert response.status_code == 400, response.text
    assert "is unknown; use vllm_xargs.trimix with 'on', 'triangle' or 'off'" in response.text
    tier.case("http", key)


def test_beam_search_cannot_drop_the_opt_out(server: Server) -> None:
    body = {"prompt": "amber", "max_tokens": 2, "n": 2, "use_beam_search": True}
    assert server.post("/v1/completions", body).status_code == 200
    for value, message in (("off", "can't be combined with use_beam_search"), ("of", "allowed values")):
        response = server.post("/v1/completions", {**body, "vllm_xargs": {"trimix": value}})
        assert response.status_code == 400
        assert message in response.text


def test_the_stamp_cannot_be_forged(server: Server) -> None:
    response = server.post(
        "/v1/completions", {"prompt": "amber", "max_tokens": 2, "vllm_xargs": {"trimix_dense": "opt_out"}}
    )
    assert response.status_code == 400
    assert "trimix_dense is internal" in response.text


def test_edges_are_stock(server: Server) -> None:
    assert server.post("/v1/completions", {"prompt": "", "max_tokens": 1}).status_code in (200, 400)
    assert server.post("/v1/completions", {"prompt": [1], "max_tokens": 1}).status_code == 200
    assert server.post("/v1/completions", {"prompt": [5] * 20000, "max_tokens": 1}).status_code == 400
    assert server.post("/v1/completions", {"prompt": [5] * 40, "max_tokens": 1}).status_code == 200
    assert server.process.poll() is None


def test_a_client_that_leaves_in_mid_prefill(server: Server) -> None:
    document = make_demo_prompt(tokens=16000, hops=2, seed=41).prompt
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/completions", json={"model": "demo", "prompt": document, "max_tokens": 64}, timeout=0.3)
    prompt = make_demo_prompt(tokens=2100, hops=2, seed=42)
    assert server.complete(prompt.prompt)["text"] == prompt.answer
    deadline = time.monotonic() + 30
    while server.rows()["requests"]:
        assert time.monotonic() < deadline, "a request of a client that left is still tracked"


def test_mixed_traffic_and_an_idle_end(server: Server) -> None:
    """Triangle, opted-out, short and refused requests at once; each answer right; nothing left behind."""
    stop = threading.Event()

    def nuisance() -> None:
        while not stop.wait(0.2):
            response = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "vllm_xargs": {"trimix": "no"}})
            assert response.status_code == 400

    def ask(seed: int) -> bool:
        prompt = make_demo_prompt(tokens=700 + 97 * seed, hops=1 + seed % 2, seed=100 + seed)
        return bool(server.complete(prompt.prompt, trimix=("on", "off")[seed % 3 == 0])["text"] == prompt.answer)

    thread = threading.Thread(target=nuisance)
    thread.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(24)))
    finally:
        stop.set()
        thread.join()
    assert server.rows()["requests"] == 0


def test_the_lookup_layer_must_not_be_sparse(demo_model: Path, tmp_path: Path) -> None:
    """The mask is real: with the lookup layer in the set the answer is the alias's key, and opting out mends it."""
    trimix = {"starting_layer": 3, "min_prompt_len": 0, "stats_log_interval": 1.0}
    with serve(demo_model, tmp_path / "server.log", trimix=trimix) as wrong:
        for tokens in LENGTHS:
            two = make_demo_prompt(tokens=tokens, hops=2, seed=tokens)
            assert wrong.complete(two.prompt)["text"] == two.wrong_answer
            assert wrong.complete(two.prompt, trimix="off")["text"] == two.answer
            one = make_demo_prompt(tokens=tokens, hops=1, seed=tokens)
            assert wrong.complete(one.prompt)["text"] == one.answer
        assert wrong.rows()["triangle"] > 2 * sum(LENGTHS) - 3000
        # Read before it is stopped: on Ctrl-C vLLM's front end may see the engine exit before its own signal, and
        # then logs EngineDeadError with a traceback, with any backend.
        assert "Traceback" not in wrong.log
    assert wrong.process.returncode in (0, -2, 130), wrong.log[-2000:]
