"""What each candidate would cost each head of a layer, and lose it, measured on one prompt.

- ``density``: keys that the kernels would load for the head, of those that dense attention loads. Not the budget that
  the pattern names: whole blocks are read, and scattered diagonals cross many.
- ``error``: what the head's part of the layer's output is off by, after the output projection, relative to the whole
  layer's dense output (L2, over all sparse rows). A head that hardly counts in its layer hardly errs.
- ``own_error``: the same relative to the head's own part.
- ``recall``: share of the head's attention that falls on visible keys, mean over the sparse rows.

All of it in blocks of rows of one KV head's queries: memory is linear in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.selection import Chunk
from vllm_trimix.probing.memory import forward_bytes, largest_group
from vllm_trimix.searching.selected import (
    BLOCK_ROWS,
    MAX_SCORES,
    Reader,
    Rule,
    attend_scores,
    causal_keys,
    chunks,
    keys_read,
    row_blocks,
    select,
)


@dataclass(frozen=True)
class Measured:
    """One layer on one prompt, all [head][candidate].

    Attributes:
        density: Of dense attention's keys.
        error: Of the layer's output.
        own_error: Of the head's own part.
        recall: Of the head's attention.
    """

    density: list[list[float]]
    error: list[list[float]]
    own_error: list[list[float]]
    recall: list[list[float]]


def output_weight(module: Any, *, num_heads: int, head_size: int, hidden_size: int) -> torch.Tensor | None:
    """The output projection of an attention module, [hidden_size, num_heads, head_size]; None where it isn't plain.

    Args:
        module: The module.
        num_heads: Query heads.
        head_size: Of the values.
        hidden_size: Of the model.
    """
    for name in ("o_proj", "out_proj", "dense", "c_proj", "wo"):
        child = getattr(module, name, None)
        weight = getattr(child, "weight", None)
        if isinstance(weight, torch.Tensor) and type(child).__name__ == "Conv1D":
            # GPT-2 keeps its matrices the other way round.
            weight = weight.T
        if not isinstance(weight, torch.Tensor) or weight.shape != (hidden_size, num_heads * head_size):
            continue
        # Quantised weights are left alone: what their numbers mean is the quantiser's business.
        if weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
            return weight.detach().reshape(hidden_size, num_heads, head_size)
    return None


# Tensors of the size of one block's scores that exist at a time.
_BLOCK_TENSORS = 6
_LARGEST = 1e6


def needed_bytes(model: Any, *, length: int, dtype: torch.dtype, candidates: Sequence[DynamicPattern]) -> int:
    """Estimate of a search's peak: a forward pass, the candidates' block choices, and one block of rows.

    Args:
        model: Of transformers; without its weights is enough.
        length: Longest prompt with its answer, in tokens.
        dtype: Of weights and activations.
        candidates: Patterns.
    """
    group = largest_group(model)
    choices = sum(group * (length // pattern.block_size + 1) ** 2 for pattern in candidates)
    rows = _BLOCK_TENSORS * 4 * min(MAX_SCORES, BLOCK_ROWS * group * length)
    return forward_bytes(model, length=length, dtype=dtype) + choices + rows


class _Sums:
    """Sums over rows and chunks, float64 [num_heads, candidates], and each head's own square norm [num_heads]."""

    def __init__(self, num_heads: int, num_candidates: int, device: torch.device) -> None:
        shape = (num_heads, num_candidates)
        self.keys, self.causal, self.squares, self.recall = (
            torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(4)
        )
        self.own = torch.zeros(num_heads, dtype=torch.float64, device=device)

    def measured(self, whole: torch.Tensor, num_rows: int) -> Measured:
        """The ratios; a head or layer without any output has no error."""
        # 0 / 0: nothing is written, nothing is lost. Heads that cancel each other leave nothing to err against.
        error, own = (
            (self.squares / norm).sqrt().nan_to_num(nan=0.0, posinf=_LARGEST).tolist()
            for norm in (whole, self.own[:, None])
        )
        return Measured((self.keys / self.causal).tolist(), error, own, (self.recall / num_rows).tolist())


@torch.no_grad()
def measure(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dense: torch.Tensor,
    *,
    candidates: Sequence[DynamicPattern],
    num_sparse: int,
    chunk: int | None,
    rule: Rule,
    weight: torch.Tensor | None,
) -> Measured:
    """Measures every candidate on every head.

    Args:
        q: Queries of the prompt, [num_heads, prompt_len, head_size].
        k: Keys, [num_kv_heads, prompt_len, head_size].
        v: Values, like ``k``.
        dense: Dense attention's output, like ``q``.
        candidates: Patterns.
        num_sparse: First rows that would be sparse; the others are dense in any case and don't count.
        chunk: Tokens of a chunk; None: the whole prompt at once.
        rule: How scores are made.
        weight: Output projection, [hidden_size, num_heads, head_size]; None: outputs count as they are.
    """
    group = q.shape[0] // k.shape[0]
    sums = _Sums(q.shape[0], len(candidates), q.device)
    for kv_head in range(k.shape[0]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        grams = None
        if weight is not None:
            projection = weight[:, heads].float()
            grams = torch.einsum("nhd,nhe->hde", projection, projection)
        for part in chunks(q[heads], k[kv_head, None], num_sparse=num_sparse, chunk=chunk, scale=rule.scale):
            _measure_chunk(part, v[kv_head], candidates, rule, grams, sums, heads)
    return sums.measured(_square_norm(dense[:, :num_sparse], weight), num_sparse)


def _square_norm(dense: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Of a layer's output: of all heads' parts together, or of the heads' outputs where there is no projection."""
    total = torch.zeros((), dtype=torch.float64, device=dense.device)
    for start in range(0, dense.shape[1], BLOCK_ROWS):
        rows = dense[:, start : start + BLOCK_ROWS].transpose(0, 1).flatten(1).float()
        if weight is not None:
            rows = rows @ weight.flatten(1).float().T
        total += rows.square().sum(dtype=torch.float64)
    return total


def _squares(outputs: torch.Tensor, grams: torch.Tensor | None) -> torch.Tensor:
    """Sums of squares of heads' projected outputs, float64 [num_heads]."""
    if grams is None:
        return outputs.square().sum((1, 2), dtype=torch.float64)
    # |W x|^2 = x (W^T W) x, with W^T W of the size of a head.
    return ((outputs @ grams) * outputs).sum((1, 2), dtype=torch.float64).clamp(min=0)


def _measure_chunk(
    chunk: Chunk,
    v: torch.Tensor,
    candidates: Sequence[DynamicPattern],
    rule: Rule,
    grams: torch.Tensor | None,
    sums: _Sums,
    heads: slice,
) -> None:
    """Adds one chunk of one KV head's queries to the sums."""
    readers = []
    for number, candidate in enumerate(candidates):
        selection = select((candidate,) * chunk.num_heads, chunk)
        sums.keys[heads, number] += keys_read(selection)
        sums.causal[heads, number] += causal_keys(selection.tiles)
        readers.append(Reader(selection, chunk.num_keys))
    keys, first = chunk.k[0], chunk.position
    for start, stop in row_blocks(first, first + chunk.num_rows, chunk.num_heads):
        q = chunk.q[:, start - first : stop - first]
        causal = torch.arange(stop, device=q.device) <= torch.arange(start, stop, device=q.device)[:, None]
        scores = rule.scores(q, keys[:stop])
        truth, lse = attend_scores(scores.clone(), v[:stop], causal)
        sums.own[heads] += _squares(truth, grams)
        for number, (candidate, reader) in enumerate(zip(candidates, readers, strict=True)):
            if isinstance(candidate, Dense):
                sums.recall[heads, number] += stop - start
                continue
            j, visible = reader.block(start, stop)
            out, partial = attend_scores(scores[:, :, j], v[j], visible)
            sums.squares[heads, number] += _squares(out - truth, grams)
            sums.recall[heads, number] += (partial - lse).exp().sum(1, dtype=torch.float64)
