"""The section scores against autograd over plain attention, and against the circuit models' known answer."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.probing.families import config_of, toy
from tests.probing.models import ALL, NUM_LAYERS, WINDOWED, circuit, question, sample, tiny
from vllm_trimix import hf_attention
from vllm_trimix.hf_attention import dense_mask, install
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import gradient
from vllm_trimix.probing.gradient import (
    SCORES,
    SECTIONS,
    Objective,
    Sample,
    answer_logits,
    dense_pairs,
    score_sample,
    section_masks,
)

ROOT = Path(__file__).parents[2]
PATTERN = Triangle(n_init=3, n_local=17, last_n=9)
MIDDLE = SECTIONS.index("middle")


# Layers of several kinds: only those that can be sparse have scores.
MIXED = (
    "qwen3_next",
    "zamba2",
    "nemotron_h",
    "falcon_h1",
    "llama4_text",
    "gemma4_text",
    "gemma3n_text",
    "mimo_v2_flash",
)


def by_autograd(model: Any, sample: Sample, objective: Objective) -> dict[str, torch.Tensor]:
    """Every score by its formula, with the whole map of each layer kept by autograd: score -> [layers, sections]."""
    maps: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, **rule: Any) -> torch.Tensor:
        group, length = q.shape[1] // k.shape[1], q.shape[2]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        logits = q @ k.transpose(2, 3) * rule["scale"]
        if rule["soft_cap"]:
            logits = rule["soft_cap"] * torch.tanh(logits / rule["soft_cap"])
        visible = dense_mask(0, length, q.device)
        probabilities = torch.softmax(logits.masked_fill(~visible, float("-inf")), -1)
        probabilities.retain_grad()
        maps[layer] = probabilities, visible
        return probabilities @ v

    handle = install(model, layers=[], pattern=PATTERN)
    handle.attend = attend
    logits = answer_logits(model, sample)
    answer = torch.tensor(sample.answer)
    chosen = logits if objective == "logit" else torch.log_softmax(logits, -1)
    chosen.gather(1, answer[:, None]).sum().backward()
    handle.remove()
    found = {name: torch.zeros(NUM_LAYERS, len(SECTIONS), dtype=torch.float64) for name in SCORES}
    for layer, (a, visible) in maps.items():
        a, grad = a.detach().double(), a.grad.double()
        rows, heads = a.shape[2], a.shape[1]
        i, j = torch.arange(rows)[:, None], torch.arange(rows)[None, :]
        near = (j < PATTERN.n_init) | (i - j < PATTERN.n_local)
        last = i >= len(sample.prompt) - PATTERN.last_n
        for index, section in enumerate((near, ~near & last, ~near & ~last)):
            mask = section & (j <= i)
            centred = a * (grad - (a * grad).sum(-1, keepdim=True))
            seen = mask & visible
            found["contribution"][layer, index] = (a * grad * seen).abs().sum()
            found["gradient"][layer, index] = (grad * seen).abs().sum() / (mask.sum().clamp(min=1) * heads)
            found["centred"][layer, index] = (centred * seen).abs().sum()
            found["mass"][layer, index] = (a * seen).sum() / (rows * heads)
    return found


@pytest.mark.parametrize("objective", ["logit", "logprob"])
@pytest.mark.parametrize("name", [*ALL, *MIXED])
def test_scores_are_autograds(name: str, objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "BLOCK_ROWS", 16)
    monkeypatch.setattr(hf_attention, "BLOCK_ROWS", 16)
    probe = sample(70, 4)
    made = functools.partial(tiny, name) if name in ALL else lambda: toy(config_of(name))
    truth = by_autograd(made().double(), probe, objective)
    # The same in fp32 is the measure of what fp32 can do.
    plain = by_autograd(made(), probe, objective)
    scores = score_sample(made(), probe, PATTERN, objective=objective)
    for score in SCORES:
        got = torch.tensor(scores.values[score], dtype=torch.float64)
        largest = truth[score].abs().max()
        budget = 4 * (plain[score] - truth[score]).abs().max() + 1e-5 * largest
        assert bool(largest > 0) is bool(set(range(NUM_LAYERS)) - set(WINDOWED.get(name, ({}, []))[1]))
        assert (got - truth[score]).abs().max() <= budget, (score, got, truth[score])


def test_the_model_is_left_as_it_was() -> None:
    model, probe = tiny("llama"), sample(60, 2)
    with torch.no_grad():
        before = answer_logits(model, probe)
    score_sample(model, probe, PATTERN)
    assert not model.training
    assert "forward" not in vars(model.model.layers[0])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(answer_logits(model, probe), before)


def test_scores_repeat_bit_for_bit() -> None:
    model, probe = tiny("qwen3"), sample(60, 3)
    assert score_sample(model, probe, PATTERN) == score_sample(model, probe, PATTERN)


@settings(deadline=None)
@given(
    rows=st.integers(1, 60),
    answer=st.integers(0, 8),
    n_init=st.integers(0, 6),
    n_local=st.integers(1, 20),
    last_n=st.integers(0, 30),
)
def test_sections_part_the_causal_map(rows: int, answer: int, n_init: int, n_local: int, last_n: int) -> None:
    prompt_len = max(1, rows - answer)
    pattern = Triangle(n_init, n_local, last_n)
    visible = dense_mask(0, rows, torch.device("cpu"))
    masks = section_masks(pattern, prompt_len, 0, rows, visible)
    assert torch.equal(sum(mask.int() for mask in masks), visible.int())  # type: ignore[arg-type]
    # What the triangle shows is Streaming and Last.
    positions = torch.arange(rows)
    assert torch.equal(masks[0] | masks[1], pattern.mask(positions, positions, prompt_len))
    assert dense_pairs(pattern, prompt_len, rows) == tuple(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("lookup", [1, 2, 3, 4, 5])
def test_finds_the_lookup_layer_at_every_depth(lookup: int) -> None:
    """|A * dA| over Middle: all of it at the lookup layer, where a two-hop answer needs it; nothing for one hop."""
    model, tokenizer = circuit(lookup=lookup)
    two, one = (
        score_sample(model, question(tokenizer, tokens=800, hops=hops, seed=lookup), Triangle()) for hops in (2, 1)
    )
    middle = [row[MIDDLE] for row in two.values["contribution"]]
    assert middle[lookup] == pytest.approx(114, rel=0.1)
    assert sum(middle) - middle[lookup] < 1e-9
    assert sum(row[MIDDLE] for row in one.values["contribution"]) < 1e-9
    assert middle[-1] == 0
    # Attention mass points elsewhere: at layers without any part in the answer.
    mass = [row[MIDDLE] for row in two.values["mass"]]
    assert mass.index(max(mass)) != lookup


def test_the_papers_score_on_the_softened_circuit() -> None:
    """Scores x 0.35 give the softmax its slope back: the mean |dA| and the scores' gradient find the layer too."""
    model, tokenizer = circuit(sharpness=0.35)
    found = score_sample(model, question(tokenizer, tokens=800, hops=2, seed=1), Triangle()).values
    for score in ("contribution", "gradient", "centred"):
        middle = [row[MIDDLE] for row in found[score]]
        assert middle.index(max(middle)) == 3
        assert middle[3] > 20 * sorted(middle)[-2]
        assert middle[-1] == 0


def test_log_probability_saturates_where_the_model_is_sure() -> None:
    model, tokenizer = circuit()
    probe = question(tokenizer, tokens=800, hops=2, seed=1)
    middle = [row[MIDDLE] for row in score_sample(model, probe, Triangle(), objective="logprob").values["contribution"]]
    assert max(middle) < 1e-9


_PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing.gradient import Sample, score_sample
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, max_position_embeddings=16384)
model = LlamaForCausalLM(config).eval()
score_sample(model, Sample((5,) * 700, (6,)), Triangle())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score_sample(model, Sample((5,) * int(sys.argv[1]), (6,)), Triangle())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear_in_the_length() -> None:
    """The map of 8192 tokens alone would be 1 GiB a layer in fp32."""

    def peak(length: int) -> int:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", _PEAK, str(length)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024

    short, long = peak(4096), peak(8192)
    assert long <= 2.2 * short
    assert long < 200 * 2**20
