"""Tier D: what must not change the result, on the real CPU kernels and plans, in a model of a few layers.

Where a kernel promises the same bits the results are compared bit by bit; else both are held to the error budget of
what the rule says of the whole prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.budget import assert_within_budget
from tests.metamorphic.engine import VOCABULARY, Engine, Item, Sequence, Spec, masks, whole
from tests.tiers import Tier
from vllm_trimix.config.shallow import resolve_shallow
from vllm_trimix.kernels import cpp_sparse
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Request

pytestmark = pytest.mark.tier("D")

CASES = 450
"""Of each kind, in the full run."""
# Patterns that see everything, however they choose; of 64-token blocks all.
EVERYTHING: list[dict[str, Any]] = [
    {"pattern": "a_shape", "n_init": 0, "n_local": 1000},
    {"pattern": "a_shape", "n_init": 1000, "n_local": 1, "block_size": 128},
    {"pattern": "vertical_slash"},
    {"pattern": "vertical_slash", "vertical_size": 30, "slash_size": 1000},
    {"pattern": "block_sparse"},
    {"pattern": "block_sparse", "top_k": 9, "block_size": 128},
    {"pattern": "flexprefill", "gamma": 1.0, "tau": 0.0, "block_size": 64},
    {"pattern": "xattention", "threshold": 1.0, "block_size": 64},
    {"pattern": "dense"},
]
# Patterns that hide much of a few hundred keys.
SPARSE: list[dict[str, Any]] = [
    {"pattern": "a_shape", "n_init": 5, "n_local": 40, "block_size": 64},
    {"pattern": "vertical_slash", "vertical_size": 40, "slash_size": 110, "block_size": 64},
    {"pattern": "block_sparse", "top_k": 2, "block_size": 64},
    {"pattern": "flexprefill", "gamma": 0.5, "tau": 0.3, "block_size": 64},
    {"pattern": "xattention", "threshold": 0.5, "block_size": 64},
    {"pattern": "dense", "block_size": 64},
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_spec(rng: random.Random, shallow: dict[str, Any] | None = None, *, exact: bool = True) -> Spec:
    """A model with triangle layers; its first layer is dense, or has a pattern, by default an A-shape now and then.

    Args:
        rng: Draws.
        shallow: The entry of the first layer.
        exact: Leave patterns out whose choice depends on chunks.
    """
    heads, kv_heads = rng.choice([(4, 2), (4, 4), (4, 1), (8, 2)])
    if shallow is None and rng.random() < (0.5 if exact else 1):
        shallow = SPARSE[0] if exact else rng.choice(SPARSE)
    layers = ("shallow" if shallow else "dense", *rng.choice([("triangle",), ("triangle", "triangle")]))
    triangle = Triangle(rng.choice((0, 1, 8, 20)), rng.choice((1, 7, 30, 64)), rng.choice((0, 1, 10, 33)))
    return Spec(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=rng.choice((16, 32)),
        page_size=rng.choice((16, 32)),
        layout=rng.randrange(4),
        dtype=rng.choice((torch.float32, torch.bfloat16)),
        triangle=triangle,
        min_prompt_len=rng.choice((0, 0, 60)),
        shallow=None
        if shallow is None
        else resolve_shallow(
            shallow,
            triangle_layers=range(1, len(layers)),
            num_layers=len(layers),
            num_heads=heads,
            last_n=triangle.last_n,
        ),
        compiled=rng.random() < 0.7 and cpp_sparse.is_available(),
        seed=rng.getrandbits(30),
    )


def a_sequence(rng: random.Random, spec: Spec, *, reasons: tuple[str | None, ...] = (None,)) -> Sequence:
    """A request, its prompt often as long as a border of the rule."""
    places = (spec.triangle.dense_len, spec.min_prompt_len)
    length = rng.choice(places) + rng.randint(-1, 1) if rng.random() < 0.2 else rng.randint(1, 200)
    tokens = torch.tensor([rng.randrange(VOCABULARY) for _ in range(max(1, length) + rng.choice((0, 1, 2, 5)))])
    return Sequence(tokens, Request(max(1, length), rng.choice(reasons)))


def borders(rng: random.Random, spec: Spec, sequence: Sequence, start: int, end: int) -> list[int]:
    """Ends of chunks from one position to another, one of them often among the prompt's last rows."""
    inside = range(start + 1, end)
    chosen = set(rng.sample(inside, min(len(inside), rng.randint(1, 4))))
    last = sequence.prompt_len - rng.randint(1, max(1, spec.triangle.last_n))
    if last in inside and rng.random() < 0.6:
        chosen.add(last)
    return [*sorted(chosen), end]


def serve(engine: Engine, name: str, position: int, ends: list[int]) -> None:
    """A request alone: chunks, then its tokens one by one."""
    for end in [*ends, *range(ends[-1] + 1, len(engine.sequences[name].tokens) + 1)]:
        engine.step([Item(name, position, end - position)])
        position = end


def alone(spec: Spec, sequence: Sequence, *, seed: int = 0, ranks: int = 1) -> Engine:
    """The whole prompt in one step, then token by token; the result is ``results["it"]``."""
    engine = Engine(spec, ranks=ranks, seed=seed)
    engine.add("it", sequence)
    serve(engine, "it", 0, [sequence.prompt_len])
    return engine


def assert_is_the_rules(spec: Spec, sequence: Sequence, got: torch.Tensor, first: int = 0, **owner: Any) -> None:
    """A result, from a row on, within the budget of what the rule says of the whole sequence."""
    rule = masks(spec, sequence, **owner)
    truth, plain = (whole(spec, sequence.tokens, rule, dtype)[first:] for dtype in (torch.float64, spec.dtype))
    assert_within_budget(got[first:], truth, plain, what=f"{spec}, {sequence.request}")


def facts(spec: Spec, sequence: Sequence, ends: list[int], **others: bool) -> dict[str, bool]:
    """What tiers count."""
    prompt_len, triangle = sequence.prompt_len, spec.triangle
    sparse = not sequence.request.dense_reason and prompt_len >= spec.min_prompt_len
    last = range(max(0, prompt_len - triangle.last_n) + 1, prompt_len)
    found = {"straddling": any(end in last for end in ends), "cached": False, "resumed": False}
    return {"triangle": sparse and not triangle.is_dense(prompt_len)} | found | others


def seeds(tier: Tier, kind: str, *, sample: int = 6, full: int = CASES) -> Iterator[tuple[str, random.Random]]:
    """A key and draws for each case."""
    for number in range(tier.size(sample=sample, full=full)):
        yield f"{kind} {number}", random.Random(f"{kind} {number}")


def test_any_chunking_is_the_whole_prompt(tier: Tier) -> None:
    for key, rng in seeds(tier, "chunking"):
        spec = a_spec(rng)
        sequence = a_sequence(rng, spec)
        ends = borders(rng, spec, sequence, 0, sequence.prompt_len)
        engine = Engine(spec)
        engine.add("it", sequence)
        serve(engine, "it", 0, ends)
        assert_is_the_rules(spec, sequence, engine.results["it"])
        assert_is_the_rules(spec, sequence, alone(spec, sequence).results["it"])
        tier.case(key, **facts(spec, sequence, ends))


def test_company_and_order_in_the_batch_change_no_bit(tier: Tier) -> None:
    """Requests in one batch, in any order of any step, against each of them alone with the same chunks."""
    for key, rng in seeds(tier, "batch"):
        spec = a_spec(rng, exact=False)
        sequences = {
            str(name): a_sequence(rng, spec, reasons=(None, None, "opt_out")) for name in range(rng.randint(2, 3))
        }
        together, chunks = Engine(spec, seed=rng.getrandbits(9)), {}
        for name, sequence in sequences.items():
            together.add(name, sequence)
            ends = borders(rng, spec, sequence, 0, sequence.prompt_len)
            chunks[name] = [*ends, *range(ends[-1] + 1, len(sequence.tokens) + 1)]
            single = Engine(spec)
            single.add(name, sequence)
            serve(single, name, 0, ends)
            sequences[name] = sequence
            together.results[f"alone {name}"] = single.results[name]
        position, waiting = dict.fromkeys(sequences, 0), dict(chunks)
        while waiting:
            chosen = rng.sample(sorted(waiting), rng.randint(1, len(waiting)))
            together.step([Item(name, position[name], waiting[name][0] - position[name]) for name in chosen])
            for name in chosen:
                position[name] = waiting[name][0]
                waiting[name] = waiting[name][1:]
            waiting = {name: left for name, left in waiting.items() if left}
        for name, sequence in sequences.items():
            assert torch.equal(together.results[name], together.results[f"alone {name}"]), (key, spec, sequence.request)
        found = [facts(spec, sequence, chunks[name]) for name, sequence in sequences.items()]
        tier.case(key, **{fact: any(one[fact] for one in found) for fact in found[0]})


def test_block_ids_change_no_bit(tier: Tier) -> None:
    for key, rng in seeds(tier, "blocks"):
        spec = a_spec(rng, exact=False)
        sequence = a_sequence(rng, spec)
        first, second = (alone(spec, sequence, seed=seed).results["it"] for seed in (1, 2))
        assert torch.equal(first, second), (key, spec)
        tier.case(key, **facts(spec, sequence, [sequence.prompt_len]))


def test_a_prefix_hit_keeps_the_rule_of_its_rows(tier: Tier) -> None:
    """Rows that a cache holds have the rule of the request that left them; the others their own, as from a cold cache.

    Which requests share a cache is the product's policy: opted-out requests and triangle requests never do.
    """
    from vllm_trimix.backend.namespaces import namespace
    from vllm_trimix.config.entry import Resolved

    for key, rng in seeds(tier, "prefix", sample=24):
        spec = a_spec(rng, shallow=None)
        owner, other = (a_sequence(rng, spec, reasons=(None, None, None, "opt_out")) for _ in range(2))
        shorter = min(len(owner.tokens), len(other.tokens))
        common = rng.randint(shorter // 2, shorter)
        tokens = torch.cat((owner.tokens[:common], other.tokens[common:]))
        later = Sequence(tokens, other.request)
        resolved = Resolved(
            layers=(1,),
            num_layers=2,
            **{name: getattr(spec.triangle, name) for name in ("n_init", "n_local", "last_n")},
            min_prompt_len=spec.min_prompt_len,
            dense_backend=None,
            prompt_logprobs="dense",
            stats_log_interval=0,
            source="config",
            shallow=spec.shallow,
        )
        salts = [namespace(resolved, one.request.dense_reason, None) for one in (owner, later)]
        pages = min(common, later.prompt_len - 1) // spec.page_size if salts[0] == salts[1] else 0
        cached = pages * spec.page_size
        engine = Engine(spec, seed=rng.getrandbits(9))
        engine.add("owner", owner)
        serve(engine, "owner", 0, [owner.prompt_len])
        engine.add("later", later, engine.tables["owner"][:pages])
        ends = borders(rng, spec, later, cached, later.prompt_len)
        serve(engine, "later", cached, ends)
        # An answer of either kind of request never depends on what one of the other kind has cached.
        same = (owner.request.dense_reason is None) == (later.request.dense_reason is None)
        kept = {"owner": owner, "cached": cached} if same else {}
        assert_is_the_rules(spec, later, engine.results["later"], cached, **kept)
        assert_is_the_rules(spec, owner, engine.results["owner"])
        tier.case(key, **facts(spec, later, ends, cached=cached > 0))


def test_a_preempted_request_goes_on_as_if_nothing_happened(tier: Tier) -> None:
    """Preempted anywhere, and resumed from nothing or from what the cache kept, generated rows included."""
    for key, rng in seeds(tier, "resume"):
        spec = a_spec(rng)
        sequence = a_sequence(rng, spec)
        engine = Engine(spec, seed=rng.getrandbits(9))
        engine.add("it", sequence)
        total = len(sequence.tokens)
        done = borders(rng, spec, sequence, 0, rng.randint(1, total))
        position = 0
        for end in done:
            engine.step([Item("it", position, end - position)])
            position = end
        again = max(position, sequence.prompt_len)
        kept = rng.randint(0, min(position, again - 1) // spec.page_size) if rng.random() < 0.7 else 0
        engine.preempt("it", kept)
        engine.results["it"][kept * spec.page_size :] = torch.nan
        position = kept * spec.page_size
        ends = borders(rng, spec, sequence, position, again)
        serve(engine, "it", position, ends)
        assert_is_the_rules(spec, sequence, engine.results["it"])
        tier.case(key, **facts(spec, sequence, [*done, *ends], resumed=True, cached=kept > 0))


def test_slices_of_heads_are_all_heads(tier: Tier, tmp_path: Path) -> None:
    """Tensor parallelism: each rank with its own heads, of a head file those with its own global numbers."""
    for key, rng in seeds(tier, "slices"):
        plain = a_spec(rng)
        entries = [rng.choice(SPARSE) for _ in range(plain.heads)]
        path = tmp_path / "heads.json"
        layers = [entries] + [None] * (len(plain.layers) - 1)
        path.write_text(json.dumps({"format": "vllm-trimix-heads/1", "layers": layers}))
        shallow = resolve_shallow(
            {"heads": str(path)},
            triangle_layers=range(1, len(plain.layers)),
            num_layers=len(plain.layers),
            num_heads=plain.heads,
            last_n=plain.triangle.last_n,
        )
        spec = replace(plain, shallow=shallow, layers=("shallow", *plain.layers[1:]))
        sequence = a_sequence(rng, spec)
        together = alone(spec, sequence)
        rule = masks(plain, sequence) | {"shallow": chosen(together)}
        for engine in (together, *(alone(spec, sequence, ranks=ranks) for ranks in (2, 4))):
            got = engine.results["it"]
            truth, low = (whole(spec, sequence.tokens, rule, dtype) for dtype in (torch.float64, spec.dtype))
            assert_within_budget(got, truth, low, what=f"{engine.ranks} ranks, {spec}")
            # Where no KV head's group is cut, each head is computed by the same products in the same order.
            if engine.ranks <= spec.kv_heads and spec.compiled:
                assert torch.equal(got, together.results["it"]), (key, engine.ranks, spec)
        tier.case(key, **facts(spec, sequence, [sequence.prompt_len]))


def chosen(engine: Engine) -> torch.Tensor:
    """The mask of the shallow layer of a request that was served whole: bool [heads, num_tokens, num_tokens]."""
    spec, sequence = engine.spec, engine.sequences["it"]
    assert spec.shallow is not None
    i = torch.arange(len(sequence.tokens))
    mask = (i <= i[:, None]).repeat(spec.heads, 1, 1)
    rows = sequence.prompt_len - spec.shallow.last_n
    if rows > 0:
        mask[:, :rows] = torch.cat([selection.mask(len(i)) for selection in engine.selected])
    return mask


def test_chunks_at_block_borders_are_the_whole_prompt(tier: Tier) -> None:
    """Of the patterns that choose by the prompt, those that choose tile by tile; in one layer, of exact inputs."""
    for key, rng in seeds(tier, "aligned", full=150):
        entry = rng.choice([entry for entry in SPARSE if entry["pattern"] in ("block_sparse", "xattention")])
        spec = replace(a_spec(rng, entry), layers=("shallow",), dtype=torch.float32)
        length = rng.randint(200, 600)
        sequence = Sequence(torch.tensor([rng.randrange(VOCABULARY) for _ in range(length)]), Request(length))
        together = alone(spec, sequence)
        ends = [end for end in range(64, length, 64) if rng.random() < 0.4]
        engine = Engine(spec)
        engine.add("it", sequence)
        serve(engine, "it", 0, [*ends, length])
        truth, plain = (
            whole(spec, sequence.tokens, {"shallow": chosen(together)}, dtype) for dtype in (torch.float64, spec.dtype)
        )
        assert_within_budget(engine.results["it"], truth, plain, what=f"{ends} {spec}")
        tier.case(key)


def test_a_budget_for_everything_is_dense_attention(tier: Tier) -> None:
    for number, (key, rng) in enumerate(seeds(tier, "everything", sample=len(EVERYTHING))):
        spec = a_spec(rng, EVERYTHING[number % len(EVERYTHING)] | {"last_n": rng.choice((0, 40))})
        length = rng.randint(300, 600)
        tokens = torch.tensor([rng.randrange(VOCABULARY) for _ in range(length)])
        sequence = Sequence(tokens, Request(length))
        ends = borders(rng, spec, sequence, 0, length)
        engine = Engine(spec)
        engine.add("it", sequence)
        serve(engine, "it", 0, ends)
        assert engine.selected
        dense = replace(spec, layers=("dense", *spec.layers[1:]))
        assert_is_the_rules(dense, sequence, engine.results["it"])
        tier.case(key)
