"""FLOPs and bytes of one layer's prefill, counted from the pattern, not from any kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_trimix.patterns.triangle import Triangle


def dense_pattern(length: int) -> Triangle:
    """Causal attention, as the triangle whose every row is a last row."""
    return Triangle(n_init=0, n_local=1, last_n=length)


def visible_keys(pattern: Triangle, length: int, start: int, end: int) -> int:
    """Keys that at least one of the rows ``[start, end)`` sees: the columns of their mask that aren't empty."""
    body_end = min(end, max(start, length - pattern.last_n))
    if body_end < end:
        return end
    window_start = max(0, start - pattern.n_local + 1)
    return min(pattern.n_init, window_start) + end - window_start


@dataclass(frozen=True)
class Work:
    """What a prefill can't do without.

    Attributes:
        pairs: Visible (query, key) pairs.
        flops: 4 * head_size for each pair and query head: a multiply and an add in each of the two products.
        bytes: Least memory traffic: the queries read once and the outputs written once; and for each chunk, each K and
            V element that some row of the chunk sees read once. Page tables, the write of K and V to the cache, and
            anything a kernel reads twice within a chunk are not counted.
    """

    pairs: int
    flops: int
    bytes: int


def count_work(
    pattern: Triangle,
    length: int,
    chunks: Sequence[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    q_bytes: int,
    kv_bytes: int,
    out_bytes: int,
) -> Work:
    """Counts one layer's prefill of one prompt.

    Args:
        pattern: Which keys each row sees; ``dense_pattern`` for causal attention.
        length: Prompt tokens.
        chunks: The [start, end) rows of each step, in order, covering the prompt.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Head size.
        q_bytes: Bytes of one query element.
        kv_bytes: Bytes of one cached element.
        out_bytes: Bytes of one output element.
    """
    pairs = pattern.visible_pairs(length)
    keys = sum(visible_keys(pattern, length, start, end) for start, end in chunks)
    rows = length * num_heads * head_size * (q_bytes + out_bytes)
    return Work(
        pairs=pairs,
        flops=4 * head_size * num_heads * pairs,
        bytes=rows + keys * 2 * num_kv_heads * head_size * kv_bytes,
    )


def roofline_fraction(work: Work, seconds: float, *, flops_per_s: float, bytes_per_s: float) -> float:
    """The time that the device's ceilings allow, as a fraction of the time taken."""
    return max(work.flops / flops_per_s, work.bytes / bytes_per_s) / seconds
