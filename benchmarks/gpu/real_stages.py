"""The stages of ``run_all.sh`` on published weights, last because most machines have none."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.stage import Stage

_TOY_REAL: dict[str, Any] = {
    "model": "tests/data/trained-small",
    "trimix": {"starting_layer": 0, "n_init": 2, "n_local": 6, "last_n": 4, "min_prompt_len": 0},
}
# By the suite of the evaluation; a prompt of 32K tokens takes an H200 some two seconds.
_SUITES: dict[str, tuple[float, list[str]]] = {
    "niah": (300, ["--lengths=8192,32768", "--samples=11"]),
    "agreement": (240, ["--lengths=32768", "--samples=20"]),
    "ppl": (150, ["--lengths=32768", "--samples=3"]),
    "ruler": (470, ["--lengths=32768", "--samples=4"]),
}


def _stages(short: str, name: str) -> list[Stage]:
    """What the mask costs a published model: skipped in a line where its weights aren't on the machine."""
    weights: dict[str, Any] = {"model": name, "trimix": {"preset": name}}
    evaluations = [
        Stage(
            f"real_{short}_{suite}",
            "benchmarks.gpu.real_models:evaluate",
            seconds,
            f"eval {suite} of {name}, if its weights are here: no loss beyond chance",
            {**weights, "suite": suite, "arguments": arguments},
            {**_TOY_REAL, "suite": "niah", "arguments": ["--lengths=256", "--samples=2"]},
        )
        for suite, (seconds, arguments) in _SUITES.items()
    ]
    return [
        *evaluations,
        Stage(
            f"real_{short}_probe",
            "benchmarks.gpu.real_models:probe",
            300,
            f"probe of {name}, if its weights are here: its layers beside the shipped ones",
            {**weights, "arguments": ["--length=8192", "--samples=16"]},
            {**_TOY_REAL, "arguments": ["--length=256", "--samples=4", "--n-init=2", "--n-local=6", "--last-n=4"]},
        ),
    ]


REAL = [*_stages("llama", "meta-llama/Llama-3.1-8B-Instruct"), *_stages("qwen", "Qwen/Qwen3-8B")]
