"""Where an output is wrong: how much of it, in which heads, rows and dims, and by what factor."""

from __future__ import annotations

from typing import Any

import torch

from tests.kernels.answer import Part

# A whole factor, such as a scale that was applied twice, leaves less than this of the wrong elements unexplained.
_FACTOR_RESIDUE, _FACTOR_LEAST = 0.1, 0.03
_MOST_RANGES = 6


def budget_of(part: Part) -> float:
    """Largest error that ``assert_within_budget`` allows."""
    plain = (part.plain.double() - part.truth).abs().max().item()
    return 2 * plain + torch.finfo(part.got.dtype).eps * part.truth.abs().max().item()


def wrong_of(part: Part, budget: float) -> torch.Tensor:
    """Elements that are no number or over the budget, bool [rows, heads, dims]."""
    # A comparison with NaN is false.
    return ~((part.got.double() - part.truth).abs() <= budget)


def share_of_budget(part: Part) -> float:
    """Largest error in units of the budget; infinite where something is no number."""
    error = (part.got.double() - part.truth).abs().max().item()
    return error / budget_of(part) if error == error else float("inf")


def describe(part: Part, *, tile_rows: int, origin: int = 0) -> dict[str, Any]:
    """What is wrong with a part; empty if nothing is.

    Args:
        part: Output and truth.
        tile_rows: Rows of the kernel's tiles.
        origin: Rows of its first tile that lie before the part.
    """
    budget = budget_of(part)
    wrong = wrong_of(part, budget)
    if not wrong.any():
        return {}
    row, head, dim = (int(index) for index in wrong.nonzero()[0])
    kind = next(name for name, begin, end in part.kinds if begin <= row < end)
    got, truth = part.got.double(), part.truth
    finite = wrong & got.isfinite()
    worst = (got - truth).abs()[finite].max().item() if finite.any() else None
    return {
        "part": part.what,
        "wrong": int(wrong.sum()),
        "share": round(wrong.double().mean().item(), 6),
        "nan": int(got.isnan().sum()),
        "infinite": int(got.isinf().sum()),
        "budget": budget,
        "error": worst,
        "first": {
            "row": row,
            "position": part.position + row,
            "head": head,
            "dim": dim,
            "got": got[row, head, dim].item(),
            "expected": truth[row, head, dim].item(),
            "kind": kind,
        },
        "kinds": {
            name: round(wrong[begin:end].double().mean().item(), 6)
            for name, begin, end in part.kinds
            if wrong[begin:end].any()
        },
        "pattern": _pattern(part, wrong, finite) + _tiles(wrong.any(2).any(1), tile_rows, origin),
    }


def _pattern(part: Part, wrong: torch.Tensor, finite: torch.Tensor) -> list[str]:
    """Sentences about the shape of what is wrong; what is wrong everywhere in a dimension is not mentioned."""
    found = []
    for name, dims in (("heads", (0, 2)), ("rows", (1, 2)), ("dims", (0, 1))):
        hit = wrong.any(dims[1]).any(dims[0])
        if not hit.all():
            found.append(f"{name} {ranges(hit.nonzero().flatten().tolist())} of {len(hit)} only")
    if wrong.shape[2] > 1 and wrong.all(2)[wrong.any(2)].all():
        found.append("whole rows")
    truth, got = part.truth[finite], part.got.double()[finite]
    if len(truth) > 1 and truth.square().sum() > 0:
        factor = ((got * truth).sum() / truth.square().sum()).item()
        residue = ((got - factor * truth).square().sum() / truth.square().sum()).sqrt().item()
        if abs(factor - 1) > _FACTOR_LEAST and residue < _FACTOR_RESIDUE * max(abs(factor - 1), _FACTOR_LEAST):
            found.append(f"got is {factor:.4g} times what is expected")
    return found


def _tiles(rows: torch.Tensor, tile_rows: int, origin: int) -> list[str]:
    """Whether whole tiles are wrong, or the same rows of each."""
    numbers = origin + rows.nonzero().flatten()
    tiles = (numbers // tile_rows).unique().tolist()
    if rows.all() or origin + len(rows) <= tile_rows:
        return []
    if all(rows[max(0, tile * tile_rows - origin) : (tile + 1) * tile_rows - origin].all() for tile in tiles):
        return [f"whole tiles of {tile_rows} rows: {ranges(tiles)}"]
    places = (numbers % tile_rows).unique().tolist()
    if len(places) <= tile_rows / 2 and len(tiles) > 1:
        return [f"rows {ranges(places)} of tiles of {tile_rows}"]
    return []


def ranges(numbers: list[int]) -> str:
    """``0-3, 7``: ascending numbers, shortly."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    shown = [f"{first}-{last}" if last > first else f"{first}" for first, last in found[:_MOST_RANGES]]
    return ", ".join(shown) + (", ..." if len(found) > _MOST_RANGES else "")
