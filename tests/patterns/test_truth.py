"""Every pattern's selection is the one that its paper's formulas give, whatever the chunk and the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch

from tests.budget import assert_within_budget
from tests.patterns import truth
from tests.patterns.chunks import SCALE, random_prompt
from vllm_trimix.patterns import estimate, flexprefill, xattention
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.flexprefill import FlexPrefill
from vllm_trimix.patterns.registry import PATTERNS
from vllm_trimix.patterns.selection import EVERYTHING, Chunk, Selection
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.patterns.xattention import XAttention

TRUTHS: dict[type, Callable[[truth.Head, Any], np.ndarray]] = {
    Dense: lambda head, p: truth.dense(head),
    AShape: lambda head, p: truth.a_shape(head, p.n_init, p.n_local),
    VerticalSlash: lambda head, p: truth.vertical_slash(head, p.vertical_size, p.slash_size, p.block_size),
    BlockSparse: lambda head, p: truth.block_sparse(head, p.top_k, p.block_size),
    FlexPrefill: lambda head, p: truth.flexprefill(
        head,
        p.gamma,
        p.tau,
        p.block_size,
        min_budget=p.min_budget,
        max_budget=p.max_budget,
        max_columns=flexprefill.MAX_COLUMNS,
    ),
    XAttention: lambda head, p: truth.xattention(head, p.threshold, p.stride, p.block_size),
}

# Heads of one kind, with parameters of their own: four query heads a call.
HEADS: dict[str, list[DynamicPattern]] = {
    "dense": [Dense()] * 4,
    "a_shape": [AShape(0, 1), AShape(5, 64), AShape(70, 100), AShape(64, 65)],
    "a_shape-128": [AShape(1, 127, 128), AShape(5, 128, 128), AShape(129, 129, 128), AShape(0, 300, 128)],
    "vertical_slash": [VerticalSlash(30, 100), VerticalSlash(37, 104), VerticalSlash(60, 140), VerticalSlash(31, 109)],
    "vertical_slash-few": [VerticalSlash(30, 50), VerticalSlash(40, 63), VerticalSlash(32, 65), VerticalSlash(33, 99)],
    "vertical_slash-128": [VerticalSlash(40, 101 + 9 * i, 128) for i in range(4)],
    "block_sparse": [BlockSparse(2), BlockSparse(3), BlockSparse(5), BlockSparse(4)],
    "block_sparse-128": [BlockSparse(2, 128), BlockSparse(3, 128), BlockSparse(100, 128), BlockSparse(2, 128)],
    "flexprefill-vertical_slash": [FlexPrefill(gamma, 0.0) for gamma in (0.05, 0.2, 0.4, 0.6)],
    "flexprefill-query_aware": [FlexPrefill(gamma, 1.0) for gamma in (0.3, 0.6, 0.8, 0.95)],
    "flexprefill-64": [
        FlexPrefill(0.3, 0.0, 64),
        FlexPrefill(0.6, 1.0, 64),
        FlexPrefill(0.5, 1.0, 64),
        FlexPrefill(0.1, 0.0, 64),
    ],
    # Bounded from below, from above, both, and with pooled blocks.
    "flexprefill-budgets": [
        FlexPrefill(0.05, 0.0, 64, 40),
        FlexPrefill(0.9, 0.0, 64, 0, 25),
        FlexPrefill(0.5, 1.0, 64, 30, 40),
        FlexPrefill(0.3, 0.0, 64, 10, 60),
    ],
    "flexprefill-0": [
        FlexPrefill(0.0, 0.0),
        FlexPrefill(0.0, 1.0),
        FlexPrefill(0.0, 0.0, 128, 20),
        FlexPrefill(0.3, 0.0),
    ],
    "xattention-0": [XAttention(threshold) for threshold in (0.0, 0.5, 0.0, 0.9)],
    "xattention": [XAttention(threshold) for threshold in (0.2, 0.5, 0.7, 0.9)],
    "xattention-64": [XAttention(threshold, 16, 64) for threshold in (0.2, 0.5, 0.7, 0.9)],
    "xattention-4": [XAttention(threshold, 4, 64) for threshold in (0.3, 0.5, 0.6, 0.8)],
}

# Position, sparse rows, keys.
CHUNKS = {
    "whole": (0, 460, 460),
    "partial-tiles": (77, 300, 377),
    "dense-last-rows": (150, 250, 460),
    "one-row": (459, 1, 460),
    "first-rows": (0, 70, 70),
}


def check(heads: Sequence[DynamicPattern], shape: tuple[int, ...], **prompt: Any) -> tuple[Selection, Chunk]:
    """Compares one chunk of the first random prompt that leaves nothing open."""
    for seed in range(20):
        source = random_prompt(460, num_heads=len(heads), seed=seed, **prompt)
        chunk = source.chunk(*shape)
        try:
            expected = [
                TRUTHS[type(pattern)](source.head(number, chunk), pattern) for number, pattern in enumerate(heads)
            ]
        except truth.Undecided:
            continue
        break
    selection = heads[0].select(heads, chunk)
    selected = selection.mask(chunk.num_keys).numpy()
    for number, pattern in enumerate(heads):
        wrong = np.argwhere(selected[number] != expected[number])
        assert len(wrong) == 0, f"head {number}: {len(wrong)} pairs, the first {wrong[0]} (row, key), {pattern}"
    return selection, chunk


def test_every_pattern_has_a_truth() -> None:
    assert set(TRUTHS) == set(PATTERNS.values())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("heads", HEADS)
def test_selection_is_the_papers(heads: str, chunk: str) -> None:
    check(HEADS[heads], CHUNKS[chunk])


@pytest.mark.parametrize("num_kv_heads", [1, 4], ids=["gqa4", "mha"])
@pytest.mark.parametrize("heads", HEADS)
def test_query_heads_read_their_own_kv_head(heads: str, num_kv_heads: int) -> None:
    check(HEADS[heads], (40, 310, 400), num_kv_heads=num_kv_heads, dtype=torch.bfloat16)


@pytest.mark.parametrize("heads", ["vertical_slash", "flexprefill-vertical_slash", "flexprefill-query_aware"])
def test_estimates_look_at_the_chunks_last_rows_only(heads: str) -> None:
    """More of them are given than the pattern looks at, or fewer exist: 31 rows, all but one dense."""
    check(HEADS[heads], (300, 30, 460))
    check(HEADS[heads], (429, 1, 460))


@pytest.mark.parametrize(
    "pattern",
    [VerticalSlash(), BlockSparse(), FlexPrefill(1.0, 0.0), FlexPrefill(1.0, 1.0), XAttention(1.0), AShape(0, 460)],
    ids=str,
)
def test_budgets_beyond_the_keys_hide_nothing(pattern: DynamicPattern) -> None:
    prompt = random_prompt(460)
    for chunk in (prompt.chunk(0, 460), prompt.chunk(77, 300, 460), prompt.chunk(0, 20)):
        selection = pattern.select([pattern] * 4, chunk)
        for number in range(4):
            expected = truth.dense(prompt.head(number, chunk))
            assert np.array_equal(selection.mask(chunk.num_keys)[number].numpy(), expected)


def test_short_prompts_are_dense_under_flexprefill() -> None:
    prompt = random_prompt(300)
    heads = [FlexPrefill(0.01, tau, 64) for tau in (0.0, 1.0, 0.0, 1.0)]
    everything = truth.dense(prompt.head(0, prompt.chunk(0, 256)))
    assert np.array_equal(heads[0].select(heads, prompt.chunk(0, 256)).mask(256)[0].numpy(), everything)
    assert not heads[0].select(heads, prompt.chunk(0, 257)).mask(257)[0, 255:].all()
    check(heads, (0, 257))


@pytest.mark.parametrize("block_size", [64, 128])
def test_flexprefill_trusts_pooled_attention_up_to_tau(block_size: int) -> None:
    """Just above and just below the distance, in one call on the same data: the truth has to switch as well."""
    for shape in ((0, 460, 460), (77, 250, 377)):
        prompt = random_prompt(460, num_heads=2)
        distances = [truth.js_distance(prompt.head(number, prompt.chunk(*shape)), block_size) for number in range(2)]
        assert 0.02 < min(distances) < max(distances) < 0.9
        for factor, trusts in ((0.999, False), (1.001, True)):
            heads = [FlexPrefill(0.4, factor * distance, block_size) for distance in distances]
            columns = check(heads, shape)[0].columns
            assert columns is not None
            assert (columns == EVERYTHING).all().item() is trusts


def test_flexprefill_widens_columns_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexprefill, "MAX_COLUMNS", 12)
    heads = [FlexPrefill(gamma, 0.0, 64) for gamma in (0.02, 0.9, 0.03, 0.8)]
    for shape in CHUNKS.values():
        check(heads, shape)
    columns = check(heads, CHUNKS["whole"])[0].columns
    assert columns is not None
    counts = (columns < EVERYTHING).sum(1)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert 0 < counts[0] <= 12


def exact_chunk(columns: dict[int, float], num_keys: int, position: int) -> Chunk:
    """A last row that gives all keys the score 0, but some another one."""
    q = torch.zeros(1, num_keys - position, 16)
    q[..., 0] = 1
    k = torch.zeros(1, num_keys, 16)
    for key, score in columns.items():
        k[:, key, 0] = score
    return Chunk(q=q, q_last=q[:, -1:], k=k, position=position, scale=1.0)


@pytest.mark.parametrize(("gamma", "count"), [(0.25, 128), (0.5, 256), (0.501, 257), (1.0, 512)])
def test_flexprefill_stops_when_gamma_is_reached(gamma: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 equal shares: exactly gamma is enough, one fewer is not. As many columns as the limit are not too many."""
    chunk = exact_chunk({}, 512, 511)
    columns = FlexPrefill(gamma, 0.0).select([FlexPrefill(gamma, 0.0)], chunk).columns
    assert columns is not None
    assert (columns < EVERYTHING).sum() == count
    for limit, kept in ((count, count), (count - 1, 0)):
        monkeypatch.setattr(flexprefill, "MAX_COLUMNS", limit)
        columns = FlexPrefill(gamma, 0.0).select([FlexPrefill(gamma, 0.0)], chunk).columns
        assert columns is not None
        assert (columns < EVERYTHING).sum() == kept


def test_xattention_stops_when_the_threshold_is_reached() -> None:
    """Two blocks hold a half each; the first and the tile's own hold nothing and come on top."""
    nothing = dict.fromkeys((*range(128), *range(384, 512)), -10000.0)
    chunk = exact_chunk(nothing, 512, 504)
    for threshold, count in ((0.5, 3), (0.501, 4)):
        blocks = XAttention(threshold).select([XAttention(threshold)], chunk).blocks[0, 0]
        assert blocks.sum() == count
        assert blocks[[0, 3]].all()


def plain_sums(q_last: torch.Tensor, k: torch.Tensor, *, in_parts: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums in fp32, row by row; the softmax's divisor in one go, or key by key."""
    num_last, num_keys = q_last.shape[1], k.shape[1]
    columns, slashes = torch.zeros(2, len(q_last), num_keys)
    for row in range(num_last):
        end = num_keys - num_last + row + 1
        keys = k[:, :end].repeat_interleave(len(q_last) // len(k), 0)
        scores = (keys @ q_last[:, row, :, None])[..., 0] * SCALE
        divisor = reduce(torch.logaddexp, scores.unbind(1))[:, None] if in_parts else scores.logsumexp(1, keepdim=True)
        probs = (scores - divisor).exp()
        columns[:, :end] += probs
        slashes[:, :end] += probs.flip(1)
    return columns, slashes


@pytest.mark.parametrize(("num_last", "num_keys"), [(1, 1), (5, 5), (1, 77), (40, 40), (20, 91)])
@pytest.mark.parametrize("max_scores", [1, 700, 10**4, 2**24], ids=["key-by-key", "parts", "large-parts", "whole"])
def test_sums_in_parts_are_the_sums(num_last: int, num_keys: int, max_scores: int) -> None:
    prompt = random_prompt(num_keys)
    q_last = prompt.q[:, num_keys - num_last :]
    got = estimate.column_and_slash_sums(q_last, prompt.k, SCALE, max_scores=max_scores)
    plain = plain_sums(q_last, prompt.k, in_parts=max_scores < 2**24)
    chunk = prompt.chunk(num_keys - num_last, num_last)
    by_hand = [truth.sums_of_last_rows(prompt.head(head, chunk), num_last) for head in range(4)]
    for which, name in enumerate(("columns", "slashes")):
        exact = torch.from_numpy(np.stack([sums[which] for sums in by_hand]))
        assert_within_budget(got[which], exact, plain[which], what=name)


def test_antidiagonals_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(460, seed=5)
    heads = [XAttention(threshold, 8, 64) for threshold in (0.2, 0.5, 0.7, 0.9)]
    for shape in CHUNKS.values():
        chunk = prompt.chunk(*shape)
        whole = heads[0].select(heads, chunk)
        monkeypatch.setattr(xattention, "MAX_SCORES", 1)
        parts = heads[0].select(heads, chunk)
        monkeypatch.undo()
        assert torch.equal(whole.blocks, parts.blocks)


def test_one_diagonal_crosses_up_to_two_blocks_of_a_tile() -> None:
    """Every distance by itself, in blocks of four: one column of heads a distance."""
    slashes = torch.eye(19, dtype=torch.bool)
    tiles = torch.arange(2, 5)[:, None] - torch.arange(5)
    blocks = estimate.slash_blocks(slashes, tiles, 4)
    head = truth.Head(np.zeros((20, 1)), np.zeros((19, 1)), position=9, num_rows=10, num_last=1, scale=1.0)
    for distance in range(19):
        expected = truth.crossed(head, {distance}, 4)
        assert {(2 + tile, block) for tile, block in blocks[distance].nonzero().tolist()} == expected, distance


@pytest.mark.parametrize("heads", HEADS)
def test_nothing_waits_for_the_device(heads: str) -> None:
    """Tensors without values: whatever would read one back fails."""
    prompt = random_prompt(460)
    for shape in CHUNKS.values():
        chunk = prompt.chunk(*shape)
        nowhere = chunk._replace(q=chunk.q.to("meta"), q_last=chunk.q_last.to("meta"), k=chunk.k.to("meta"))
        selection = HEADS[heads][0].select(HEADS[heads], nowhere)
        assert selection.blocks.shape == HEADS[heads][0].select(HEADS[heads], chunk).blocks.shape
