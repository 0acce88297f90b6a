"""``vllm bench serve``, several clients at a time, for a while: vLLM's own code, imported once for all of them.

    python -m tests.faults.clients PORT MODEL FOLDER SECONDS FIRST

Writes a line of JSON for each client to FOLDER/results.jsonl: its kind, its number, which its prompts follow from
(FIRST and so on), and what it reports.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser

# Reads data sets without pandas, too.
import benchmarks.serving.client  # noqa: F401
from tests.faults.traffic import KINDS, WAVE, write_prompts

AT_ONCE = 2
KEPT = ("completed", "failed", "total_input_tokens", "total_output_tokens", "errors", "input_lens", "duration")


def arguments(port: int, model: str, prompts: Path, name: str, seed: int) -> argparse.Namespace:
    kind = KINDS[name]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser.parse_args(
        [
            "--backend=openai",
            "--endpoint=/v1/completions",
            f"--base-url=http://127.0.0.1:{port}",
            "--model=demo",
            f"--tokenizer={model}",
            "--dataset-name=custom",
            f"--dataset-path={prompts}",
            f"--custom-output-len={kind.output}",
            "--skip-chat-template",
            "--ignore-eos",
            f"--num-prompts={kind.count}",
            "--max-concurrency=3",
            "--temperature=0",
            f"--seed={seed}",
            "--num-warmups=0",
            "--ready-check-timeout-sec=0",
            "--disable-tqdm",
            "--save-detailed",
            "--extra-body=" + json.dumps({"vllm_xargs": {"trimix": kind.trimix}}),
        ]
    )


async def run(port: int, model: str, folder: Path, seconds: float, first: int) -> None:
    """Clients one after the other, ``AT_ONCE`` side by side, until the time is up; those that run then finish."""
    end, numbers = time.monotonic() + seconds, itertools.count(first)

    async def one_after_the_other() -> None:
        while time.monotonic() < end:
            number = next(numbers)
            name = WAVE[number % len(WAVE)]
            prompts = folder / f"{number}-{name}.jsonl"
            write_prompts(prompts, KINDS[name], number)
            result: dict[str, Any] = await main_async(arguments(port, model, prompts, name, number))
            line = {"kind": name, "number": number, **{key: result[key] for key in KEPT}}
            with open(folder / "results.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])))
