"""Asks a server by ``vllm bench serve``: its client, its clock; in this process, to import vLLM once."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from vllm.benchmarks.datasets.datasets import CustomDataset
from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.serving.servers import SERVED_NAME, Server, ServerError


@dataclass(frozen=True)
class Load:
    """What one measurement sends.

    Attributes:
        length: Prompt tokens of each request.
        concurrency: Requests, all sent at once.
        decode_tokens: Tokens after the first.
        seed: Names the prompts.
        dataset: File with the prompts, JSON lines; None: random tokens.
    """

    length: int
    concurrency: int
    decode_tokens: int
    seed: int
    dataset: Path | None = None


def bench_arguments(server: Server, model: Path, load: Load) -> list[str]:
    """Arguments of ``vllm bench serve`` for one measurement."""
    if load.dataset is None:
        prompts = [
            "--dataset-name=random",
            f"--random-input-len={load.length}",
            f"--random-output-len={load.decode_tokens + 1}",
        ]
    else:
        prompts = [
            "--dataset-name=custom",
            f"--dataset-path={load.dataset}",
            f"--custom-output-len={load.decode_tokens + 1}",
            "--skip-chat-template",
            "--ignore-eos",
        ]
    return [
        "--backend=openai",
        "--endpoint=/v1/completions",
        f"--base-url=http://127.0.0.1:{server.port}",
        f"--model={SERVED_NAME}",
        f"--tokenizer={model}",
        *prompts,
        f"--num-prompts={load.concurrency}",
        f"--max-concurrency={load.concurrency}",
        "--temperature=0",
        f"--seed={load.seed}",
        "--num-warmups=0",
        "--ready-check-timeout-sec=0",
        "--save-detailed",
        "--disable-tqdm",
    ]


def ask(server: Server, model: Path, load: Load, log: Path) -> dict[str, Any]:
    """One measurement.

    Args:
        server: Awake.
        model: Folder with the tokenizer.
        load: What to send.
        log: Where the client's own report is appended.

    Returns:
        ``ttft_s`` (mean over the requests), ``itl_s`` (mean time between tokens, median over the requests; None
        without decode tokens), ``throughput_tokens_s`` (prompt and generated), ``ttfts_s``.

    Raises:
        ServerError: A request failed, the server died, or it counted other prompt tokens than were asked for.
    """
    try:
        return _ask(server, model, load, log)
    except httpx.TransportError as error:
        server.check_alive()
        raise ServerError(f"{server.name}: {error}\n{server.tail()}") from None
    finally:
        # The client froze the heap for its measurement.
        gc.unfreeze()


def _ask(server: Server, model: Path, load: Load, log: Path) -> dict[str, Any]:
    before = server.prompt_tokens()
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        result = asyncio.run(main_async(_parser().parse_args(bench_arguments(server, model, load))))
    server.check_alive()
    if result["failed"] or result["completed"] != load.concurrency:
        errors = sorted({error.strip().splitlines()[-1] for error in result["errors"] if error.strip()})
        raise ServerError(f"{server.name}: {load.length} tokens: {'; '.join(errors)}\n{server.tail()}")
    counted, expected = server.prompt_tokens() - before, load.length * load.concurrency
    if counted != expected or set(result["input_lens"]) != {load.length}:
        raise ServerError(
            f"{server.name}: asked for {load.concurrency} x {load.length} prompt tokens, the server counted {counted} "
            f"({sorted(set(result['input_lens']))} a request)"
        )
    itls = [sum(gaps) / load.decode_tokens for gaps in result["itls"] if load.decode_tokens]
    return {
        "ttft_s": round(statistics.fmean(result["ttfts"]), 6),
        "itl_s": round(statistics.median(itls), 6) if itls else None,
        "throughput_tokens_s": round(result["total_token_throughput"], 2),
        "ttfts_s": [round(ttft, 6) for ttft in result["ttfts"]],
    }


def _load_lines(dataset: CustomDataset) -> None:
    """Reads JSON lines as vLLM's own does by pandas, which only its extra ``bench`` installs; in order."""
    dataset.data = [json.loads(line) for line in Path(dataset.dataset_path).read_text().splitlines()]


CustomDataset.load_data = _load_lines


def _parser() -> argparse.ArgumentParser:
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser
