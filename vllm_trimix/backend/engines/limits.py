"""How many tokens an engine would take with the user's flags: vLLM's own answer, without an engine."""

from __future__ import annotations

from typing import Any

from vllm_trimix.backend.engines.job import engine_arguments, reply, takes, usual_length
from vllm_trimix.backend.registration import register_trimix


def limits(*, model: str, flags: list[str], lengths: list[int]) -> dict[str, Any]:
    """The limit as far as some lengths ask for it.

    Args:
        model: As ``vllm serve`` takes it.
        flags: Engine flags.
        lengths: Lengths that may be asked, in tokens, ascending.

    Returns:
        ``longest``, the most tokens that are taken when they are asked for (None: all of ``lengths`` are), and
        ``usual``, what the engine takes by itself.
    """
    register_trimix()
    arguments = engine_arguments(model, flags)
    usual = usual_length(arguments)
    if arguments.max_model_len is not None and arguments.max_model_len >= 0:
        return {"longest": usual, "usual": usual}
    taken = [length for length in lengths if length <= usual or takes(arguments, length)]
    return {"longest": None if taken == lengths else max([usual, *taken]), "usual": usual}


if __name__ == "__main__":
    reply(lambda **job: {"ready": {"hardware": ""}, **limits(**job)})
