"""The code that stages run: where it is, and a name for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[3]
# What stages run. A change in any of it makes earlier results stale.
_SOURCES = (
    "vllm_trimix/**/*.py",
    "vllm_trimix/**/*.json",
    "benchmarks/**/*.py",
    "tests/*.py",
    "tests/engine/*.py",
    "tests/kernels/*.py",
)


def source_digest(root: Path = ROOT) -> str:
    """Names the code that stages run: its files' names and contents, hashed."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
