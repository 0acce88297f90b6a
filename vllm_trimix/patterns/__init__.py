"""Patterns: which keys each query sees. One file each; the mask is the definition."""
