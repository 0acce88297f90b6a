"""What every row of a step must be, by the contract alone: its class, and its output in fp64."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch

from tests.backend.v2_runner import (
    DYNAMIC_LAYERS,
    HEAD_SIZE,
    MAX_LEN,
    NUM_LAYERS,
    PATTERN,
    TRIANGLE_LAYERS,
    Model,
    dynamic_heads,
)
from vllm_trimix.kernels.reference import masked_attention
from vllm_trimix.patterns.selection import Chunk

TILE_ROWS = 64


@dataclass
class Request:
    """A request as the scheduler sees it.

    Attributes:
        number: Distinguishes its tokens from every other request's, also of those that had the same id.
        prompt_len: Prompt tokens.
        reason: Why the whole request must stay dense; None when it must not.
        stamp: What admission wrote into its ``extra_args``.
        prompt_logprobs: Whether it asks for them.
        known: Tokens known: its prompt, and what was sampled.
        computed: Tokens computed.
        pages: Its pages.
        running: Whether the runner knows it.
    """

    number: int
    prompt_len: int
    reason: str | None = None
    stamp: str | None = None
    prompt_logprobs: bool = False
    known: int = 0
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    running: bool = False

    def tokens(self, first: int, last: int) -> list[int]:
        """Ids of its tokens at positions ``first`` to ``last - 1``."""
        return [self.number * MAX_LEN + position for position in range(first, last)]


@dataclass
class Outcome:
    """Errors of every compared row, by the rule it was compared under.

    Attributes:
        error: Largest error against the fp64 definition; NaN if any is.
        budget: Largest error of a plain fp32 run against it.
        largest: Largest value.
        gap: Largest distance between the triangle's truth and the dense one.
        rows: Rows compared.
    """

    error: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    budget: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    largest: float = 0.0
    gap: float = 0.0
    rows: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        output: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        sparse: torch.Tensor,
        *,
        rule: str,
        causal: torch.Tensor,
        scale: float,
    ) -> None:
        """Compares one request's rows in one layer.

        Args:
            output: What the engine gave, [num_rows, num_heads, head_size].
            q: Queries, like ``output``.
            k: Keys of the request, [num_keys, num_kv_heads, head_size].
            v: Values, like ``k``.
            mask: Visible keys of each row, [num_rows, num_keys], or by head [num_heads, num_rows, num_keys].
            sparse: Rows under a sparse rule, [num_rows].
            rule: Its name.
            causal: The dense mask, like ``mask``.
            scale: Softmax scale.
        """
        wide = q.double(), k.double(), v.double()
        truth = _by_head(*wide, mask, scale)
        errors = (output.double() - truth).abs().amax(dim=(1, 2))
        plain = (_by_head(q, k, v, mask, scale).double() - truth).abs().amax(dim=(1, 2))
        self.largest = max(self.largest, float(truth.abs().max()))
        if sparse.any():
            self.gap = max(self.gap, float((masked_attention(*wide, causal, scale=scale) - truth).abs().max()))
        for kind, rows in ((rule, sparse), ("dense", ~sparse)):
            if not rows.any():
                continue
            # Not max(): a NaN must stay.
            so_far = torch.full_like(errors[:1], self.error[kind])
            self.error[kind] = float(torch.cat([so_far, errors[rows]]).max())
            self.budget[kind] = max(self.budget[kind], float(plain[rows].max()))
            self.rows[kind] += int(rows.sum())


def _by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """``masked_attention`` with a mask for all heads or one for each."""
    if mask.dim() == 2:
        return masked_attention(q, k, v, mask, scale=scale)
    group = q.shape[1] // k.shape[1]
    heads = [
        masked_attention(
            q[:, head, None], k[:, head // group, None], v[:, head // group, None], mask[head], scale=scale
        )
        for head in range(q.shape[1])
    ]
    return torch.cat(heads, 1)


def dynamic_rows(request: Request, positions: torch.Tensor, *, replays: bool) -> torch.Tensor:
    """A request's rows of a step that dynamic patterns compute: those before the last ones, if they fill a tile."""
    body = (positions < request.prompt_len - PATTERN.last_n) & (request.reason is None) & (not replays)
    return body & (body.sum() >= TILE_ROWS)


def dynamic_mask(
    layer: int, request: Request, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, body: torch.Tensor
) -> torch.Tensor:
    """Visible keys by head, [num_heads, num_rows, num_keys]: the rows of ``body`` by the layer's patterns.

    Args:
        layer: Layer.
        request: Request.
        q: Its rows of the step, [num_rows, num_heads, head_size].
        k: Its keys, [num_keys, num_kv_heads, head_size].
        positions: Of the rows, ascending.
        body: Rows of the patterns, [num_rows].
    """
    mask = (torch.arange(len(k)) <= positions[:, None]).repeat(q.shape[1], 1, 1)
    if not body.any():
        return mask
    num_keys = min(request.prompt_len, int(positions.max()) + 1)
    group = q.shape[1] // k.shape[1]
    for head, pattern in enumerate(dynamic_heads(layer, q.shape[1])):
        rows = q[None, :, head]
        last = rows[:, positions < num_keys][:, -max(1, pattern.last_rows) :]
        chunk = Chunk(rows[:, body], last, k[None, :num_keys, head // group], int(positions[body][0]), HEAD_SIZE**-0.5)
        mask[head, body] = pattern.select([pattern], chunk).mask(len(k))[0]
    return mask


def row_class(request: Request, position: int, *, replays: bool) -> str:
    """The class of one query row; ``replays`` where the step may replay a decode graph."""
    if position >= request.prompt_len:
        return "decode"
    if replays:
        return "graph_replay"
    if request.reason is not None:
        return request.reason
    if PATTERN.is_dense(request.prompt_len):
        return "short_prompt"
    return "last_n" if position >= request.prompt_len - PATTERN.last_n else "triangle"


def compare(model: Model, alive: dict[int, Request], outcome: Outcome, *, replays: bool) -> Counter[str]:
    """Compares the outputs of the model's last step with their definition.

    Args:
        model: The model.
        alive: Requests by number.
        outcome: Collects the errors.
        replays: Whether the step may replay a decode graph.

    Returns:
        Rows by class.
    """
    counts: Counter[str] = Counter()
    tokens = torch.tensor(model.tokens)
    for number in (tokens // MAX_LEN).unique().tolist():
        request = alive[number]
        rows = (tokens // MAX_LEN == number).nonzero()[:, 0]
        positions = tokens[rows] % MAX_LEN
        classes = [row_class(request, position, replays=replays) for position in positions.tolist()]
        counts.update(classes)
        sparse = torch.tensor([name == "triangle" for name in classes])
        keys = torch.arange(int(positions.max()) + 1)
        causal = keys <= positions[:, None]
        masked = torch.where(sparse[:, None], PATTERN.mask(positions, keys, request.prompt_len), causal)
        body = dynamic_rows(request, positions, replays=replays)
        counts["dynamic_layer_rows"] += len(DYNAMIC_LAYERS) * int(body.sum())
        for layer in range(NUM_LAYERS):
            q = model.q[layer][tokens[rows]]
            k, v = (table[layer][keys + number * MAX_LEN] for table in (model.k, model.v))
            if layer in TRIANGLE_LAYERS:
                mask, ours, rule = masked, sparse, "triangle"
            else:
                mask, ours, rule = dynamic_mask(layer, request, q, k, positions, body), body, "dynamic"
            outcome.add(model.outputs[layer][rows], q, k, v, mask, ours, rule=rule, causal=causal, scale=model.scale)
    return counts
