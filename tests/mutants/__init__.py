"""Tier G: defects put into the sources on purpose, each of which some test must notice.

``hand`` lists defects that matter here; ``generated`` takes more from a mutation tool. ``bench`` puts each into a copy
of the checkout and runs its tests there; ``python -m tests.mutants.run`` runs all and writes ``docs/mutants.md``.
"""
