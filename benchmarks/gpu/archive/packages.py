"""Which packages vLLM needs that the GPU machine lacks, by what the package index says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

TARGET_PACKAGES = Path(__file__).with_name("target_packages.txt")
PYTHON = "3.12"

# Requirements of vLLM that a dense decoder on one GPU doesn't import. verify.py shows it: it imports every module
# without them, and known.txt says which modules miss one.
LEFT_OUT = frozenset(
    """anthropic fastsafetensors flashinfer-cubin flashinfer-python humming-kernels instanttensor mistral-common numba
    numpy nvidia-cudnn-frontend nvidia-cutlass-dsl nvtx opencv-python-headless outlines-core pynvvideocodec
    quack-kernels tilelang tokenspeed-mla torch torchaudio torchcodec torchvision triton""".split()
)
# vLLM pins it for packages that are left out; what xgrammar asks of it decides.
_NOT_PINNED = "apache-tvm-ffi"

_ENVIRONMENT = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": f"{PYTHON}.3",
    "python_version": PYTHON,
    "sys_platform": "linux",
}
# pip matches each platform tag exactly, so that every glibc up to the target's is named.
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
TARGET_OPTIONS = [
    "--only-binary=:all:",
    f"--python-version={PYTHON}",
    "--implementation=cp",
    *(f"--abi={abi}" for abi in ("cp312", "abi3", "none")),
    *(f"--platform={platform}" for platform in _PLATFORMS),
]


def pip(*arguments: str) -> None:
    """Runs pip with the user's own settings.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", arguments[0], "--quiet", *arguments[1:]]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        said = [line for line in child.stderr.splitlines() if not line.startswith("WARNING")]
        raise RuntimeError(f"pip {arguments[0]} failed; is a package index within reach?\n" + "\n".join(said[-8:]))


def target_packages(path: Path = TARGET_PACKAGES) -> dict[str, str | None]:
    """Canonical names of what the target has, with the versions that are known."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    split = (line.partition("==") for line in lines if line)
    return {canonicalize_name(name): version or None for name, _, version in split}


def closure(requirements: Iterable[str], there: Iterable[str], work: Path) -> list[str]:
    """What must be carried.

    Goes through requirements breadth first with pip's metadata alone, so that what only a left-out package needs is
    never looked at. Extras are left out too: vLLM names ``fastapi[standard]``, and imports nothing of its command line.

    Args:
        requirements: vLLM's ``Requires-Dist`` lines.
        there: Canonical names of what the target has.
        work: A folder for pip's reports.

    Returns:
        Lines of ``name==version``, sorted.

    Raises:
        ValueError: A version that was chosen early misses a limit that was found later.
        RuntimeError: pip failed.
    """
    skip = LEFT_OUT | set(there)
    wanted: dict[str, set[str]] = {}
    versions: dict[str, str] = {}
    _add(wanted, [line for line in requirements if not line.startswith(_NOT_PINNED)], skip)
    while missing := [name for name in wanted if name not in versions]:
        for metadata in _metadata([name + ",".join(sorted(wanted[name])) for name in missing], work):
            versions[canonicalize_name(metadata["name"])] = metadata["version"]
            _add(wanted, metadata.get("requires_dist", []), skip)
    for name, version in versions.items():
        unmet = [limit for limit in wanted[name] if not SpecifierSet(limit).contains(version, True)]
        if unmet:
            raise ValueError(f"{name}=={version} does not meet {', '.join(unmet)}; name a version in closure()")
    return sorted(f"{name}=={version}" for name, version in versions.items())


def _add(wanted: dict[str, set[str]], lines: Iterable[str], skip: frozenset[str]) -> None:
    """Adds requirements to the limits on each package."""
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name in skip or (requirement.marker and not requirement.marker.evaluate({**_ENVIRONMENT, "extra": ""})):
            continue
        wanted.setdefault(name, set()).update(map(str, requirement.specifier))


def _metadata(requirements: Sequence[str], work: Path) -> list[dict]:
    report = work / "report.json"
    pip(
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        f"--target={work / 'unused'}",
        f"--report={report}",
        *TARGET_OPTIONS,
        *requirements,
    )
    return [item["metadata"] for item in json.loads(report.read_text())["install"]]
