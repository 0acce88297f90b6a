"""What the engine goes through: one function a scenario, each giving the engine it drove and what else must hold."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

from tests.backend.v2_engine import Engine
from tests.backend.v2_runner import DYNAMIC_LAYERS, MAX_REQUESTS, PATTERN
from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill

Make = Callable[..., Engine]
Notes = dict[str, Any]


def paths_are(engine: Engine, ours: list[str], stock_tails: list[str]) -> bool:
    """Whether the steps' rows went where they should, with the last rows of prompts by our kernel or the dense one."""
    return engine.model.paths == (ours if TritonPrefill.max_tail_rows else stock_tails)


def random_schedule(make: Make, *, seed: int, layout: str, group: int) -> tuple[Engine, Notes]:
    """Chunked prefill of several requests mixed with decodes, preemptions, ends and reused ids."""
    engine = make(layout=layout, group=group, seed=seed)
    chance = random.Random(seed)
    names = ["a", "b", "c", "d", "e"]
    preempted = 0
    for _ in range(9):
        gone = set()
        for name in names:
            if name in engine.requests and engine.requests[name].running and chance.random() < 0.2:
                if chance.random() < 0.5:
                    engine.preempt(name)
                    gone.add(name)
                    preempted += 1
                else:
                    engine.finish(name)
            if name not in engine.requests and engine.numbers < MAX_REQUESTS:
                stamp = chance.choice([None, None, None, "opt_out"])
                engine.add(name, chance.randint(17, 90), stamp=stamp, cached=chance.choice([0, 0, 0, 16]))
        scheduled: dict[str, int] = {}
        budget = chance.choice([20, 60, 100])
        for name in chance.sample(names, chance.randint(2, len(names))):
            left = engine.requests[name].known - engine.requests[name].computed
            if name not in gone and budget > 0:
                scheduled[name] = min(left, budget, chance.choice([1, 7, 40, 90]))
                budget -= scheduled[name]
        engine.step(scheduled)
    return engine, {"ended": engine.numbers > len(names), "preempted": preempted > 0}


def last_rows_straddle_chunks(make: Make) -> tuple[Engine, Notes]:
    """The prompt's last rows fall into three chunks, and into none of their own."""
    engine = make()
    engine.add("a", 70)
    engine.add("b", 66)
    for a, b in ((40, 20), (25, 40), (3, 5), (2, 1), (1, 1)):
        engine.step({"a": a, "b": b})
    return engine, {"last_n": engine.counted["last_n"] == 2 * PATTERN.last_n}


def short_prompts(make: Make) -> tuple[Engine, Notes]:
    """Prompts around the length at which the pattern begins to hide something, and requests that stay dense."""
    engine = make()
    for name, prompt_len in (("a", 1), ("b", PATTERN.dense_len), ("c", PATTERN.dense_len + 1)):
        engine.add(name, prompt_len)
    engine.add("d", 60, stamp="opt_out")
    engine.add("e", 60, prompt_logprobs=True)
    engine.step({"a": 1, "b": 28, "c": 29, "d": 30, "e": 40})
    engine.step({"a": 1, "b": 1, "c": 1, "d": 30, "e": 20})
    return engine, {"plan only where a row is sparse": engine.model.paths == ["gather", "stock"]}


def rows_gathered_or_sliced(make: Make) -> tuple[Engine, Notes]:
    """The dense remainder in one piece, in several, and none at all."""
    engine = make(layout="LBNHC", group=4)
    engine.add("a", 90)
    engine.add("b", 90, stamp="opt_out")
    engine.add("c", 20)
    engine.step({"a": 30, "c": 20})
    # Rows in order of length: decode, triangle, opted out; then opted out between two triangles.
    engine.step({"a": 20, "b": 25, "c": 1})
    engine.finish("c")
    engine.step({"a": 10, "b": 15})
    engine.add("d", 100)
    engine.step({"a": 11, "b": 12, "d": 13})
    engine.step({"d": 40})
    return engine, {"paths": engine.model.paths == ["slice", "gather", "slice", "slice", "triangle"]}


def preempted_and_resumed(make: Make) -> tuple[Engine, Notes]:
    """A resumed request prefills its answer too; its prompt ends where it always did."""
    engine = make(layout="LBNHC")
    engine.add("a", 60)
    engine.add("b", 50)
    engine.step({"a": 60, "b": 20})
    for _ in range(5):
        engine.step({"a": 1, "b": 2})
    engine.preempt("a")
    engine.step({"b": 20})
    states = engine.runner.req_states
    before = {"slot is free": "a" not in states.req_id_to_index}
    engine.step({"a": 30})
    index = states.req_id_to_index["a"]
    notes = {
        "runner prefills the answer": int(states.prefill_len.np[index]) == 66,
        "prompt is the prompt": int(states.prompt_len.np[index]) == 60,
    }
    engine.step({"a": 36, "b": 1})
    engine.step({"a": 1, "b": 1})
    return engine, {**before, **notes, "not streaming": "streaming_input" not in engine.counted}


def ids_reused(make: Make) -> tuple[Engine, Notes]:
    """An id that ends and comes again in one step is a new request, however long."""
    engine = make()
    engine.add("a", 40, stamp="opt_out")
    engine.add("b", 80)
    engine.step({"a": 40, "b": 30})
    engine.finish("a")
    engine.add("a", 90)
    engine.step({"a": 60, "b": 20})
    engine.finish("b")
    engine.add("b", 44, stamp="opt_out")
    engine.step({"a": 20, "b": 44})
    engine.finish("a")
    engine.finish("b")
    engine.step({})
    return engine, {"nothing is tracked": engine.counted["tracked_requests"] == 0}


def dummy_runs(make: Make) -> tuple[Engine, Notes]:
    """Warm-up batches, before and between real steps, neither plan nor count nor disturb."""
    engine = make()
    engine.dummy_step({"warm-up": 40})
    untouched = engine.counted == {}
    engine.add("a", 70)
    engine.step({"a": 40})
    before, table = engine.counted, dict(engine.tracked)
    engine.dummy_step({"a": 5, "x": 30}, positional=True)
    engine.dummy_step({"a": 1, "x": 1})
    same = before == engine.counted and table == engine.tracked
    engine.step({"a": 30})
    steps = ["stock", "triangle", "stock", "stock"]
    paths = paths_are(engine, [*steps, "triangle"], [*steps, "slice"])
    return engine, {"untouched": untouched, "same": same, "paths": paths}


def streaming_input(make: Make) -> tuple[Engine, Notes]:
    """The same id with a longer prompt: the prompt may grow again, so the session stays dense."""
    engine = make()
    engine.add("a", 60)
    engine.add("b", 90)
    engine.step({"a": 60, "b": 40})
    engine.extend_prompt("a", 120)
    engine.step({"a": 30, "b": 20})
    engine.step({"a": 30, "b": 20})
    return engine, {"counted": engine.counted["streaming_input"] == 60}


def cached_prefix(make: Make) -> tuple[Engine, Notes]:
    """Rows start behind what the prefix cache holds; the pages of a prefix are read, never written."""
    engine = make()
    engine.add("a", 80, cached=32)
    engine.add("b", 80, cached=64)
    engine.step({"a": 20, "b": 16})
    engine.step({"a": 28, "b": 1})
    return engine, {"cached": engine.counted["cached"] == 96}


def single_rows_with_graphs(make: Make) -> tuple[Engine, Notes]:
    """A prompt chunk of one row may replay a decode graph: dense, and counted; beside a longer chunk it is sparse."""
    engine = make(full_graphs=True)
    for name in ("a", "b", "c"):
        engine.add(name, 64)
    engine.step({"a": 40, "b": 64, "c": 64})
    replayed = []
    for scheduled in ({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}, {"a": 1}):
        before = engine.runner.full_graphs
        engine.step(scheduled)
        replayed.append(engine.runner.full_graphs > before)
    engine.add("d", 100)
    engine.step({"a": 1, "b": 1, "d": 30})
    engine.step({"a": 20, "d": 30})
    return engine, {"replayed": all(replayed), "counted": engine.counted["graph_replay"] == 3}


def single_rows_without_graphs(make: Make) -> tuple[Engine, Notes]:
    """The same chunks without graphs are sparse."""
    engine = make()
    engine.add("a", 64)
    engine.add("b", 64)
    engine.step({"a": 40, "b": 64})
    engine.step({"a": 1, "b": 1})
    engine.step({"a": 1})
    return engine, {
        "sparse": paths_are(engine, ["triangle", "slice", "triangle"], ["slice", "slice", "triangle"]),
        "counted": "graph_replay" not in engine.counted,
    }


def verified_drafts(make: Make) -> tuple[Engine, Notes]:
    """Verification rows are dense wherever they stand; a prompt chunk as wide as they are may replay their graph."""
    from vllm.config.compilation import CUDAGraphMode

    engine = make(num_speculative_tokens=2)
    engine.add("a", 40)
    engine.add("b", 100)
    engine.step({"a": 40, "b": 20})
    engine.step({"a": 3, "b": 20}, drafts={"a": 2})
    engine.step({"a": 3, "b": 3}, drafts={"a": 2})
    eager = "graph_replay" not in engine.counted
    engine.config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    engine.step({"a": 3, "b": 3}, drafts={"a": 2})
    engine.step({"a": 2, "b": 30}, drafts={"a": 1})
    engine.step({"a": 3}, drafts={"a": 2})
    notes = {"eager": eager, "counted": engine.counted["graph_replay"] == 3, "decode": engine.counted["decode"] == 14}
    return engine, notes


def padded_requests(make: Make) -> tuple[Engine, Notes]:
    """Requests without rows, and tokens without requests, at the end of a batch that has a plan."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    engine = make(group=4, full_graphs=True)
    engine.runner.replays_plans = True
    engine.runner.cudagraph_manager.dispatch = lambda num_reqs, num_tokens, *_, **__: BatchExecutionDescriptor(
        CUDAGraphMode.FULL, num_tokens=num_tokens + 5, num_reqs=num_reqs + 3
    )
    engine.add("a", 70)
    engine.add("b", 30, stamp="opt_out")
    engine.step({"a": 40, "b": 30})
    engine.step({"a": 25, "b": 1})
    engine.step({"a": 5, "b": 1})
    paths = paths_are(engine, ["slice", "slice", "slice"], ["slice", "gather", "stock"])
    return engine, {"paths": paths, "replayed": engine.runner.full_graphs}


def dynamic_chunks(make: Make) -> tuple[Engine, Notes]:
    """Chunks that fill tiles, cut where no tile ends, beside decodes, opted-out rows and each other; resumed."""
    engine = make(layout="LBNHC", group=4)
    engine.add("a", 250)
    engine.add("b", 60, stamp="opt_out")
    engine.step({"a": 90, "b": 60})
    engine.step({"a": 70, "b": 1})
    engine.add("c", 240)
    # The prompt's last rows are in the chunk, and the choice is theirs.
    engine.step({"a": 90, "c": 110, "b": 1})
    engine.step({"a": 1, "c": 130})
    engine.preempt("a")
    engine.step({"c": 1})
    engine.step({"a": 251, "c": 1})
    rows = 90 + 70 + 82 + 110 + 122 + 242
    return engine, {"rows": engine.counted["dynamic_layer_rows"] == len(DYNAMIC_LAYERS) * rows}


COMBINATIONS = ((0, "LBHNC", 1), (1, "LBNHC", 4), (5, "BLNHC", 4))
SCENARIOS: dict[str, Callable[[Make], tuple[Engine, Notes]]] = {
    **{
        f"random-{layout}-gqa{group}": functools.partial(random_schedule, seed=seed, layout=layout, group=group)
        for seed, layout, group in COMBINATIONS
    },
    **{
        scenario.__name__: scenario
        for scenario in (
            last_rows_straddle_chunks,
            short_prompts,
            rows_gathered_or_sliced,
            preempted_and_resumed,
            ids_reused,
            dummy_runs,
            streaming_input,
            cached_prefix,
            single_rows_with_graphs,
            single_rows_without_graphs,
            verified_drafts,
            padded_requests,
            dynamic_chunks,
        )
    },
}
