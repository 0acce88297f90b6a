"""The correctness gate: no configuration is timed before it has answered a question whose answer is known.

The question goes to a circuit model (hand-set weights) of as many layers as the model to be timed, served exactly as
the timed server will be. Its lookup layer is a dense layer of the configuration and its answer layer a triangle layer,
so that a right answer takes both; the counters must show triangle rows.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

from benchmarks.configurations import Configuration
from benchmarks.servers import SERVED_NAME, ServerError, serve
from vllm_trimix.config import Resolved
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.prompts import make_demo_prompt

GATE_TOKENS = 8192
_ANSWER_TOKENS = 8
_STATS_SECONDS = 1.0


def gate_spec(num_layers: int, resolved: Resolved | None) -> tuple[CircuitSpec, int]:
    """The circuit that a configuration must be able to run, and how many hops its question has.

    Two hops where a dense layer can look the record up; one hop where every layer from 1 on is sparse. The answer is
    read in a triangle layer if the last rows see the whole prompt there.

    Args:
        num_layers: Of the model to be timed; a circuit has at least 3.
        resolved: The configuration's settings; None for stock.
    """
    layers = max(3, num_layers)
    sparse = set(resolved.layers) if resolved else set()
    dense = [layer for layer in range(1, layers) if layer not in sparse]
    readers = sorted(sparse - {0, 1}) if resolved and resolved.last_n else [layer for layer in dense if layer > 1]
    answer = readers[-1] if readers else layers - 1
    lookups = [layer for layer in dense if layer < answer]
    lookup = lookups[-1] if lookups else 1
    return CircuitSpec(layers=layers, lookup_layer=lookup, answer_layer=answer), 2 if lookups else 1


def check(
    configuration: Configuration,
    resolved: Resolved | None,
    num_layers: int,
    models: Path,
    logs: Path,
    *,
    longest: int,
    cpus: str,
    arguments: list[str],
    start_timeout: float,
) -> str:
    """Serves the circuit model under the configuration and asks it one question.

    Args:
        configuration: As it will be timed.
        resolved: Its settings; None for stock.
        num_layers: Of the model to be timed.
        models: Folder for the circuit model.
        logs: Folder for the server's log.
        longest: Longest prompt to be timed, in tokens: the question is no longer.
        cpus: As for ``serve``.
        arguments: As for ``serve``.
        start_timeout: As for ``serve``.

    Returns:
        What was seen, for the report.

    Raises:
        ServerError: A wrong answer, or no triangle row where there should be some.
    """
    spec, hops = gate_spec(num_layers, resolved)
    threshold = resolved.min_prompt_len if resolved and resolved.layers else 0
    tokens = max(min(longest, max(GATE_TOKENS, threshold)), 1024)
    prompt = make_demo_prompt(tokens=tokens, hops=hops, seed=0)
    model = models / f"gate-{configuration.name}"
    make_demo_model(model, spec)
    trimix = configuration.trimix
    gate = dataclasses.replace(
        configuration,
        name=f"gate-{configuration.name}",
        trimix=None if trimix is None else {**trimix, "stats_log_interval": _STATS_SECONDS},
    )
    arguments = [argument for argument in arguments if not argument.startswith("--load-format")]
    with serve(
        [gate],
        model,
        logs,
        max_model_len=tokens + _ANSWER_TOKENS,
        cpus=cpus,
        arguments=arguments,
        start_timeout=start_timeout,
    ) as [server]:
        body = {"model": SERVED_NAME, "prompt": prompt.prompt, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
        response = server.client.post("/v1/completions", json=body)
        if response.status_code != 200:
            raise ServerError(f"{gate.name}: HTTP {response.status_code} {response.text}\n{server.tail()}")
        answer = response.json()["choices"][0]["text"].strip()
        if answer != prompt.answer:
            raise ServerError(
                f"{configuration.name}: the correctness gate failed, no speed is reported: a {hops}-hop question about "
                f"{tokens} tokens was answered {answer!r} instead of {prompt.answer!r} "
                f"(lookup layer {spec.lookup_layer}, answer layer {spec.answer_layer})"
            )
        rows = 0
        if resolved is not None and resolved.layers and tokens >= max(threshold, resolved.triangle.dense_len + 1):
            time.sleep(2 * _STATS_SECONDS)
            rows = sum(int(count) for count in re.findall(r"TRIMIX rows: triangle=(\d+)", server.text()))
            if rows != tokens - resolved.last_n:
                raise ServerError(
                    f"{configuration.name}: the correctness gate failed, no speed is reported: {rows} triangle rows "
                    f"were counted, {tokens - resolved.last_n} were due\n{server.tail()}"
                )
    return f"{hops}-hop question about {tokens} tokens answered {answer}, {rows} triangle rows"
