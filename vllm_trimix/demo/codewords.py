"""Token codes: nearly orthogonal words of +-1, so that an inner product tells whether two tokens are equal."""

from __future__ import annotations

import torch

CODE_BITS = 64
MAX_CODEWORDS = 32767

# Per power of x, logarithms of independent multipliers. x^9 lies in the subfield GF(8), which has room for three.
_MULTIPLIERS = {1: range(6), 5: range(6), 9: (1, 2, 5)}
_FIELD_POLYNOMIAL = 0b1000011  # x^6 + x + 1, primitive over GF(2).
_ORDER = 63


def codewords(count: int) -> torch.Tensor:
    """Words 1 to ``count`` of the extended BCH code (64, 15) as +-1, [count, 64] fp32.

    The generator's rows are Tr(b x), Tr(b x^5) and Tr(b x^9) for x in GF(64). Two words differ in 24 to 40 places, so
    their inner product is at most 16 in size, against 64 of a word with itself.

    Raises:
        ValueError: count is above 32767.
    """
    if count > MAX_CODEWORDS:
        raise ValueError(f"count: {count} is above {MAX_CODEWORDS}, the words of the code; use a smaller vocabulary")
    powers = [1]
    for _ in range(_ORDER - 1):
        doubled = powers[-1] << 1
        powers.append(doubled ^ _FIELD_POLYNOMIAL if doubled & 64 else doubled)

    def trace(log: int) -> int:
        total = 0
        for square in range(6):
            total ^= powers[(log << square) % _ORDER]
        return total

    rows = [
        [0, *(trace(log + power * x) for x in range(_ORDER))] for power, logs in _MULTIPLIERS.items() for log in logs
    ]
    bits = (torch.arange(1, count + 1)[:, None] >> torch.arange(len(rows))) & 1
    return (1 - 2 * ((bits @ torch.tensor(rows)) % 2)).float()
