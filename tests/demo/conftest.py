"""Models are small: one thread computes them, and is the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.demo.circuit import Demo, MakeDemo
from vllm_trimix.demo.circuit_spec import CircuitSpec


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> MakeDemo:
    made: dict[CircuitSpec, Demo] = {}

    def make(spec: CircuitSpec) -> Demo:
        if spec not in made:
            made[spec] = Demo(tmp_path_factory.mktemp("model"), spec)
        return made[spec]

    return make
