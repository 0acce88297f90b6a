"""Steps of a million tokens on the meta device, driven through the package's own planning and attention layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import torch

from vllm_trimix.plan import Request

TOKENS = 2**20
"""Of every long prompt."""
NUM_LAYERS = 80
"""Of which the cache's blocks lie beside each other in some layouts."""
META = torch.device("meta")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CACHES = {"fp8": ("fp8_e4m3", torch.float8_e4m3fn), "fp8e5": ("fp8_e5m2", torch.float8_e5m2)}


@dataclass(frozen=True)
class Situation:
    """One step of one engine.

    Attributes:
        step: Name in ``STEPS``.
        heads: Query and KV heads of the model.
        tp: Tensor-parallel ranks.
        head_size: Head size.
        page: Tokens of a page.
        dtype: Of the model: ``bf16``, ``fp16`` or ``fp32``.
        cache: Of the cache: "" is the model's; ``fp8``, ``fp8e5``; ``fp8q`` quantises the queries too.
        capability: Compute capability times ten.
        layout: Order of layers, blocks, heads and tokens in the cache, as vLLM spells it.
        pattern: Name in ``PATTERNS`` of the layer's pattern; "" is the triangle.
    """

    step: str = "chunk8192"
    heads: tuple[int, int] = (64, 8)
    tp: int = 1
    head_size: int = 128
    page: int = 16
    dtype: str = "bf16"
    cache: str = ""
    capability: int = 90
    layout: str = "LBHNC"
    pattern: str = ""

    @property
    def local_heads(self) -> tuple[int, int]:
        """On one rank; KV heads are repeated where there are fewer than ranks."""
        return self.heads[0] // self.tp, max(1, self.heads[1] // self.tp)

    def __str__(self) -> str:
        heads = "x".join(map(str, self.heads))
        dtypes = self.dtype + (f"-{self.cache}" if self.cache else "")
        where = f"sm{self.capability}-{self.layout}"
        shape = f"{heads}-tp{self.tp}-d{self.head_size}-p{self.page}"
        return f"{self.pattern or 'triangle'}-{self.step}-{shape}-{dtypes}-{where}"


@dataclass(frozen=True)
class Rows:
    """A step's requests: prompt length, scheduled rows and keys after the step of each."""

    prompt_lens: list[int]
    rows: list[int]
    seq_lens: list[int]
    opted_out: frozenset[int] = frozenset()

    @property
    def starts(self) -> list[int]:
        starts = [0]
        for rows in self.rows:
            starts.append(starts[-1] + rows)
        return starts

    def requests(self) -> list[Request | None]:
        return [
            Request(length, "opt_out" if index in self.opted_out else None)
            for index, length in enumerate(self.prompt_lens)
        ]


def _one(rows: int, end: int = TOKENS) -> Rows:
    return Rows([TOKENS], [rows], [end])


def _mixed() -> Rows:
    """128 requests: decodes, chunks in the middle of a prompt, chunks that straddle its last rows, opted-out ones."""
    kinds = [
        # Rows, keys after the step; the prompt has TOKENS.
        *[(1, TOKENS + 500)] * 92,
        *[(129 + index, TOKENS - 5000 + index) for index in range(12)],
        *[(193 + index, TOKENS - index) for index in range(12)],
        *[(97 + index, TOKENS - 900) for index in range(12)],
    ]
    return Rows([TOKENS] * 128, [rows for rows, _ in kinds], [keys for _, keys in kinds], frozenset(range(116, 128)))


def covering(axes: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of two axes meet, by taking at each turn what meets most."""
    names = list(axes)
    left = {
        (first, a, second, b) for first, second in combinations(names, 2) for a in axes[first] for b in axes[second]
    }
    rows = []
    while left:
        first, a, second, b = min(left, key=repr)
        row = {first: a, second: b}
        for name in names:
            if name not in row:
                met = {value: len(_pairs({**row, name: value}, names) & left) for value in axes[name]}
                row[name] = max(axes[name], key=met.__getitem__)
        left -= _pairs(row, names)
        rows.append(row)
    return rows


def _pairs(row: dict[str, Any], names: list[str]) -> set[tuple[str, Any, str, Any]]:
    return {(x, row[x], y, row[y]) for x, y in combinations([name for name in names if name in row], 2)}


STEPS: dict[str, Callable[[], Rows]] = {
    "whole": lambda: _one(TOKENS),
    "chunk8192": lambda: _one(8192),
    "chunk2048": lambda: _one(2048),
    "middle8192": lambda: _one(8192, TOKENS // 2),
    # Short enough for slabs of several KV heads.
    "end16k": lambda: _one(8192, 2**14),
    "mixed128": _mixed,
    "tails128": lambda: Rows([TOKENS] * 128, [128] * 128, [TOKENS] * 128),
}


def patterns_of(name: str, num_heads: int) -> tuple[Any, ...]:
    """Patterns of a layer's query heads; ``mixed`` gives neighbours different kinds."""
    from vllm_trimix.patterns.a_shape import AShape
    from vllm_trimix.patterns.block_sparse import BlockSparse
    from vllm_trimix.patterns.flexprefill import FlexPrefill
    from vllm_trimix.patterns.vertical_slash import VerticalSlash
    from vllm_trimix.patterns.xattention import XAttention

    kinds: dict[str, tuple[Any, ...]] = {
        "vertical_slash": (VerticalSlash(),),
        "a_shape": (AShape(),),
        "block_sparse": (BlockSparse(),),
        "flexprefill": (FlexPrefill(),),
        "xattention": (XAttention(),),
        "mixed": (VerticalSlash(), AShape(), BlockSparse()),
    }
    kind = kinds[name]
    return tuple(kind[head % len(kind)] for head in range(num_heads))


class Layer:
    """One attention layer of a situation, its cache, its builder and its tensors of a step."""

    def __init__(self, situation: Situation) -> None:
        """Makes what lives as long as an engine; call it while launches are recorded."""
        from vllm_trimix.backend.dynamic.key_counter import KeyCounter
        from vllm_trimix.backend.dynamic.layer_patterns import LayerPatterns
        from vllm_trimix.backend.triangle.prefill import LayerGroup, LayerShape
        from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill
        from vllm_trimix.patterns.triangle import Triangle

        self.situation = situation
        self.num_heads, self.num_kv_heads = situation.local_heads
        self.dtype = _DTYPES[situation.dtype]
        self.triangle = Triangle()
        shape = LayerShape(self.num_heads, self.num_kv_heads, situation.head_size)
        self.prefill = TritonPrefill(
            LayerGroup(frozenset({shape}), self.triangle, self.dtype.itemsize, situation.page, META)
        )
        self.builder = _builder(self.prefill)
        self.impl = _impl(situation, self.triangle)
        if situation.pattern:
            heads = patterns_of(situation.pattern, self.num_heads)
            self.impl.trimix_dynamic = LayerPatterns(heads, num_kv_heads=self.num_kv_heads, device=META)
        self.counter = KeyCounter(META)
        self.scales = SimpleNamespace(**{f"_{name}_scale": torch.ones((), device=META) for name in "qkv"})
        self.kv_cache = self._cache()
        # As wide as vLLM's: the longest request, and some more for drafts.
        self.max_blocks = -(-(TOKENS + 1024) // situation.page)

    def warm_up(self) -> None:
        """vLLM's warm-up, on a step without requests of ours."""
        query, output = self._queries(16)
        metadata = SimpleNamespace(trimix_prefill=self.prefill, trimix_block_table=self._table(2))
        self.impl._warm_up(self.scales, query, self.kv_cache, metadata, output)

    def step(self, rows: Rows | None = None) -> None:
        """One step, the situation's where no other is given: its plan, then the layer."""
        rows = rows or STEPS[self.situation.step]()
        query, output = self._queries(rows.starts[-1])
        common = _common(rows, self._table(len(rows.rows)))
        arguments: dict[str, Any] = {
            "query_start_loc": rows.starts,
            "seq_lens": rows.seq_lens,
            "requests": rows.requests(),
        }
        step = SimpleNamespace(warming_up=False, stats=_stats())
        if self.situation.pattern:
            self._dynamic(arguments, step, common, query, output)
            return
        from vllm_trimix.plan import build_plan

        plan = build_plan(
            **arguments, pattern=self.triangle, min_prompt_len=4096, max_tail_rows=self.prefill.max_tail_rows
        )
        self.plan = plan
        bound = self.builder._step_plan(plan, step, common)
        self.impl._forward_triton(self.scales, query, self.kv_cache, bound, output)

    def _dynamic(self, arguments: dict[str, Any], step: Any, common: Any, query: Any, output: Any) -> None:
        from vllm_trimix.plan import build_dynamic_plan

        plan = build_dynamic_plan(**arguments, last_n=128, min_seq_len=4096, min_rows=128)
        self.builder._counter = self.counter
        bound = self.builder._dynamic_step(plan, None, step, common)
        self.impl._forward_dynamic(self.scales, query, self.kv_cache, bound, output)

    def _queries(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries' part of a layer's joint projection, and the output."""
        size = self.situation.head_size
        dtype = torch.float8_e4m3fn if self.situation.cache == "fp8q" else self.dtype
        joint = torch.empty(rows, (self.num_heads + 2 * self.num_kv_heads) * size, dtype=dtype, device=META)
        query = joint[:, : self.num_heads * size].view(rows, self.num_heads, size)
        return query, torch.empty(rows, self.num_heads, size, dtype=self.dtype, device=META)

    def _cache(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, page, 2 * head_size] in the situation's order, for 128 long requests."""
        situation = self.situation
        cache = situation.cache.removesuffix("q")
        dtype = _CACHES[cache][1] if cache else self.dtype
        extent = {
            "L": NUM_LAYERS,
            "B": 128 * -(-TOKENS // situation.page),
            "H": self.num_kv_heads,
            "N": situation.page,
            "C": 2 * situation.head_size,
        }
        memory = torch.empty([extent[dim] for dim in situation.layout], dtype=dtype, device=META)
        layer = memory.select(situation.layout.index("L"), 3)
        order = situation.layout.replace("L", "")
        return layer.permute(*(order.index(dim) for dim in "BHNC"))

    def _table(self, requests: int) -> torch.Tensor:
        return torch.empty(256, self.max_blocks, dtype=torch.int32, device=META)[:requests]


def _builder(prefill: Any) -> Any:
    """The package's builder without an engine around it: the dense remainder's metadata is asked of nobody."""
    from vllm_trimix.backend.builder import TrimixBuilder

    class Builder(TrimixBuilder):
        def __init__(self) -> None:
            self.device, self._prefill = META, prefill
            self._dense_builder = self._dynamic_dense_builder = SimpleNamespace(build=lambda *_: None)

    return Builder()


def _impl(situation: Situation, triangle: Any) -> Any:
    """The package's layer, without a dense backend behind it."""
    from vllm_trimix.backend.impl import TrimixImpl

    class Impl(TrimixImpl):
        trimix_kernel = "triton"

        def __init__(self) -> None:
            self.num_heads, self.num_kv_heads = situation.local_heads
            self.head_size, self.scale = situation.head_size, situation.head_size**-0.5
            cache = situation.cache.removesuffix("q")
            self._kv_cache_dtype = _CACHES[cache][0] if cache else "auto"
            self._triangle, self._soft_cap, self._cold, self.trimix_dynamic = triangle, 0.0, True, None

    return Impl()


def _common(rows: Rows, table: torch.Tensor) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor(rows.starts, dtype=torch.int32)
    lens = torch.tensor(rows.seq_lens, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=torch.empty(len(rows.starts), dtype=torch.int32, device=META),
        query_start_loc_cpu=starts,
        seq_lens=torch.empty(len(rows.rows), dtype=torch.int32, device=META),
        seq_lens_cpu_upper_bound=lens,
        num_reqs=len(rows.rows),
        num_actual_tokens=rows.starts[-1],
        max_query_len=max(rows.rows),
        max_seq_len=max(rows.seq_lens),
        block_table_tensor=table,
        slot_mapping=torch.empty(rows.starts[-1], dtype=torch.int64, device=META),
    )


def _stats() -> Any:
    from vllm_trimix.stats import Stats

    return Stats()
