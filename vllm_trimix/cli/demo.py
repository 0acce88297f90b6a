"""``vllm-trimix demo``: asks a running server the same question under TRIMIX and dense, and times the first token."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

from vllm_trimix.demo.prompts import make_demo_prompt

_MAX_ANSWER_TOKENS = 8
_TIMEOUT_SECONDS = 600.0
_MODES: dict[str, dict[str, str]] = {"TRIMIX": {}, "dense": {"trimix": "off"}}


@dataclass(frozen=True)
class Reply:
    """What the server said to one prompt.

    Attributes:
        text: The generated text, stripped.
        ttft: Seconds from sending the request to the first generated text.
        prompt_tokens: Length of the prompt as the server counted it.
    """

    text: str
    ttft: float
    prompt_tokens: int


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "demo",
        help="ask a running server a two-hop question, under TRIMIX and dense, and time it",
        description="Sends one long document with a question whose answer is known to a running server (make serve), "
        "once under TRIMIX and once opted out to dense, and prints answer, time to first token and prompt tokens. "
        "A warm-up with another document comes first; every request has its own prefix-cache namespace, so nothing is "
        "answered from the cache.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16384, help="length of the document; default: %(default)s")
    parser.add_argument("--hops", type=int, choices=(1, 2), default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="names the document; default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Prints the comparison. Returns 0 if both answers were right, else 1.

    Raises:
        ValueError: The document doesn't fit the model, or the server refused a request.
        OSError: No server, or it went away.
    """
    model, limit = _served_model(args.host, args.port)
    if limit is not None and args.tokens + _MAX_ANSWER_TOKENS > limit:
        raise ValueError(
            f"--tokens: {args.tokens} and {_MAX_ANSWER_TOKENS} for the answer exceed the served model's {limit} tokens "
            "(--max-model-len of vllm serve)"
        )
    warm_up = make_demo_prompt(tokens=args.tokens, hops=args.hops, seed=args.seed + 1)
    question = make_demo_prompt(tokens=args.tokens, hops=args.hops, seed=args.seed)
    for mode, xargs in _MODES.items():
        print(f"warm-up: {mode}", file=sys.stderr, flush=True)
        ask(args.host, args.port, model, warm_up.prompt, xargs)

    print(f"question  {args.hops}-hop, at the end of the document: {question.question} ...")
    print(f"expected  {question.answer}\n")
    print(f"{'mode':<8}{'prompt tokens':>14}{'TTFT':>10}  answer")
    replies = {}
    for mode, xargs in _MODES.items():
        reply = replies[mode] = ask(args.host, args.port, model, question.prompt, xargs)
        verdict = "right" if _is_right(reply, question.answer) else "WRONG"
        print(
            f"{mode:<8}{reply.prompt_tokens:>14}{reply.ttft:>8.2f} s  {reply.text or '(nothing)'} ({verdict})",
            flush=True,
        )
    print(f"\nTTFT, TRIMIX / dense: {replies['TRIMIX'].ttft / replies['dense'].ttft:.2f}")
    return 0 if all(_is_right(reply, question.answer) for reply in replies.values()) else 1


def ask(host: str, port: int, model: str, prompt: str, xargs: dict[str, str]) -> Reply:
    """Streams one greedy completion, in a prefix-cache namespace of its own.

    Raises:
        ValueError: The server refused the request, or reported an error while it answered.
        OSError: The connection failed.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": _MAX_ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": uuid.uuid4().hex,
    }
    if xargs:
        body["vllm_xargs"] = xargs
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS)
    try:
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"the server answered {response.status}: {_error_message(response.read())}")
        text, first, prompt_tokens = "", None, 0
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise ValueError(f"the server failed while it answered: {_error_message(line[len(b'data: ') :])}")
            for choice in event["choices"]:
                if first is None:
                    first = time.perf_counter()
                text += choice["text"]
            if event.get("usage"):
                prompt_tokens = event["usage"]["prompt_tokens"]
    except http.client.HTTPException as error:
        raise ConnectionError(f"the server at {host}:{port} broke off its answer ({error!r})") from error
    finally:
        connection.close()
    if first is None:
        raise ConnectionError(f"the server at {host}:{port} ended its answer before the first token")
    return Reply(text=text.strip(), ttft=first - start, prompt_tokens=prompt_tokens)


def _served_model(host: str, port: int) -> tuple[str, int | None]:
    """Returns the served model's name and its context length."""
    connection = http.client.HTTPConnection(host, port, timeout=10.0)
    try:
        connection.request("GET", "/v1/models")
        response = connection.getresponse()
        payload = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"no server answers at {host}:{port} ({error}); start one with `make serve` and wait until it says that "
            "its startup is complete, or name another port (make demo PORT=..., vllm-trimix demo --port ...)"
        ) from error
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"{host}:{port}/v1/models answered {response.status}: {_error_message(payload)}")
    try:
        model = json.loads(payload)["data"][0]
        return model["id"], model.get("max_model_len")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{host}:{port} is no OpenAI-compatible server: /v1/models gave {payload[:200]!r}") from error


def _is_right(reply: Reply, answer: str) -> bool:
    return reply.text.split()[:1] == [answer]


def _error_message(payload: bytes) -> str:
    try:
        return str(json.loads(payload)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return payload[:300].decode(errors="replace")
