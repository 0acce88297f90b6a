"""The correctness gate: no configuration is timed before it has answered a question whose answer is known.

The question goes to a circuit model (hand-set weights) of as many layers as the model to be timed, served exactly as
the timed server will be. Its lookup layer is a dense layer of the configuration and its answer layer a triangle layer,
so that a right answer takes both; the counters must show triangle rows.

A dynamic pattern promises no row in the middle of a prompt that it will see one certain key far away: a look-up
through it may fail honestly. Where it leaves no dense layer the question has one hop, which still takes its rows: the
record is found by what each of its rows learnt from its two neighbours in layer 0, and the last row, dense, reads it in
the answer layer. All chunks are by the pattern (``min_seq_len`` 0), and the counters must show its rows.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path

from benchmarks.serving.configurations import STATS_SECONDS, Configuration
from benchmarks.serving.servers import SERVED_NAME, ServerError, serve
from vllm_trimix.config.entry import Resolved
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.prompts import DemoPrompt, make_demo_prompt
from vllm_trimix.demo.vocabulary import count_tokens, record

GATE_TOKENS = 8192
_ANSWER_TOKENS = 8
_BOS_TOKENS = 1
# Keys of the smallest block.
_BLOCK = 64


def gate_spec(num_layers: int, resolved: Resolved | None) -> tuple[CircuitSpec, int]:
    """The circuit that a configuration must be able to run, and how many hops its question has.

    Two hops where a dense layer can look the record up; one hop where every layer from 1 on is sparse. The answer is
    read in a triangle layer if the last rows see the whole prompt there, else in a layer of the shallow pattern.

    Args:
        num_layers: Of the model to be timed; a circuit has at least 3.
        resolved: The configuration's settings; None for stock.
    """
    layers = max(3, num_layers)
    triangle = set(resolved.layers) if resolved else set()
    shallow = resolved.shallow if resolved else None
    dynamic = set(shallow.layers) if shallow else set()
    dense = [layer for layer in range(1, layers) if layer not in triangle | dynamic]
    readers: list[int] = []
    for candidates, last_rows in (
        (triangle, resolved.last_n if resolved else 0),
        (dynamic, shallow.last_n if shallow else 0),
        (set(dense), 1),
    ):
        readers = readers or sorted(candidates - {0, 1} if last_rows else set())
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
        ServerError: A wrong answer, or other rows counted than the configuration's.
    """
    spec, hops = gate_spec(num_layers, resolved)
    threshold = resolved.min_prompt_len if resolved and resolved.layers else 0
    tokens = max(min(longest, max(GATE_TOKENS, threshold)), 1024)
    prompt = _gate_prompt(tokens, hops, resolved)
    model = models / f"gate-{configuration.name}"
    make_demo_model(model, _circuit(spec, resolved))
    gate = dataclasses.replace(configuration.counted(), name=f"gate-{configuration.name}")
    if resolved is not None and resolved.shallow is not None:
        assert gate.trimix is not None
        own = gate.trimix.get("shallow") or {}
        gate = dataclasses.replace(gate, trimix={**gate.trimix, "shallow": {**own, "min_seq_len": 0}})
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
        seen = [f"{hops}-hop question about {tokens} tokens answered {answer}"]
        if resolved is not None:
            time.sleep(2 * STATS_SECONDS)
            try:
                seen += _counted(server.counters(), resolved, tokens)
            except ValueError as error:
                raise ServerError(
                    f"{configuration.name}: the correctness gate failed, no speed is reported: {error}\n{server.tail()}"
                ) from None
    return ", ".join(seen)


def _gate_prompt(tokens: int, hops: int, resolved: Resolved | None) -> DemoPrompt:
    """The question; for a dynamic pattern one whose record lies in one block.

    The first two rows of a tile have neighbours in the block before it, which a pattern of blocks may leave out: two
    rows of 128 are a small share of what it estimates.
    """
    for seed in range(100):
        prompt = make_demo_prompt(tokens=tokens, hops=hops, seed=seed)
        if resolved is None or resolved.shallow is None or hops == 2:
            break
        text = record(prompt.question.rsplit(" ", 2)[1], prompt.answer)
        first = _BOS_TOKENS + count_tokens(prompt.prompt[: prompt.prompt.index(text)])
        if first // _BLOCK == (first + count_tokens(text) - 1) // _BLOCK:
            break
    return prompt


def _circuit(spec: CircuitSpec, resolved: Resolved | None) -> CircuitSpec:
    """The circuit with as many heads as a head file has, which fits no other model."""
    if resolved is None or resolved.shallow is None or not resolved.shallow.heads:
        return spec
    heads = len(resolved.shallow.heads[0])
    return dataclasses.replace(spec, heads=heads, kv_heads=2 if heads % 2 == 0 and heads >= 4 else 1)


def _counted(rows: Counter[str], resolved: Resolved, tokens: int) -> list[str]:
    """What the counters show, in words.

    Raises:
        ValueError: Other rows than were due.
    """
    seen = []
    if resolved.layers and tokens >= max(resolved.min_prompt_len, resolved.triangle.dense_len + 1):
        due = tokens - resolved.last_n
        if rows["triangle"] != due:
            raise ValueError(f"{rows['triangle']} triangle rows were counted, {due} were due")
        seen.append(f"{due} triangle rows")
    shallow = resolved.shallow
    if shallow is not None:
        # A last chunk with fewer rows than a tile is dense.
        counted, due = rows["dynamic_layer_rows"] / len(shallow.layers), tokens - shallow.last_n
        if not due - shallow.largest_block < counted <= due:
            raise ValueError(f"{counted:g} rows by {shallow.label} were counted, {due} were due")
        seen.append(
            f"{counted:g} rows by {shallow.label}, whose density was {rows['keys_read'] / rows['keys_causal']:.3f}"
        )
    return seen
