"""A small model and a serving engine around the real CPU kernels and plans: what vLLM does between them, and no more.

Layers are attention with projections and a residual. Keys and values live in shuffled pages, stored as one of vLLM's
CPU kernels stores them; a step plans its batch once, and each rank computes its own heads with pages of its own. Rows
that a plan leaves to the stock kernel are computed by the reference.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch

from vllm_trimix.backend.dynamic import cpu_pages
from vllm_trimix.backend.dynamic import prefill as dynamic
from vllm_trimix.backend.dynamic.cpu_pages import CpuPages
from vllm_trimix.backend.dynamic.key_counter import KeyCounter
from vllm_trimix.backend.dynamic.layer_patterns import LayerPatterns
from vllm_trimix.config.shallow import Shallow
from vllm_trimix.kernels import cpp_sparse, torch_sparse
from vllm_trimix.kernels.reference import masked_attention
from vllm_trimix.kernels.torch_cpu import known_layouts, triangle_prefill
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.selection import Selection
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import DynamicPlan, Plan, Request, Span, build_dynamic_plan, build_plan

VOCABULARY, HIDDEN, PAGES = 50, 32, 64


@dataclass(frozen=True)
class Spec:
    """A model and its settings.

    Attributes:
        layers: ``dense``, ``triangle`` or ``shallow`` each.
        heads: Query heads.
        kv_heads: KV heads.
        head_size: Head size.
        page_size: Tokens of a page.
        layout: Number of the stored layout of keys; values take the next one.
        dtype: Of weights and cache.
        triangle: The pattern.
        min_prompt_len: Shorter prompts are dense.
        shallow: Patterns of the ``shallow`` layers.
        compiled: Whether those run by the compiled kernel.
        seed: Of the weights.
    """

    layers: tuple[str, ...]
    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    layout: int
    dtype: torch.dtype
    triangle: Triangle
    min_prompt_len: int
    shallow: Shallow | None
    compiled: bool
    seed: int


class Sequence(NamedTuple):
    """A request: all of its tokens, those that it will generate included."""

    tokens: torch.Tensor
    request: Request

    @property
    def prompt_len(self) -> int:
        return self.request.prompt_len


class Weights:
    """Of a spec, in any precision: the same numbers rounded to the spec's."""

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(spec.seed)

        def made(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) / math.sqrt(shape[-2])).to(spec.dtype).to(dtype)

        self.embedding = (torch.randn(VOCABULARY, HIDDEN, generator=generator)).to(spec.dtype).to(dtype)
        size, layers = spec.head_size, range(len(spec.layers))
        self.q = [2 * made(spec.heads, HIDDEN, size) for _ in layers]
        self.k, self.v = ([made(spec.kv_heads, HIDDEN, size) for _ in layers] for _ in range(2))
        self.out = [made(spec.heads * size, HIDDEN) for _ in layers]


def _normed(x: torch.Tensor) -> torch.Tensor:
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


def _projected(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[num_tokens, heads, head_size], summed row by row and head by head: no bit depends on the others."""
    return (_normed(x)[:, None, :, None] * weights).sum(2)


def whole(spec: Spec, tokens: torch.Tensor, masks: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The model over a whole sequence, every step in one precision: [num_tokens, HIDDEN].

    Args:
        spec: The model.
        tokens: Token ids.
        masks: By kind of layer, bool [num_tokens, num_tokens], or by head [heads, num_tokens, num_tokens].
        dtype: The precision.
    """
    weights = Weights(spec, dtype)
    x = weights.embedding[tokens]
    for number, kind in enumerate(spec.layers):
        q, k, v = (_projected(x, w[number]) for w in (weights.q, weights.k, weights.v))
        k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.head_size**-0.5
        probs = torch.softmax(scores.masked_fill(~masks[kind], -math.inf), dim=-1)
        o = torch.einsum("hqk,khd->qhd", probs, v)
        x = x + o.flatten(1) @ weights.out[number]
    return x


class Item(NamedTuple):
    """Rows of one request in a step."""

    name: str
    position: int
    rows: int


@dataclass
class Engine:
    """Serves a spec's model, each layer's heads cut into ``ranks`` slices.

    ``seed`` shuffles the pages; ``selected`` is what patterns chose, in turn.
    """

    spec: Spec
    ranks: int = 1
    seed: int = 0
    tables: dict[str, list[int]] = field(default_factory=dict)
    results: dict[str, torch.Tensor] = field(default_factory=dict)
    selected: list[Selection] = field(default_factory=list)
    sequences: dict[str, Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.spec
        self.weights = Weights(spec, spec.dtype)
        self.free = list(range(1, PAGES))
        random.Random(self.seed).shuffle(self.free)
        # More ranks than KV heads: each has a copy of one.
        self.kv_heads = max(1, spec.kv_heads // self.ranks)
        layouts = known_layouts(spec.page_size, spec.head_size)
        self.layouts = (layouts[spec.layout], layouts[(spec.layout + 1) % len(layouts)])
        place = torch.arange(spec.page_size * spec.head_size).view(1, 1, -1)
        self.places = [layout.tokens(place).view(spec.page_size, spec.head_size) for layout in self.layouts]
        shape = (2, len(spec.layers), self.ranks, PAGES, self.kv_heads, spec.page_size * spec.head_size)
        self.cache = torch.full(shape, math.nan, dtype=spec.dtype)

    def add(self, name: str, sequence: Sequence, shared: list[int] | None = None) -> None:
        """Admits a request, on some pages that another has filled."""
        needed = -(-len(sequence.tokens) // self.spec.page_size)
        self.sequences[name] = sequence
        shared = shared or []
        self.tables[name] = [*shared, *(self.free.pop() for _ in range(needed - len(shared)))]
        self.results[name] = torch.full((len(sequence.tokens), HIDDEN), math.nan, dtype=self.spec.dtype)

    def preempt(self, name: str, kept_pages: int) -> None:
        """Takes a request's pages from some on, which others overwrite, and gives it new ones."""
        lost = self.tables[name][kept_pages:]
        self.cache[:, :, :, lost] = math.nan
        self.free = [*lost, *self.free]
        self.tables[name] = [*self.tables[name][:kept_pages], *(self.free.pop() for _ in lost)]

    def step(self, batch: list[Item]) -> None:
        """Computes a batch's rows."""
        spec, starts = self.spec, [0]
        for item in batch:
            starts.append(starts[-1] + item.rows)
        lens = [item.position + item.rows for item in batch]
        requests = [self.sequences[item.name].request for item in batch]
        last_n = spec.triangle.last_n if spec.shallow is None else spec.shallow.last_n
        plans: dict[str, Plan | DynamicPlan] = {
            "dense": build_plan(starts, lens, requests, pattern=spec.triangle, min_prompt_len=0, step_reason="dense"),
            "triangle": build_plan(starts, lens, requests, pattern=spec.triangle, min_prompt_len=spec.min_prompt_len),
            "shallow": build_dynamic_plan(starts, lens, requests, last_n=last_n, min_seq_len=0, min_rows=1),
        }
        table = torch.zeros(len(batch), max(len(self.tables[item.name]) for item in batch), dtype=torch.int32)
        for row, item in enumerate(batch):
            table[row, : len(self.tables[item.name])] = torch.tensor(self.tables[item.name])
        xs = [self.weights.embedding[self.sequences[i.name].tokens[i.position : i.position + i.rows]] for i in batch]
        for number, kind in enumerate(spec.layers):
            slices = [self._rank(number, rank, plans[kind], table, batch, xs) for rank in range(self.ranks)]
            o = torch.cat(slices, dim=1).flatten(1).split([item.rows for item in batch])
            xs = [x + part @ self.weights.out[number] for x, part in zip(xs, o, strict=True)]
        for item, x in zip(batch, xs, strict=True):
            self.results[item.name][item.position : item.position + item.rows] = x

    def _rank(
        self,
        number: int,
        rank: int,
        plan: Plan | DynamicPlan,
        table: torch.Tensor,
        batch: list[Item],
        xs: list[torch.Tensor],
    ) -> torch.Tensor:
        """One rank's heads of one layer: [num_rows, heads of the rank, head_size]."""
        spec, heads = self.spec, self.spec.heads // self.ranks
        own = slice(rank * heads, (rank + 1) * heads)
        first_kv = rank * heads * spec.kv_heads // spec.heads
        own_kv = slice(first_kv, first_kv + self.kv_heads)
        q = []
        for x, item in zip(xs, batch, strict=True):
            q.append(_projected(x, self.weights.q[number][own]))
            i = torch.arange(item.position, item.position + item.rows)
            pages = torch.tensor(self.tables[item.name])[i // spec.page_size]
            for kv, (weights, places) in enumerate(zip((self.weights.k, self.weights.v), self.places, strict=True)):
                rows = _projected(x, weights[number][own_kv])
                self.cache[kv, number, rank][pages[:, None], :, places[i % spec.page_size]] = rows.transpose(1, 2)
        queries = torch.cat(q)
        out = torch.full_like(queries, math.nan)
        k_pages, v_pages = self.cache[:, number, rank]
        pages_of = CpuPages(k_pages, v_pages, table, self.layouts, spec.page_size, spec.head_size**-0.5)
        if isinstance(plan, DynamicPlan):
            assert spec.shallow is not None
            patterns = spec.shallow.heads_of(number, rank * heads, heads)
            layer = LayerPatterns(patterns, num_kv_heads=self.kv_heads, device=torch.device("cpu"))
            kernel = (cpp_sparse if spec.compiled else torch_sparse).sparse_prefill
            with (
                mock.patch.object(cpu_pages, "cpu_kernel", return_value=kernel),
                mock.patch.object(dynamic, "select", self._select),
            ):
                dynamic.prefill(layer, plan.spans, queries, pages_of, out, KeyCounter(torch.device("cpu")))
        elif plan.triangle:
            triangle_prefill(
                queries,
                k_pages,
                v_pages,
                table,
                plan.triangle,
                k_layout=self.layouts[0],
                v_layout=self.layouts[1],
                block_size=spec.page_size,
                n_init=spec.triangle.n_init,
                n_local=spec.triangle.n_local,
                scale=spec.head_size**-0.5,
                out=out,
            )
        for span in plan.dense:
            self._dense(queries, pages_of, span, out)
        assert not out.isnan().any(), "a row was computed by nobody, or saw a key that no one wrote"
        return out

    def _select(self, *arguments: Any, select: Any = dynamic.select) -> Selection:
        """Remembers what the patterns chose."""
        self.selected.append(select(*arguments))
        return self.selected[-1]

    def _dense(self, q: torch.Tensor, pages: CpuPages, span: Span, out: torch.Tensor) -> None:
        end = span.position + span.num_rows
        k, v = (x.transpose(0, 1) for x in pages.gather(span.request, end, 0, self.kv_heads))
        rows = slice(span.first_row, span.first_row + span.num_rows)
        mask = torch.arange(end) <= torch.arange(span.position, end)[:, None]
        out[rows] = masked_attention(q[rows], k, v, mask, scale=pages.scale)


def masks(spec: Spec, sequence: Sequence, owner: Sequence | None = None, cached: int = 0) -> dict[str, torch.Tensor]:
    """What each row of a sequence sees, by kind of layer; ``cached`` rows have the rule of the request that left them.

    Shallow layers only where all heads are one A-shape: what other patterns choose is no matter of the rule.
    """
    n = len(sequence.tokens)
    i = torch.arange(n)
    causal = i <= i[:, None]
    rows = {kind: _rule(spec, sequence, kind, i) for kind in set(spec.layers)}
    if owner is not None:
        for kind, own in rows.items():
            own[:cached] = _rule(spec, owner, kind, i)[:cached]
    return {kind: causal & own for kind, own in rows.items()}


def _rule(spec: Spec, sequence: Sequence, kind: str, i: torch.Tensor) -> torch.Tensor:
    request, triangle = sequence.request, spec.triangle
    whole_prompt = torch.ones(len(i), len(i), dtype=torch.bool)
    if kind == "dense" or request.dense_reason:
        return whole_prompt
    if kind == "triangle":
        return whole_prompt if request.prompt_len < spec.min_prompt_len else triangle.mask(i, i, request.prompt_len)
    assert spec.shallow is not None
    (pattern,) = set(spec.shallow.heads_of(0, 0, spec.heads))
    assert isinstance(pattern, AShape)
    return Triangle(pattern.n_init, pattern.n_local, spec.shallow.last_n).mask(i, i, request.prompt_len)
