"""The engine that ``vllm-trimix eval`` asks; a message is a list of prompts, which run together."""

from __future__ import annotations

import time
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_trimix.backend.engines.job import CONTEXT, engine_arguments, one_line, serve
from vllm_trimix.backend.names import ENTRY, NAME
from vllm_trimix.backend.registration import register_trimix

_LOG_INTERVAL = 0.5


def configure(
    *, model: str, flags: list[str], trimix: dict[str, Any] | None, max_model_len: int, max_logprobs: int
) -> tuple[Any, dict[str, Any]]:
    """Makes the engine's configuration from flags of ``vllm serve``.

    Args:
        model: As ``vllm serve`` takes it.
        flags: Engine flags.
        trimix: The ``trimix`` entry; None for stock vLLM.
        max_model_len: Longest prompt and answer together, in tokens.
        max_logprobs: Most likely tokens that a prompt may ask for.

    Raises:
        ValueError: Flags that vLLM doesn't know or that the command sets itself, or a bad entry.
    """
    if trimix is not None:
        register_trimix()
    arguments = engine_arguments(model, flags)
    if arguments.max_model_len is None or arguments.max_model_len < 0:
        arguments.max_model_len = max_model_len
    elif arguments.max_model_len < max_model_len:
        raise ValueError(
            f"engine flags (after --): --max-model-len {arguments.max_model_len} is less than the {max_model_len} "
            "tokens of --lengths; leave it out"
        )
    arguments.max_logprobs = max(arguments.max_logprobs, max_logprobs)
    # A repeated prompt must be computed anew, and another's cached rows would have followed another rule.
    arguments.enable_prefix_caching = False
    if trimix is not None:
        arguments.attention_backend = NAME
        arguments.additional_config = {ENTRY: {**trimix, "stats_log_interval": _LOG_INTERVAL}}
    return arguments.create_engine_config(CONTEXT), {}


def answer(engine: Any, message: dict[str, Any]) -> dict[str, Any]:
    """Runs the prompts of a message together; an answer each, in their order, under ``answers``.

    A prompt has ``tokens`` and ``max_tokens``, and may have ``nll`` (true: its own tokens are scored), ``logprobs``
    (so many of the likeliest tokens at each place of the answer), ``special_tokens`` (true: the text has them) and
    ``keep_tokens`` (true: the answer's tokens come too). One that vLLM refuses is answered with the key ``error``.
    """
    answers: list[dict[str, Any]] = [{} for _ in message["prompts"]]
    waiting = {}
    start = time.perf_counter()
    for number, prompt in enumerate(message["prompts"]):
        name = f"eval-{time.monotonic_ns()}-{number}"
        try:
            engine.add_request(name, {"prompt_token_ids": prompt["tokens"]}, _params(prompt))
        except (ValueError, VLLMValidationError) as error:
            answers[number] = {"error": one_line(error)}
        else:
            waiting[name] = number
    while engine.has_unfinished_requests():
        for output in engine.step():
            number = waiting[output.request_id]
            if "seconds" not in answers[number]:
                answers[number]["seconds"] = time.perf_counter() - start
            if output.finished:
                answers[number].update(_read(output, message["prompts"][number]))
    return {"answers": answers}


def _params(prompt: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=prompt["max_tokens"],
        logprobs=prompt.get("logprobs"),
        prompt_logprobs=0 if prompt.get("nll") else None,
        skip_special_tokens=not prompt.get("special_tokens"),
        flat_logprobs=True,
    )


def _read(output: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """What a finished request says."""
    (completion,) = output.outputs
    found: dict[str, Any] = {"text": completion.text, "finish": completion.finish_reason}
    if prompt.get("nll"):
        # The first token has nothing before it.
        flat = output.prompt_logprobs
        scored = [flat.logprobs[flat.start_indices[place]] for place in range(1, len(output.prompt_token_ids))]
        found["nll"] = -sum(scored) / len(scored)
    if prompt.get("keep_tokens") or prompt.get("logprobs"):
        found["tokens"] = list(completion.token_ids)
    if prompt.get("logprobs"):
        flat = completion.logprobs
        found["likeliest"] = [
            [[token, round(value, 5)] for token, value in _at(flat, place)] for place in range(len(found["tokens"]))
        ]
    return found


def _at(flat: Any, place: int) -> list[tuple[int, float]]:
    """The likeliest tokens at a place of the answer; the sampled one, which is the likeliest, is listed twice."""
    begin, end = flat.start_indices[place], flat.end_indices[place]
    return list(dict(zip(flat.token_ids[begin:end], flat.logprobs[begin:end], strict=True)).items())


if __name__ == "__main__":
    serve(configure, answer)
