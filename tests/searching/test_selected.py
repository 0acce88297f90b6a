"""Attention over a selection against the selection's own mask and the kernel that serves it."""

from __future__ import annotations

import pytest
import torch

from tests.budget import assert_within_budget
from tests.searching.patterns import PATTERNS, inputs
from vllm_trimix.kernels.sparse_index import build_index
from vllm_trimix.kernels.torch_sparse import sparse_prefill
from vllm_trimix.searching import selected
from vllm_trimix.searching.selected import Reader, Rule, attend, causal_keys, chunks, keys_read, row_blocks, select

SHAPES = {"one": (1, 0, None), "113": (113, 20, None), "700": (700, 128, None), "chunks": (700, 90, 150)}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows that begin and end inside of tiles, and an index in several parts."""
    monkeypatch.setattr(selected, "BLOCK_ROWS", 50)
    monkeypatch.setattr(selected, "_MAX_INDEX", 300)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_rows_and_keys_are_the_kernels(name: str, shape: str) -> None:
    """Visibility, output and keys read, chunk by chunk."""
    tokens, last_n, chunk = SHAPES[shape]
    data = inputs(tokens=tokens)
    pattern, rule = PATTERNS[name], Rule(data.scale)
    num_sparse = tokens - last_n
    got = torch.full_like(data.q, float("nan"))
    attend(data.q, data.k, data.v, [pattern] * 4, num_sparse=num_sparse, chunk=chunk, rule=rule, out=got)
    assert bool(got[:, num_sparse:].isnan().all())
    truth, plain = torch.empty_like(got[:, :num_sparse]).double(), torch.empty_like(got[:, :num_sparse])
    starts = []
    for part in chunks(data.q, data.k, num_sparse=num_sparse, chunk=chunk, scale=data.scale):
        selection = select([pattern] * 4, part)
        mask, rows = selection.mask(part.num_keys), slice(part.position, part.position + part.num_rows)
        starts.append(part.position)

        reader, seen = Reader(selection, part.num_keys), torch.zeros_like(mask)
        for start, stop in row_blocks(rows.start, rows.stop, 4):
            j, visible = reader.block(start, stop)
            seen[:, start - rows.start : stop - rows.start, j] = visible
        assert torch.equal(seen, mask)

        keys, values = (x[:, : part.num_keys].repeat_interleave(2, 0) for x in (data.k, data.v))
        scores = (data.q[:, rows].double() @ keys.double().transpose(1, 2)) * data.scale
        truth[:, rows] = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ values.double()
        index = build_index(selection)
        read = torch.zeros_like(index.block_count)
        out = torch.empty(part.num_rows, 4, 16)
        k, v = data.k[:, : part.num_keys], data.v[:, : part.num_keys]
        sparse_prefill(part.q.transpose(0, 1), k, v, index, scale=data.scale, out=out, keys_read=read)
        plain[:, rows] = worst(out.transpose(0, 1), data.q[:, rows], keys, values, mask, data.scale, truth[:, rows])
        assert torch.equal(keys_read(selection), read.double().sum(1))
        dense = build_index(select([PATTERNS["dense"]] * 4, part)).keys_read()[0].sum()
        if pattern.block_size == 64:
            assert causal_keys(selection.tiles) == int(dense)
    assert starts == list(range(0, num_sparse, chunk or tokens))
    assert_within_budget(got[:, :num_sparse], truth, plain)


def worst(
    kernel: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    truth: torch.Tensor,
) -> torch.Tensor:
    """Of the kernel and plain runs whose scores are summed in other orders, what is farthest off, element by element.

    Scores are large here, so that an answer's error is its scores' rounding: luck of the order in which a processor's
    instructions add up.
    """
    dims = q.shape[-1]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(dims), *(torch.randperm(dims, generator=generator) for _ in range(3))]
    runs = [kernel]
    for order in orders:
        scores = (q[..., order] @ keys[..., order].transpose(1, 2)) * scale
        runs.append(torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ values)
    stacked = torch.stack(runs)
    farthest = (stacked.double() - truth).abs().argmax(0, keepdim=True)
    return stacked.gather(0, farthest)[0]


def test_heads_of_all_patterns_at_once() -> None:
    data = inputs(tokens=300)
    names = ["a_shape", "vertical_slash", "block_sparse", "dense"]
    together, alone = torch.zeros_like(data.q), torch.zeros_like(data.q)
    rule = Rule(data.scale, soft_cap=2.0)
    for out, choice in ((together, names), *((alone, [name] * 4) for name in names)):
        into = torch.zeros_like(out)
        patterns = [PATTERNS[name] for name in choice]
        attend(data.q, data.k, data.v, patterns, num_sparse=250, chunk=None, rule=rule, out=into)
        if out is together:
            together = into
        else:
            head = names.index(choice[0])
            alone[head] = into[head]
    assert torch.equal(together, alone)


def test_a_chunk_is_what_the_server_would_see() -> None:
    """Its sparse rows; its last rows, dense ones included, that patterns choose by; and all keys up to its end."""
    data = inputs(tokens=300)
    made = list(chunks(data.q, data.k, num_sparse=250, chunk=120, scale=data.scale))
    assert [(part.position, part.num_rows, part.num_keys) for part in made] == [
        (0, 120, 120),
        (120, 120, 240),
        (240, 10, 300),
    ]
    for part in made:
        assert torch.equal(part.q, data.q[:, part.position : part.position + part.num_rows])
        assert torch.equal(part.q_last, data.q[:, part.position : part.num_keys])
        assert torch.equal(part.k, data.k[:, : part.num_keys])


def test_soft_caps() -> None:
    data = inputs(tokens=40)
    rule = Rule(data.scale, soft_cap=0.5)
    scores = rule.scores(data.q[:1], data.k[0])
    plain = (data.q[:1] @ data.k[0].T) * data.scale
    assert torch.allclose(scores, 0.5 * torch.tanh(plain / 0.5))
    assert bool((plain.abs() > 1).any())


def test_a_block_of_rows_shrinks_before_its_scores_outgrow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected, "MAX_SCORES", 4000)
    blocks = list(row_blocks(10, 300, 2))
    assert [start for start, _ in blocks[1:]] == [stop for _, stop in blocks[:-1]]
    assert (blocks[0][0], blocks[-1][1]) == (10, 300)
    assert all(0 < (stop - start) * 2 * stop <= 4000 for start, stop in blocks)
