"""Unpacks an archive of pack.py with Python's standard library alone; called by unpack.sh, which travels beside it."""

from __future__ import annotations

import compileall
import fcntl
import hashlib
import io
import multiprocessing
import os
import shlex
import shutil
import sys
import tarfile
import time
from pathlib import Path

_FILES_A_TASK = 64
# Hundreds of architectures, of which a run loads one or two: compiling them would take a third of the time.
_NOT_COMPILED = "/vllm/model_executor/models/"


def main(archive: Path, target: Path) -> int:
    """Fills ``target`` once, whoever else calls at the same time.

    Returns:
        The exit status; a reason is on stderr.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            manifest = (archive / "MANIFEST").read_text()
            if _complete(target) == manifest:
                print(f"unpack: {target} is complete")
                return 0
            start = time.monotonic()
            # Filled aside and renamed: a target is whole or not there.
            aside = target.with_name(target.name + ".partial")
            for folder in (aside, target):
                shutil.rmtree(folder, ignore_errors=True)
            aside.mkdir()
            _fill(archive, manifest, aside)
            unpacked = time.monotonic()
            _compile(aside)
            (aside / ".complete").write_text(manifest)
            aside.rename(target)
        except (OSError, ValueError) as error:
            print(f"unpack: error: {error}", file=sys.stderr)
            return 1
    print(f"unpack: {target} in {time.monotonic() - start:.1f} s, {unpacked - start:.1f} s of it without compilation")
    return 0


def _complete(target: Path) -> str | None:
    """The manifest of the archive that ``target`` was filled from."""
    try:
        return (target / ".complete").read_text()
    except FileNotFoundError:
        return None


def _fill(archive: Path, manifest: str, folder: Path) -> None:
    lines = [line.split() for line in manifest.splitlines()]
    parts = [(archive / line[1], line[3], folder) for line in lines if line[0] == "part"]
    if not parts:
        raise ValueError(f"{archive}/MANIFEST names no part; pack the archive again")
    with multiprocessing.Pool(min(len(parts), _cores())) as pool:
        for reason in pool.imap_unordered(_extract, parts):
            if reason:
                raise ValueError(reason)
    script = folder / "bin" / "vllm"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vllm.entrypoints.cli.main "$@"\n')
    script.chmod(0o755)


def _extract(task: tuple[Path, str, Path]) -> str | None:
    """Unpacks one part; returns why it can't."""
    part, digest, folder = task
    try:
        data = part.read_bytes()
    except FileNotFoundError:
        return f"{part} is missing; carry the archive's whole folder"
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        return f"{part}: checksum mismatch, {found} is not the manifest's {digest}; carry the archive again"
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|xz") as tar:
        tar.extractall(folder, filter="data")
    return None


def _compile(folder: Path) -> None:
    """Writes bytecode, so that processes that start side by side don't each compile every module they import."""
    files = sorted(str(path) for path in folder.rglob("*.py") if _NOT_COMPILED not in str(path))
    tasks = [files[start : start + _FILES_A_TASK] for start in range(0, len(files), _FILES_A_TASK)]
    with multiprocessing.Pool(_cores()) as pool:
        for _ in pool.imap_unordered(_compile_files, tasks):
            pass


def _compile_files(paths: list[str]) -> None:
    for path in paths:
        # Templates and files for other versions don't compile; importing one would say so.
        compileall.compile_file(path, quiet=2)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    if sys.version_info < (3, 11, 4):
        sys.exit(f"unpack: error: Python {sys.version.split()[0]}; 3.12 is needed: PYTHON=/path/to/python3.12")
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()))
