"""Which layers can be triangle layers: importance of each section of the causal map, and the choice it justifies."""

SCORES = ("contribution", "gradient", "centred", "mass")
"""Gradient scores of a section, as ``gradient`` defines them; here for command lines, which don't import torch."""
