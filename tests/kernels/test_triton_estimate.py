"""The Triton estimate of columns and slashes, interpreted on the CPU, against fp64."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.budget import is_within_budget
from tests.kernels.answer import Answer, Part
from tests.kernels.definition import MORE_RUNS
from tests.kernels.interpreter import on_device, read_pages, strided

pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")


@dataclass(frozen=True)
class EstimateCase:
    """One call: ``num_rows`` last rows over ``num_keys`` keys, the rows' own among them."""

    num_rows: int
    num_keys: int
    group: int = 2
    num_kv_heads: int = 1
    head_size: int = 64
    page_size: int = 16
    q_dtype: str = "float16"
    cache_dtype: str = ""
    order: str = "BHS"
    slab: tuple[int, int] | None = None
    huge: str = ""

    @property
    def heads(self) -> tuple[int, int]:
        return self.slab or (0, self.group * self.num_kv_heads)

    def facts(self) -> dict[str, bool]:
        """For the tier."""
        return {"cached": self.num_rows < self.num_keys}


def _cases() -> dict[str, EstimateCase]:
    cases = {}
    # Rows and keys on both sides of a block, of a group of rows and of a program's part.
    for num_rows, num_keys in (
        (1, 1),
        (1, 300),
        (5, 5),
        (63, 64),
        (64, 64),
        (64, 65),
        (64, 1300),
        (65, 65),
        (100, 900),
    ):
        cases[f"{num_rows}-rows-{num_keys}-keys"] = EstimateCase(num_rows, num_keys)
    for num_rows, num_keys in ((128, 128), (128, 191), (128, 1024), (128, 1025), (97, 2100)):
        cases[f"{num_rows}-rows-{num_keys}-keys"] = EstimateCase(num_rows, num_keys, group=1)
    for head_size in (16, 96, 128, 256):
        for q_dtype, cache_dtype in (
            ("float16", ""),
            ("bfloat16", ""),
            ("float32", ""),
            ("bfloat16", "float8_e4m3fn"),
            ("float8_e4m3fn", "float8_e4m3fn"),
            ("float16", "float8_e5m2"),
        ):
            cases[f"d{head_size}-{q_dtype}-{cache_dtype or 'same'}"] = EstimateCase(
                70, 333, group=1, head_size=head_size, q_dtype=q_dtype, cache_dtype=cache_dtype
            )
    for page_size in (16, 48, 128, 784):
        cases[f"page{page_size}"] = EstimateCase(40, 700, page_size=page_size, order="BSH")
    cases["slab"] = EstimateCase(40, 300, group=4, num_kv_heads=3, slab=(3, 6))
    for huge in ("q", "block_table", "BHS", "BSH", "SBH", "HBS"):
        order = huge if len(huge) == 3 else "BHS"
        cases[f"huge-{huge}"] = EstimateCase(9, 69, num_kv_heads=3, head_size=16, order=order, huge=huge)
    return cases


CASES = _cases()


class Launch:
    """A case on a device: its arguments, its launch, and what that must give.

    Attributes:
        case: The case.
        arguments: Of ``column_and_slash_sums``, on the device.
    """

    def __init__(self, case: EstimateCase, device: str = "cpu") -> None:
        self.case = case
        self._here, self._keys = _build(case)
        self.arguments: dict[str, Any] = dict(self._here) if device == "cpu" else on_device(self._here, device)
        self._sums: tuple[torch.Tensor, ...] = ()

    def fill(self, value: float) -> None:
        """Nothing: the sums are new tensors in each launch."""

    def run(self) -> None:
        """Launches; ``outputs`` waits for it."""
        from vllm_trimix.kernels import triton_estimate

        self._sums = triton_estimate.column_and_slash_sums(**self.arguments)

    def outputs(self) -> list[torch.Tensor]:
        """Copies of the columns and slashes, [heads, num_keys]."""
        return [sums.to("cpu", copy=True) for sums in self._sums]

    def answer(self) -> Answer:
        """The sums beside the definition: rows are keys, and distances."""
        from vllm_trimix.kernels.triton_estimate import pool

        case, arguments = self.case, self._here
        columns, slashes = self.outputs()
        keys = self._keys[self._owners()]
        # What the kernel multiplies in fp32: low-precision inputs, all else exact.
        truth = _sums(arguments, keys, torch.float64)
        orders = torch.Generator().manual_seed(0)
        plain = _sums(arguments, keys, torch.float32)
        for _ in range(MORE_RUNS):
            # As in ``definition.compare``: a plain run's largest error is a matter of the order of its sums.
            if all(map(is_within_budget, (columns, slashes), truth, plain)):
                break
            order = torch.randperm(keys.shape[2], generator=orders)
            other = _sums({**arguments, "q_last": arguments["q_last"][..., order]}, keys[..., order], torch.float32)
            plain = tuple(
                max(runs, key=lambda run: (run.double() - exact).abs().max().item())
                for *runs, exact in zip(plain, other, truth, strict=True)
            )
        parts = [
            Part(name, *(sums.T[:, :, None] for sums in compared), 0, ((name, 0, case.num_keys),))
            for name, *compared in zip(("columns", "slashes"), (columns, slashes), truth, plain, strict=True)
        ]
        answer = Answer(parts)
        if columns.dtype != torch.float32 or slashes.dtype != torch.float32:
            answer.faults.append(f"columns are {columns.dtype}, slashes {slashes.dtype}; expected float32")
        if not torch.allclose(columns.sum(1), torch.full((1,), float(case.num_rows))):
            answer.faults.append(f"the columns' sums are not {case.num_rows}, the number of rows")
        blocks = torch.stack([part.sum(1) for part in columns.split(64, dim=1)], dim=1)
        if not torch.allclose(pool(columns, 64), blocks):
            answer.faults.append("pooled sums are not the blocks' sums")
        return answer

    def reference(self) -> list[torch.Tensor]:
        """The parts' truth in plain PyTorch on the device, from the pages and the table that the kernel reads."""
        arguments = self.arguments
        pages = arguments["block_table"][arguments["request"]]
        keys = read_pages(arguments["k_cache"], pages, self.case.num_keys)[self._owners()]
        return [sums.cpu().T[:, :, None] for sums in _sums(arguments, keys, torch.float64)]

    def _owners(self) -> torch.Tensor:
        """KV head of each query head of the call."""
        first, heads = self.case.heads
        return torch.arange(first, first + heads) // self.case.group


def run_case(case: EstimateCase, device: str = "cpu") -> None:
    """Runs the kernel twice and asserts the result, and that it is the same; on ``cpu`` call it in the pool."""
    launch = Launch(case, device)
    launch.run()
    first = launch.outputs()
    launch.run()
    assert all(torch.equal(one, other) for one, other in zip(first, launch.outputs(), strict=True)), "two runs differ"
    launch.answer().check()


def error_of(case: EstimateCase, overrides: dict[str, Any]) -> str:
    """Message of the ValueError that the call raises with some arguments replaced; "" if it raises none."""
    from vllm_trimix.kernels.triton_estimate import column_and_slash_sums

    try:
        column_and_slash_sums(**(_build(case)[0] | overrides))
    except ValueError as error:
        return str(error)
    return ""


def _build(case: EstimateCase) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments, and the logical keys [num_kv_heads, num_keys, head_size]; whatever else the cache holds is NaN."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    q_dtype = getattr(torch, case.q_dtype)
    cache_dtype = getattr(torch, case.cache_dtype or case.q_dtype)
    max_pages = -(-case.num_keys // case.page_size)
    extent = {"B": max_pages + 1, "H": case.num_kv_heads, "S": case.page_size}
    shape = (*(extent[dim] for dim in case.order), case.head_size)
    cache = strided(shape, cache_dtype, huge=case.huge == case.order).permute(*map(case.order.index, "BHS"), 3)
    cache.fill_(math.nan)
    keys = torch.randn(case.num_kv_heads, case.num_keys, case.head_size, generator=generator).to(cache_dtype)
    pages = 1 + torch.randperm(max_pages, generator=generator)
    j = torch.arange(case.num_keys)
    for head in range(case.num_kv_heads):
        cache[pages[j // case.page_size], head, j % case.page_size] = keys[head]
    block_table = strided((3, max_pages), torch.int32, huge=case.huge == "block_table").zero_()
    block_table[1] = pages
    # The rows are the last of a step's, by row and head, as vLLM has them.
    num_heads = case.group * case.num_kv_heads
    q = strided((case.num_rows + 2, num_heads, case.head_size), q_dtype, huge=case.huge == "q")
    q.copy_(torch.randn(q.shape, generator=generator) * 2)
    first_head, heads = case.heads

    def scale(value: float, dtype: torch.dtype) -> torch.Tensor | None:
        return torch.tensor([value]) if dtype.itemsize == 1 else None

    arguments = {
        "q_last": q[2:, first_head : first_head + heads].transpose(0, 1),
        "k_cache": cache,
        "block_table": block_table,
        "request": 1,
        "num_keys": case.num_keys,
        "first_head": first_head,
        "group": case.group,
        "scale": case.head_size**-0.5,
        "q_scale": scale(1.25, q_dtype),
        "k_scale": scale(0.75, cache_dtype),
    }
    return arguments, keys


def _sums(arguments: dict[str, Any], keys: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and slashes by definition, every step in ``dtype``."""
    q, k = arguments["q_last"].to(dtype), keys.to(dtype)
    if arguments["q_scale"] is not None:
        q = q * arguments["q_scale"].to(dtype)
    if arguments["k_scale"] is not None:
        k = k * arguments["k_scale"].to(dtype)
    num_rows, num_keys = q.shape[1], k.shape[1]
    i = torch.arange(num_keys - num_rows, num_keys, device=q.device)[:, None]
    j = torch.arange(num_keys, device=q.device)[None, :]
    # One product after the other, as tensor cores add them; by powers of two, whose scale fp32 rounds once for all.
    scores = torch.zeros(q.shape[0], num_rows, num_keys, dtype=dtype, device=q.device)
    for d in range(q.shape[2]):
        scores += q[:, :, d, None] * k[:, None, :, d]
    scale = torch.tensor(arguments["scale"], dtype=dtype) * torch.tensor(math.log2(math.e), dtype=dtype)
    logits = (scores * scale).masked_fill(j > i, -math.inf)
    weights = torch.exp2(logits - logits.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    slashes = torch.zeros(q.shape[0], num_keys, dtype=dtype, device=q.device)
    for row in range(num_rows):
        own = num_keys - num_rows + row
        slashes[:, : own + 1] += weights[:, row, : own + 1].flip(1)
    return weights.sum(1), slashes


@pytest.mark.tier("C")
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(interpreter, tier, name):
    interpreter.submit(run_case, CASES[name]).result()
    tier.case(repr(CASES[name]), **CASES[name].facts())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scale": 0.0}, "scale 0.0 is not positive"),
        ({"request": 3}, "request 3 is outside the 3 rows of block_table"),
        ({"num_keys": 4}, "num_keys 4 is outside 5 to 16: the rows, and the table's pages"),
        ({"num_keys": 17}, "num_keys 17 is outside 5 to 16"),
        ({"first_head": 1}, "heads 1 to 2 are outside 1 KV heads of 2"),
        ({"group": 0}, "heads 0 to 1 are outside 1 KV heads of 0"),
        ({"q_last": torch.zeros(2, 129, 64).half()}, "q_last is torch.float16 [2, 129, 64]; expected [num_heads, 1 to"),
        ({"q_last": torch.zeros(2, 5, 64)}, "the cache is torch.float16; expected q's torch.float32 or one of"),
        ({"q_last": torch.zeros(2, 5, 32).half()}, "k_cache is [2, 1, 16, 64]; expected [num_blocks, num_kv_heads"),
        (
            {"q_last": torch.zeros(2, 64, 5).half().transpose(1, 2)},
            "the last dimension of q_last has stride 5; expected",
        ),
        ({"block_table": torch.zeros(3, 1)}, "block_table is torch.float32 [3, 1]; expected int32 [rows, blocks]"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32, device="meta")}, "block_table is on meta, q on cpu"),
        ({"k_scale": torch.ones(2)}, "k_scale is torch.float32 [2] on cpu; expected one float32 on cpu"),
    ],
)
def test_refuses_with_value_and_limit(interpreter, overrides, message):
    assert message in interpreter.submit(error_of, EstimateCase(5, 9), overrides).result()
