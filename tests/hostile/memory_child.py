"""Runs a dynamic pattern over a prompt that was made to cost memory: job on stdin, what it cost on stdout."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

from vllm_trimix.backend.dynamic import cpu_pages
from vllm_trimix.backend.dynamic import prefill as dynamic
from vllm_trimix.backend.dynamic.cpu_pages import CpuPages, DenseTokens
from vllm_trimix.backend.dynamic.key_counter import KeyCounter
from vllm_trimix.backend.dynamic.layer_patterns import LayerPatterns
from vllm_trimix.kernels.sparse_index import Place, SparseIndex
from vllm_trimix.kernels.torch_cpu import known_layouts
from vllm_trimix.patterns.registry import make_pattern
from vllm_trimix.plan import DynamicSpan, Span

BLOCK_SIZE = 128


class CountedPages(CpuPages):
    """Pages that note how much is gathered and listed at once."""

    most_gathered = 0
    most_listed = 0
    still_held = 0
    previous: weakref.ref[torch.Tensor] | None = None
    parts = 0
    slabs = 0

    def gather(self, request: int, num_keys: int, first_head: int, num_heads: int) -> DenseTokens:
        self.still_held += self.previous is not None and self.previous() is not None
        gathered = super().gather(request, num_keys, first_head, num_heads)
        self.previous = weakref.ref(gathered.k)
        self.most_gathered = max(self.most_gathered, sum(x.numel() * x.element_size() for x in gathered))
        self.slabs += 1
        return gathered

    def attend(
        self,
        q: torch.Tensor,
        gathered: DenseTokens,
        index: SparseIndex,
        place: Place,
        out: torch.Tensor,
        keys_read: torch.Tensor,
    ) -> None:
        lists = [index.block_count, index.block_index, index.column_count, index.column_index]
        self.most_listed = max(self.most_listed, sum(x.numel() * x.element_size() for x in lists if x is not None))
        self.parts += 1
        super().attend(q, gathered, index, place, out, keys_read)


def cache(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages of [num_kv_heads, num_keys, head_size], stored by rows, and their block table."""
    num_kv_heads, num_keys, head_size = keys.shape
    stored = [
        x.view(num_kv_heads, num_keys // BLOCK_SIZE, BLOCK_SIZE * head_size).transpose(0, 1).contiguous()
        for x in (keys, values)
    ]
    return stored[0], stored[1], torch.arange(num_keys // BLOCK_SIZE, dtype=torch.int32)[None]


def hostile_keys(kind: str, num_kv_heads: int, num_keys: int, head_size: int) -> torch.Tensor:
    """Keys by what a choice makes of them: all alike, every other one large, or every other block."""
    keys = torch.zeros(num_kv_heads, num_keys, head_size, dtype=torch.bfloat16)
    if kind == "columns":
        keys[:, ::2, 0] = 8.0
    elif kind == "blocks":
        keys.view(num_kv_heads, -1, 2 * BLOCK_SIZE, head_size)[:, :, :BLOCK_SIZE, 0] = 8.0
    return keys


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(1)
    for name in ("MAX_KEY_BYTES", "MAX_CHOICE_BYTES", "MAX_INDEX_BYTES"):
        setattr(dynamic, name, job.get(name, getattr(dynamic, name)))
    num_heads, num_kv_heads, num_keys, num_rows = (job[key] for key in ("heads", "kv_heads", "keys", "rows"))
    head_size = job["head_size"]
    patterns = [make_pattern(entry, where="job") for entry in job["patterns"]]
    layer = LayerPatterns(
        [patterns[head % len(patterns)] for head in range(num_heads)],
        num_kv_heads=num_kv_heads,
        device=torch.device("cpu"),
    )
    keys = hostile_keys(job["prompt"], num_kv_heads, num_keys, head_size)
    k_pages, v_pages, block_table = cache(keys, torch.ones_like(keys))
    layout = known_layouts(BLOCK_SIZE, head_size)[0]
    pages = CountedPages(k_pages, v_pages, block_table, (layout, layout), BLOCK_SIZE, head_size**-0.5)
    q = torch.ones(num_rows, num_heads, head_size, dtype=torch.bfloat16)
    out = torch.full_like(q, torch.nan)
    counter = KeyCounter(torch.device("cpu"))
    cpu_pages.cpu_kernel()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    dynamic.prefill(layer, [DynamicSpan(Span(0, 0, num_rows, num_keys - num_rows), num_keys)], q, pages, out, counter)
    found = {
        "grown": _status("VmHWM") - before,
        "gathered": pages.most_gathered,
        "listed": pages.most_listed,
        "still held": pages.still_held,
        "slabs": pages.slabs,
        "parts": pages.parts,
        "density": counter.total() / counter.causal,
        "right": bool((out == 1).all()),
    }
    print(json.dumps(found))


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{key}:", 1)[1].split(None, 1)[0])


if __name__ == "__main__":
    main()
