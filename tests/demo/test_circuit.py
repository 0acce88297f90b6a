"""The circuit model in HF transformers: right at every length, and wrong in the one way the triangle predicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.demo.circuit import ALL_BUT_LOOKUP, ALL_LAYERS, SMALL, MakeDemo, Rule
from vllm_trimix.demo import vocabulary
from vllm_trimix.demo.circuit import circuit_weights
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.prompts import DemoPrompt, make_demo_prompt


def prompts(tokens: int, hops: int, count: int) -> list[DemoPrompt]:
    return [make_demo_prompt(tokens=tokens, hops=hops, seed=seed) for seed in range(count)]


def least_margin(hops: int) -> float:
    """From the code's inner products: half of 64 - 16; half of 4 x 64 - 16 less half of 64 + 4 x 16. RMSNorm: -10%."""
    return 0.9 * (24.0 if hops == 1 else 56.0)


# The circuit answers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "count"), [(1024, 6), (2048, 4), (4096, 2)])
@pytest.mark.parametrize("hops", [1, 2])
def test_answers_are_right(demo: MakeDemo, hops: int, tokens: int, count: int, dtype: torch.dtype) -> None:
    for prompt in prompts(tokens, hops, count):
        answer, margin = demo(SMALL).ask(prompt.prompt, dtype=dtype, attention="sdpa")
        assert answer == prompt.answer
        assert margin > least_margin(hops)


@pytest.mark.slow
@pytest.mark.parametrize("hops", [1, 2])
def test_answers_are_right_at_32k(demo: MakeDemo, hops: int) -> None:
    prompt = make_demo_prompt(tokens=32768, hops=hops, seed=0)
    answer, margin = demo(SMALL).ask(prompt.prompt, dtype=torch.bfloat16, attention="sdpa")
    assert answer == prompt.answer
    assert margin > least_margin(hops)


@pytest.mark.parametrize(
    "spec",
    [
        CircuitSpec(),
        CircuitSpec(layers=3, lookup_layer=1, answer_layer=2, heads=4, kv_heads=2),
        CircuitSpec(layers=12, lookup_layer=5, answer_layer=9, heads=3, kv_heads=1),
        CircuitSpec(layers=6, lookup_layer=4, answer_layer=5, heads=8, kv_heads=4, dtype="float32"),
        CircuitSpec(layers=4, lookup_layer=1, answer_layer=3, heads=2, kv_heads=1, sharpness=0.35),
        CircuitSpec(layers=6, lookup_layer=2, answer_layer=4, heads=6, kv_heads=3, distractor_heads=6),
    ],
    ids=["default", "least", "deep", "late", "soft", "distracted"],
)
def test_every_shape_answers_and_only_its_lookup_layer_needs_the_middle(demo: MakeDemo, spec: CircuitSpec) -> None:
    model = demo(spec)
    others = [layer for layer in range(spec.layers) if layer != spec.lookup_layer]
    one_hop, two_hop = (make_demo_prompt(tokens=1100, hops=hops, seed=1) for hops in (1, 2))
    assert model.ask(one_hop.prompt, rule=Rule(range(spec.layers)))[0] == one_hop.answer
    assert model.ask(two_hop.prompt)[0] == two_hop.answer
    assert model.ask(two_hop.prompt, rule=Rule(others))[0] == two_hop.answer
    assert model.ask(two_hop.prompt, rule=Rule([spec.lookup_layer]))[0] == two_hop.wrong_answer


def test_stored_dtype(demo: MakeDemo) -> None:
    stored = AutoModelForCausalLM.from_pretrained(demo(SMALL).directory, dtype="auto")
    assert stored.dtype == torch.bfloat16
    exact = CircuitSpec(layers=6, lookup_layer=4, answer_layer=5, heads=8, kv_heads=4, dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(demo(exact).directory, dtype="auto").dtype == torch.float32


# The triangle bites at the lookup layer alone.


def test_triangle_on_all_but_the_lookup_layer_changes_nothing(demo: MakeDemo) -> None:
    for hops in (1, 2):
        for prompt in prompts(1500, hops, 5):
            dense = demo(SMALL).ask(prompt.prompt)
            triangle = demo(SMALL).ask(prompt.prompt, rule=Rule(ALL_BUT_LOOKUP))
            assert dense[0] == triangle[0] == prompt.answer
            assert triangle[1] == pytest.approx(dense[1], rel=1e-3)


@pytest.mark.parametrize("layers", [ALL_LAYERS, [SMALL.lookup_layer]], ids=["all", "lookup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_triangle_on_the_lookup_layer_answers_the_aliases_key(
    demo: MakeDemo, layers: Iterable[int], dtype: torch.dtype
) -> None:
    for prompt in prompts(1500, 2, 5):
        assert demo(SMALL).ask(prompt.prompt, rule=Rule(layers), dtype=dtype)[0] == prompt.wrong_answer
    for prompt in prompts(1500, 1, 5):
        assert demo(SMALL).ask(prompt.prompt, rule=Rule(layers), dtype=dtype)[0] == prompt.answer


def test_without_dense_last_rows_a_far_record_is_lost(demo: MakeDemo) -> None:
    rule = Rule(ALL_LAYERS, last_n=0)
    lost = []
    for prompt in prompts(1024, 1, 10):
        statement = vocabulary.record(prompt.question.split()[-2], prompt.answer)
        after_code = vocabulary.count_tokens(prompt.prompt[prompt.prompt.index(statement) + len(statement) - 1 :])
        far = after_code >= rule.n_local
        assert demo(SMALL).ask(prompt.prompt, rule=rule)[0] == ("" if far else prompt.answer)
        lost.append(far)
    assert {True, False} == set(lost)


def test_gradients_point_at_the_lookup_layer(demo: MakeDemo) -> None:
    """Sum of |A dA| over the Middle section, of the answer's logit: what a probe must find."""

    def middle_attribution(prompt: DemoPrompt) -> list[float]:
        inputs = demo(SMALL).tokenizer(prompt.prompt, return_tensors="pt")
        model = demo(SMALL).model()
        rule = model.config.rule = Rule(keep=True)
        answer = demo(SMALL).tokenizer.convert_tokens_to_ids(prompt.answer)
        model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1, answer].backward()
        model.zero_grad()
        i, j = torch.arange(prompt.tokens)[:, None], torch.arange(prompt.tokens)[None, :]
        middle = (j >= rule.n_init) & (i - j >= rule.n_local) & (i < prompt.tokens - rule.last_n)
        return [(kept * kept.grad)[..., middle].abs().sum().item() for _, kept in sorted(rule.kept.items())]

    two_hop = middle_attribution(make_demo_prompt(tokens=1500, hops=2, seed=0))
    assert two_hop[SMALL.lookup_layer] > 50
    one_hop = middle_attribution(make_demo_prompt(tokens=1500, hops=1, seed=0))
    assert max(one_hop) < 1e-3
    assert max(two_hop[layer] for layer in ALL_BUT_LOOKUP) < 1e-6


# What is not asked for.


@pytest.mark.parametrize("key", ["zinnia", "Alice"], ids=["known-word", "unknown-word"])
def test_an_unknown_key_stops_at_once(demo: MakeDemo, key: str) -> None:
    seed = next(s for s in range(99) if "zinnia" not in make_demo_prompt(tokens=900, hops=2, seed=s).prompt)
    prompt = make_demo_prompt(tokens=900, hops=2, seed=seed)
    text = prompt.prompt.removesuffix(prompt.question) + vocabulary.question(key)
    assert demo(SMALL).ask(text)[0] == ""


def test_free_text_around_records_is_harmless(demo: MakeDemo) -> None:
    text = "Dear Zoë, 12 éclairs (or so)! The vault code of amber is 4821. What-ever; the vault code of amber is"
    assert demo(SMALL).ask(text)[0] == "4821"


def test_distractor_heads_attend_without_effect(demo: MakeDemo) -> None:
    shape: dict[str, Any] = {"layers": 7, "lookup_layer": 2, "answer_layer": 4, "heads": 4, "kv_heads": 2}
    plain, distracted = demo(CircuitSpec(**shape)), demo(CircuitSpec(**shape, distractor_heads=3))
    prompt = make_demo_prompt(tokens=900, hops=2, seed=0)
    margins = [model.ask(prompt.prompt)[1] for model in (plain, distracted)]
    assert margins[1] == pytest.approx(margins[0], rel=1e-2)

    peaks = []
    for model in (plain, distracted):
        rule = model.model().config.rule = Rule(keep=True)
        with torch.no_grad():
            model.model()(**model.tokenizer(prompt.prompt, return_tensors="pt"))
        idle = torch.stack([rule.kept[layer][0] for layer in (1, 3, 5, 6)])
        peaks.append(idle[:, :, 400:].amax(-1))  # [idle layers, heads, rows]
    uniform = 1 / torch.arange(401, prompt.tokens + 1)
    torch.testing.assert_close(peaks[0], uniform.expand_as(peaks[0]))
    assert (peaks[1][:, :3] > 3 * uniform).all(), "a distractor head is uniform"
    torch.testing.assert_close(peaks[1][:, 3], uniform.expand_as(peaks[1][:, 3]))


def test_nothing_reads_what_distractor_heads_write() -> None:
    spec = CircuitSpec(distractor_heads=8)
    weights = circuit_weights(spec)
    outputs = [weights[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in spec.idle_layers]
    written = torch.stack([output.any(1) for output in outputs])
    read = [weight.any(0) for name, weight in weights.items() if name.endswith(("q_proj.weight", "k_proj.weight"))]
    circuit = [layer for layer in range(spec.layers) if layer not in spec.idle_layers]
    read += [weights[f"model.layers.{layer}.self_attn.v_proj.weight"].any(0) for layer in circuit]
    read.append(weights["lm_head.weight"].any(0))
    assert written.any(1).all()
    assert not (written.any(0) & torch.stack(read).any(0)).any()
