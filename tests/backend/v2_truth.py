"""What every row of a step must be, by the contract alone: its class, and its output in fp64."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch

from tests.backend.v2_runner import MAX_LEN, NUM_LAYERS, PATTERN, TRIANGLE_LAYERS, Model
from vllm_trimix.kernels.reference import masked_attention


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
        causal: torch.Tensor,
        scale: float,
    ) -> None:
        """Compares one request's rows in one layer.

        Args:
            output: What the engine gave, [num_rows, num_heads, head_size].
            q: Queries, like ``output``.
            k: Keys of the request, [num_keys, num_kv_heads, head_size].
            v: Values, like ``k``.
            mask: Visible keys of each row, [num_rows, num_keys].
            sparse: Rows under the triangle's rule, [num_rows].
            causal: The dense mask, like ``mask``.
            scale: Softmax scale.
        """
        wide = q.double(), k.double(), v.double()
        truth = masked_attention(*wide, mask, scale=scale)
        errors = (output.double() - truth).abs().amax(dim=(1, 2))
        plain = (masked_attention(q, k, v, mask, scale=scale).double() - truth).abs().amax(dim=(1, 2))
        self.largest = max(self.largest, float(truth.abs().max()))
        if sparse.any():
            self.gap = max(self.gap, float((masked_attention(*wide, causal, scale=scale) - truth).abs().max()))
        for kind, rows in (("triangle", sparse), ("dense", ~sparse)):
            if not rows.any():
                continue
            # Not max(): a NaN must stay.
            so_far = torch.full_like(errors[:1], self.error[kind])
            self.error[kind] = float(torch.cat([so_far, errors[rows]]).max())
            self.budget[kind] = max(self.budget[kind], float(plain[rows].max()))
            self.rows[kind] += int(rows.sum())


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
        for layer in range(NUM_LAYERS):
            q = model.q[layer][tokens[rows]]
            k, v = (table[layer][keys + number * MAX_LEN] for table in (model.k, model.v))
            mask, ours = (masked, sparse) if layer in TRIANGLE_LAYERS else (causal, torch.zeros_like(sparse))
            outcome.add(model.outputs[layer][rows], q, k, v, mask, ours, causal=causal, scale=model.scale)
    return counts
