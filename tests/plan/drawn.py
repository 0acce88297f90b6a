"""Steps to plan: arbitrary ones, with every border hit on purpose, and those of a scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from hypothesis import strategies as st

from tests.plan.step import Scheduled, Step
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Request

# Draws from [low, high], and one of some values.
Draw = Callable[[int, int], int]

_REASONS = (None, None, None, None, "opt_out", "prompt_logprobs")
_DYNAMIC_REASONS = (None, None, None, "opt_out_dynamic")


def _settings(draw: Draw) -> tuple[Triangle, int, int, int, int]:
    """The pattern, min_prompt_len, max_tail_rows, min_seq_len and min_rows: tiny, or those that are served."""
    if draw(0, 7) == 0:
        return Triangle(8, 512, 128), (0, 640, 4096)[draw(0, 2)], (0, 127, 128, 256)[draw(0, 3)], 4096, 64
    pattern = Triangle(n_init=draw(0, 6), n_local=draw(1, 9), last_n=draw(0, 7))
    return pattern, (0, 0, 12, 30)[draw(0, 3)], draw(0, 9), (0, 0, 12, 30)[draw(0, 3)], draw(1, 12)


def _near(draw: Draw, places: tuple[int, ...], low: int, high: int) -> int:
    """Anywhere in [low, high], or within one of some place."""
    if draw(0, 1):
        return draw(low, max(low, high))
    return min(max(low, high), max(low, places[draw(0, len(places) - 1)] + draw(-1, 1)))


def arbitrary_step(draw: Draw) -> Step:
    """Requests that know nothing of each other, with every border where the rule changes hit on purpose."""
    pattern, min_prompt_len, max_tail_rows, min_seq_len, min_rows = _settings(draw)
    longest = 3 * pattern.dense_len + 30
    batch = []
    for _ in range(draw(1, 6)):
        prompt_len = _near(draw, (pattern.dense_len, min_prompt_len, min_seq_len), 1, longest)
        borders = (prompt_len - pattern.last_n, prompt_len, pattern.n_init + pattern.n_local, min_seq_len)
        request = Request(prompt_len, _REASONS[draw(0, 5)], _DYNAMIC_REASONS[draw(0, 3)])
        kind = draw(0, 7)
        if kind == 0:  # Decode, or drafts to verify.
            item = Scheduled(request, prompt_len + draw(0, 9), draw(1, 6))
        elif kind == 1:  # Padding.
            item = Scheduled(request if draw(0, 1) else None, 0, 0)
        elif kind == 2:  # Of another kind of request, whose prompt length nobody knows.
            item = Scheduled(None, draw(0, longest), draw(1, 9))
        elif kind == 3:  # Resumed: all that was computed, or what the cache has lost of it.
            position = _near(draw, borders, 0, prompt_len - 1) if draw(0, 1) else 0
            end = _near(draw, borders, position + 1, prompt_len + draw(1, 20))
            item = Scheduled(request, position, end - position, cached=position > 0, resumed=True)
        else:  # A chunk of the prompt, its first perhaps behind cached rows.
            position = _near(draw, borders, 0, prompt_len - 1)
            end = _near(draw, borders, position + 1, prompt_len)
            item = Scheduled(request, position, end - position, cached=kind > 5 and position > 0)
        batch.append(item)
    reason = "graph_replay" if draw(0, 19) == 0 else None
    return Step(tuple(batch), pattern, min_prompt_len, max_tail_rows, min_seq_len, min_rows, reason)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """``arbitrary_step`` by hypothesis, which shrinks what fails."""
    return arbitrary_step(lambda low, high: draw(st.integers(low, high)))


class _Life:
    """A request from admission to its last token, as a scheduler sees it."""

    def __init__(self, rng: random.Random, prompt_len: int, block_size: int) -> None:
        self.request = Request(prompt_len, rng.choice(_REASONS), rng.choice(_DYNAMIC_REASONS))
        self.tokens, self.last = prompt_len, prompt_len + rng.randint(1, 12)
        self.resumed = False
        self.enter(rng, block_size)

    def enter(self, rng: random.Random, block_size: int) -> None:
        """Waits again; whole blocks before the last token may be cached."""
        hit = rng.randint(0, (self.tokens - 1) // block_size) if rng.random() < 0.4 else 0
        self.computed = hit * block_size
        self.cached = hit > 0


def scheduled_steps(seed: int) -> Iterator[Step]:
    """The steps of a scheduler: chunks by a budget of tokens, cache hits, preemptions, drafts, padding."""
    rng = random.Random(seed)
    draw = rng.randint
    pattern, min_prompt_len, max_tail_rows, min_seq_len, min_rows = _settings(draw)
    longest, block_size = 3 * pattern.dense_len + 30, rng.choice((1, 4, 16))
    budget = rng.choice((3, 8, 17, 64)) if pattern.n_local < 512 else rng.choice((256, 1000, 2048))
    places = (pattern.dense_len, min_prompt_len, min_seq_len)
    lives = [_Life(rng, _near(draw, places, 1, longest), block_size) for _ in range(draw(1, 5))]
    drafts, padding = draw(0, 3), draw(0, 2)
    while lives:
        left, batch, running = budget, [], []
        for life in lives:
            missing = life.tokens - life.computed
            # The first drafts come with the first decode.
            extra = draw(0, drafts) if missing == 1 and life.tokens > life.request.prompt_len else 0
            rows = min(left, missing + extra)
            if rows:
                batch.append(Scheduled(life.request, life.computed, rows, life.cached, life.resumed))
                running.append((life, rows, extra))
                left -= rows
        pads = (Scheduled(None, 0, 0),) * padding
        yield Step((*batch, *pads), pattern, min_prompt_len, max_tail_rows, min_seq_len, min_rows, None)
        for life, rows, extra in running:
            life.cached = False
            if life.computed + rows < life.tokens:
                life.computed += rows
                continue
            # All of the known tokens, and of the drafts some that were right.
            accepted = draw(0, rows - (life.tokens - life.computed)) if extra else 0
            life.computed, life.tokens = life.tokens + accepted, life.tokens + accepted + 1
            life.resumed = False
        lives = [life for life in lives if life.tokens <= life.last]
        if lives and rng.random() < 0.15:
            victim = lives.pop()
            victim.resumed = True
            victim.enter(rng, block_size)
            lives.append(victim)


def seeded_steps(seed: int, count: int) -> Iterator[Step]:
    """``count`` steps: every other one arbitrary, the others those of schedulers, one after the other."""
    rng = random.Random(seed)
    runs = 0
    scheduled: Iterator[Step] = iter(())
    for number in range(count):
        if number % 2:
            yield arbitrary_step(rng.randint)
            continue
        step = next(scheduled, None)
        while step is None:
            scheduled = scheduled_steps(seed * 2**32 + runs)
            runs += 1
            step = next(scheduled, None)
        yield step
