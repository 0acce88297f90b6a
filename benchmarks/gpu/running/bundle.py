"""What is taken home from a machine that goes away: three files, renewed after every stage."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import load, save, write_atomically
from benchmarks.gpu.running.summary import summary
from benchmarks.gpu.stage import Stage

# The end of a log says how it ended, and its start what ran.
_MOST_LOG_BYTES = 2**18


def write_bundle(
    folder: Path, output: Path, stages: Sequence[Stage], environment: dict[str, Any], *, left: Sequence[str]
) -> None:
    """Writes ``results.json``, ``summary.md`` and ``logs.tar.gz``.

    Args:
        folder: Where they go; made if need be.
        output: Folder of the stages' result files.
        stages: All stages there are.
        environment: Of this run.
        left: Stages that the budget left no time for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {stage.name: load(output / f"{stage.name}.json") for stage in stages}
    results = {name: result for name, result in found.items() if result is not None}
    text = json.dumps({"environment": environment, "left": list(left), "stages": results}, indent=1)
    write_atomically(folder / "results.json", text + "\n")
    write_atomically(folder / "summary.md", summary(output, stages, environment, left=left))
    part = folder / "logs.tar.gz.part"
    with tarfile.open(part, "w:gz") as archive:
        for path in _logs(output, [stage.name for stage in stages]):
            data = _ends(path)
            info = tarfile.TarInfo(str(path.relative_to(output)))
            info.size, info.mtime = len(data), int(path.stat().st_mtime)
            archive.addfile(info, io.BytesIO(data))
    part.replace(folder / "logs.tar.gz")


def restore(file: Path, output: Path) -> None:
    """Puts a bundle's results where a run looks for them, those that are there already excepted.

    Raises:
        ValueError: The file is no ``results.json`` of a bundle.
    """
    bundle = load(file)
    results = bundle.get("stages") if bundle else None
    if not isinstance(results, dict) or not all(isinstance(result, dict) for result in results.values()):
        raise ValueError(f"--resume: {file} is not a bundle's results.json; name one that --bundle wrote")
    for name, result in results.items():
        path = output / f"{name}.json"
        if path.name == f"{name}.json" and path.parent == output and load(path) is None:
            save(path, result)


def _logs(output: Path, names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        if (output / f"{name}.log").exists():
            yield output / f"{name}.log"
        yield from sorted((output / name).rglob("*.log"))


def _ends(path: Path) -> bytes:
    """A file, or its first and last bytes if it is long."""
    data = path.read_bytes()
    if len(data) <= _MOST_LOG_BYTES:
        return data
    half = _MOST_LOG_BYTES // 2
    return data[:half] + f"\n[{len(data) - 2 * half} bytes left out]\n".encode() + data[-half:]
