"""What travels to the GPU machine, and how much of it may."""

from __future__ import annotations

import subprocess
from pathlib import Path

MIB = 1 << 20
# Of the archive and the working tree together.
LIMIT = 64 * MIB


def tree_bytes(root: Path) -> int:
    """Size of the checkout's files as they would travel: tracked ones and those that git doesn't ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
    ).stdout
    paths = {root / name for name in listed.decode().split("\0") if name}
    # A file that was deleted but not committed is still listed.
    return sum(path.lstat().st_size for path in paths if path.is_symlink() or path.is_file())


def folder_bytes(folder: Path) -> int:
    """Size of a folder's files."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def check(archive: int, tree: int, limit: int = LIMIT) -> str:
    """Both sizes in words.

    Args:
        archive: Bytes of the archive's folder.
        tree: Bytes of the working tree.
        limit: Most bytes of both together.

    Raises:
        ValueError: They are too large to travel.
    """
    sizes = f"archive {archive / MIB:.1f} MiB + working tree {tree / MIB:.1f} MiB = {(archive + tree) / MIB:.1f} MiB"
    if archive + tree > limit:
        raise ValueError(
            f"{sizes} is over the limit of {limit / MIB:.0f} MiB; move large files out of the checkout, or leave "
            "more packages out of the archive (LEFT_OUT in benchmarks/gpu/archive/packages.py)"
        )
    return f"{sizes}, of {limit / MIB:.0f} MiB"
