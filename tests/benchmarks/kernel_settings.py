"""Small settings of the kernel benchmark, the mask written out, and kernels that compute another one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.kernels import contenders
from benchmarks.kernels.problem import Problem, Settings
from vllm_trimix.patterns.triangle import Triangle


def settings(**changes: Any) -> Settings:
    base = Settings(
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        fp8=False,
        num_heads=4,
        num_kv_heads=2,
        head_size=64,
        block_size=32,
        chunk=256,
        pattern=Triangle(8, 100, 30),
        threads=1,
        repeats=1,
    )
    return dataclasses.replace(base, **changes)


def whole_mask(pattern: Triangle, length: int) -> torch.Tensor:
    positions = torch.arange(length)
    return pattern.mask(positions, positions, length)


TRIMIX_CPU = contenders.CONTENDERS["trimix_cpu"]
# A kernel that computes another pattern than the one it is asked for, and what it gets wrong.
MUTANTS = {
    "n_local-1": lambda pattern: dataclasses.replace(pattern, n_local=pattern.n_local - 1),
    "n_local+1": lambda pattern: dataclasses.replace(pattern, n_local=pattern.n_local + 1),
    "n_init-1": lambda pattern: dataclasses.replace(pattern, n_init=pattern.n_init - 1),
    "last_n-1": lambda pattern: dataclasses.replace(pattern, last_n=pattern.last_n - 1),
    "last_n+1": lambda pattern: dataclasses.replace(pattern, last_n=pattern.last_n + 1),
}


def mutated(problem: Problem, change: str) -> contenders.Prepared:
    wrong = dataclasses.replace(problem.settings, pattern=MUTANTS[change](problem.settings.pattern))
    return TRIMIX_CPU.prepare(dataclasses.replace(problem, settings=wrong))
