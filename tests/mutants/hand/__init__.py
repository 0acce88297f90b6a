"""Mutants by hand: defects of the kind that this field has shipped, or that only this code can have.

By folder of what they break, by file, and by the tests that must notice: the cheapest that do, not all.
"""

from __future__ import annotations

from tests.mutants.bench import Mutant
from tests.mutants.hand import backend, config, kernels, patterns

MUTANTS = tuple(
    Mutant(name, group.path, old, new, group.tests)
    for module in (patterns, kernels, config, backend)
    for group in module.GROUPS
    for name, old, new in group.defects
)

FAST = (
    "n_local not counting the query",
    "last_n by chunk instead of prompt",
    "min_prompt_len off by one",
    "starting_layer one too late",
)
"""What the fast run tries: the cheapest."""
