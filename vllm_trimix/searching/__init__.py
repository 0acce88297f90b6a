"""A pattern for each head: what each candidate would cost it and lose it, measured on the model, and the choice."""

# What command lines need; nothing here imports torch.
SCORES = ("output-error", "recall")
"""What can rank candidates, see ``measure``."""

ADAPTIVE = ("flexprefill", "xattention")
"""Patterns that decide for themselves how much a head reads."""

HEAD_BUDGET = 0.45
"""Share of dense attention's keys that a head may read by default. Of 30000 tokens the published default,
vertical-slash (1000, 6096), reads 0.42 when its diagonals lie together; whole blocks add a little."""

TOLERANCE = 0.02
"""What all heads of a layer together may lose for cheaper candidates: losses closer than this are equal."""
