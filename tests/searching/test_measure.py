"""Errors, recall and costs against their definitions, written out with whole maps; memory linear in the prompt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.probing.families import config_of, toy
from tests.probing.models import FAMILIES, tiny, tokens
from tests.searching.patterns import PATTERNS, Inputs, inputs
from vllm_trimix import hf_attention
from vllm_trimix.hf_attention import install, stock_layers
from vllm_trimix.hf_attention.layers import attention_layers
from vllm_trimix.kernels.sparse_index import build_index
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.searching import measure as measure_module
from vllm_trimix.searching import selected
from vllm_trimix.searching.measure import Measured, measure, output_weight
from vllm_trimix.searching.model import measure_prompt, output_weights
from vllm_trimix.searching.selected import Rule, chunks, select

ROOT = Path(__file__).parents[2]
HIDDEN = 24


def by_hand(
    data: Inputs, candidate: DynamicPattern, *, num_sparse: int, chunk: int | None, cap: float, weight: Any
) -> dict[str, list[float]]:
    """One candidate's figures for each head, from whole maps in fp64."""
    q, (k, v) = data.q.double(), (x.double().repeat_interleave(2, 0) for x in (data.k, data.v))
    num_heads, num_keys, _ = q.shape
    scores = q @ k.transpose(1, 2) * data.scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    causal = torch.ones(num_keys, num_keys, dtype=torch.bool).tril()
    dense = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
    mask = causal.repeat(num_heads, 1, 1)
    read = causal_keys = torch.zeros(num_heads, dtype=torch.int64)
    for part in chunks(data.q, data.k, num_sparse=num_sparse, chunk=chunk, scale=data.scale):
        for pattern in (candidate, type(PATTERNS["dense"])(block_size=candidate.block_size)):
            selection = select([pattern] * num_heads, part)
            keys = build_index(selection).keys_read().sum(1)
            if pattern is candidate:
                rows = slice(part.position, part.position + part.num_rows)
                mask[:, rows, : part.num_keys] = selection.mask(part.num_keys)
                mask[:, rows, part.num_keys :] = False
                read = read + keys
            else:
                causal_keys = causal_keys + keys
    sparse = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    projections = torch.eye(16).expand(num_heads, -1, -1) if weight is None else weight.transpose(0, 1)
    parts = (dense @ v)[:, :num_sparse] @ projections.double().transpose(1, 2)
    losses = ((sparse - dense) @ v)[:, :num_sparse] @ projections.double().transpose(1, 2)
    whole = parts.norm() if weight is None else parts.sum(0).norm()
    return {
        "density": (read / causal_keys).tolist(),
        "error": (losses.norm(dim=(1, 2)) / whole).tolist(),
        "own_error": (losses.norm(dim=(1, 2)) / parts.norm(dim=(1, 2))).tolist(),
        "recall": (dense * mask)[:, :num_sparse].sum(-1).mean(1).tolist(),
    }


def dense_output(data: Inputs, cap: float) -> torch.Tensor:
    scores = data.q @ data.k.repeat_interleave(2, 0).transpose(1, 2) * data.scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    causal = torch.ones(data.q.shape[1], data.q.shape[1], dtype=torch.bool).tril()
    return torch.softmax(scores.masked_fill(~causal, -torch.inf), -1) @ data.v.repeat_interleave(2, 0)


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("weighted", [True, False], ids=["projected", "raw"])
@pytest.mark.parametrize(("length", "last_n", "chunk"), [(113, 20, None), (500, 128, None), (500, 90, 200)])
def test_figures_are_their_definitions(
    length: int, last_n: int, chunk: int | None, weighted: bool, cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selected, "BLOCK_ROWS", 50)
    monkeypatch.setattr(measure_module, "BLOCK_ROWS", 50)
    data = inputs(tokens=length)
    weight = torch.randn(HIDDEN, 4, 16, generator=torch.Generator().manual_seed(3)) if weighted else None
    found = measure(
        data.q,
        data.k,
        data.v,
        dense_output(data, cap),
        candidates=list(PATTERNS.values()),
        num_sparse=length - last_n,
        chunk=chunk,
        rule=Rule(data.scale, cap),
        weight=weight,
    )
    for number, (name, candidate) in enumerate(PATTERNS.items()):
        truth = by_hand(data, candidate, num_sparse=length - last_n, chunk=chunk, cap=cap, weight=weight)
        for what, values in truth.items():
            got = [row[number] for row in getattr(found, what)]
            assert got == pytest.approx(values, rel=1e-4, abs=1e-6), (name, what)
    errors = torch.tensor(found.error)
    assert bool((errors[:, list(PATTERNS).index("dense")] == 0).all())
    assert bool((errors[:, list(PATTERNS).index("no_sinks")] > 0.1).all())


def test_a_head_without_any_weight_has_no_error() -> None:
    """Nor has a layer whose heads all write nothing."""
    data = inputs(tokens=200)
    weight = torch.randn(HIDDEN, 4, 16)
    weight[:, 1] = 0
    for zeroed in (weight, torch.zeros_like(weight)):
        found = measure(
            data.q,
            data.k,
            data.v,
            dense_output(data, 0.0),
            candidates=[PATTERNS["no_sinks"]],
            num_sparse=150,
            chunk=None,
            rule=Rule(data.scale),
            weight=zeroed,
        )
        assert found.error[1] == found.own_error[1] == [0.0]
        assert all((found.error[head][0] > 0.01) is (zeroed is weight) for head in (0, 2, 3))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_projection_is_found(name: str) -> None:
    model = tiny(name)
    text = model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for module in attention_layers(model).values():
        weight = output_weight(module, num_heads=4, head_size=size, hidden_size=64)
        assert weight is not None
        heads = torch.randn(4, size)
        child = getattr(module, "o_proj", None) or module.dense
        bias = 0 if child.bias is None else child.bias
        assert torch.allclose(torch.einsum("nhd,hd->n", weight, heads), child(heads.flatten()) - bias, atol=1e-5)
    # Not a matrix that can be read: the outputs count as they are.
    assert output_weight(module, num_heads=4, head_size=size + 1, hidden_size=64) is None
    del child.weight
    child.weight = torch.zeros(64, 4 * size, dtype=torch.int8)
    assert output_weight(module, num_heads=4, head_size=size, hidden_size=64) is None


@pytest.mark.parametrize("family", ["gpt2", "gemma4_text", "zamba2", "laguna", "minicpm3", "falcon_h1"])
def test_the_output_projection_of_other_families(family: str) -> None:
    """Conv1D keeps its matrix the other way round; heads, their sizes and those of values are each layer's own."""
    model = toy(config_of(family))
    stock, weights, seen = stock_layers(model), output_weights(model), {}
    settings = install(model, layers=[], pattern=Triangle())

    def attend(q: Any, k: Any, v: Any, *, layer: int, **rule: Any) -> Any:
        seen[layer] = q.shape[1], v.shape[3]
        return hf_attention.attend(q, k, v, **rule)

    settings.attend = attend
    with torch.no_grad():
        model(tokens(9))
    assert sorted(seen) == sorted(weights.keys() - stock.keys())
    for layer, (heads, size) in seen.items():
        weight = weights[layer]
        assert weight is not None
        assert weight.shape == (64, heads, size)
        module = attention_layers(model)[layer]
        child = next(getattr(module, name) for name in ("o_proj", "c_proj", "dense") if hasattr(module, name))
        outputs = torch.randn(heads, size)
        bias = 0 if getattr(child, "bias", None) is None else child.bias
        assert torch.allclose(torch.einsum("nhd,hd->n", weight, outputs), child(outputs.flatten()) - bias, atol=1e-4)


def test_the_model_stays_dense_and_is_left_as_it_was() -> None:
    model, ids = tiny("qwen3"), tokens(150)
    with torch.no_grad():
        before = model(ids).logits
    found: dict[int, Measured] = {}
    shapes = []
    model.register_forward_hook(lambda module, arguments, output: shapes.append(output.logits))
    measure_prompt(
        model, ids[0].tolist(), candidates=[PATTERNS["no_sinks"]], layers=[1, 3], last_n=10, done=found.__setitem__
    )
    assert sorted(found) == [1, 3]
    assert all(error > 0.01 for measured in found.values() for row in measured.error for error in row)
    assert torch.allclose(shapes[0][0, -1], before[0, -1], atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


_PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_trimix.searching import selected
from vllm_trimix.searching.candidates import published
from vllm_trimix.searching.model import measure_prompt, output_weights
# Blocks of rows that are small beside what must not grow: a map of one head would be 256 MiB.
selected.MAX_SCORES = 2**18
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, max_position_embeddings=16384)
model = LlamaForCausalLM(config).eval()
def peak(length):
    measure_prompt(model, (5,) * length, candidates=published(30000)[:2], layers=[0], last_n=128,
                   done=lambda *_: None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak(300)
print(peak(int(sys.argv[1])) - before)
"""


def test_memory_is_linear_in_the_length() -> None:
    def peak(length: int) -> int:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", _PEAK, str(length)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024

    short, long = peak(4096), peak(8192)
    assert long <= 2.2 * short
    assert long < 100 * 2**20
