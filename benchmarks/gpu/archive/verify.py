"""Unpacks an archive as the GPU machine would and imports all of it: ``python -m benchmarks.gpu.archive.verify``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.archive import driver, size
from benchmarks.gpu.archive.known import load
from benchmarks.gpu.archive.packages import PYTHON, target_packages

ROOT = Path(__file__).parents[3]
KNOWN = Path(__file__).with_name("known.txt")
_CHILD = "benchmarks.gpu.archive.child"
# On two cores of its own.
_UNPACK_SECONDS = 15.0
_UNPACK_CORES = 2
_IMPORT_SECONDS = 1800
# What a served engine and its benchmark import first; checked in a process of its own, as it would be there.
SERVED = (
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.cli.main",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.benchmarks.serve",
    "vllm.model_executor.models.llama",
    "vllm_trimix.plugin",
)
# What stages run. pytest collects the others.
OURS = ("vllm_trimix", "benchmarks", "tests.engine", "tests.kernels")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, 1 if a check failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.archive.verify", description=__doc__)
    parser.add_argument(
        "archive", type=Path, nargs="?", default=ROOT / ".vp", help="the archive's folder; default: .vp"
    )
    parser.add_argument(
        "--python",
        default=f"python{PYTHON}",
        help=f"an interpreter {PYTHON} that has what the GPU machine has: README.md beside this says how to make one; "
        "default: python3.12",
    )
    parser.add_argument("--quick", action="store_true", help="import what is served, not every module of vLLM")
    args = parser.parse_args(argv)
    python = shutil.which(args.python)
    if python is None or not (args.archive / "MANIFEST").is_file():
        missing = f"no interpreter {args.python!r}; README.md beside this program says how to make one"
        if python is not None:
            missing = f"no MANIFEST in '{args.archive}'; python -m benchmarks.gpu.archive.pack makes an archive"
        print(f"verify: error: {missing}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="verify-") as work:
        try:
            return _Verification(args.archive.resolve(), python, Path(work)).run(quick=args.quick)
        except ValueError as error:
            print(f"verify: error: {error}", file=sys.stderr)
            return 2


class _Verification:
    """One archive, unpacked for one interpreter."""

    def __init__(self, archive: Path, python: str, work: Path) -> None:
        self._archive, self._python, self._work = archive, python, work
        self._site, self._libraries = work / "site", work / "driver"
        self._known = load(KNOWN)
        self._failed = 0

    def run(self, *, quick: bool) -> int:
        """Runs every check; returns the exit status."""
        self._interpreter()
        self._size()
        if not self._unpack():
            return 1
        (tools,) = self._ask("tools")
        driver.build(self._libraries, [*self._site.glob("vllm/**/*.so"), Path(tools["driver"])])
        self._device_code(tools["cuobjdump"])
        self._extensions()
        self._imports("served", SERVED)
        for package in OURS:
            self._imports(package, modules(ROOT, package))
        if not quick:
            self._imports("vllm", modules(self._site, "vllm"))
        self._requirements()
        self._kernel()
        for entry in [] if quick else self._known.unused():
            self._check(f"known.txt: {entry}", False, "nothing fails so any more; remove the line")
        print(f"{self._failed} checks failed" if self._failed else "all checks passed; what needs a GPU is unchecked")
        return 1 if self._failed else 0

    def _check(self, name: str, passed: bool, detail: str) -> bool:
        self._failed += not passed
        print(f"{'ok' if passed else 'FAILED':<7}{name}: {detail}", flush=True)
        return passed

    def _interpreter(self) -> None:
        (found,) = self._ask("versions", site=False)
        wanted = {**target_packages(), "python": PYTHON}
        for name, version in found.items():
            # A local part, such as torch's +cu130, is not in the list.
            if version.partition("+")[0] != wanted[name]:
                raise ValueError(
                    f"{self._python} has {name} {version}, the GPU machine {wanted[name]}; README.md beside this "
                    "program says how to make such an interpreter"
                )
        print(f"{self._python}: {', '.join(f'{name} {version}' for name, version in found.items())}")

    def _size(self) -> None:
        try:
            self._check("size", True, size.check(size.folder_bytes(self._archive), size.tree_bytes(ROOT)))
        except ValueError as error:
            self._check("size", False, str(error))

    def _unpack(self) -> bool:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = ["bash", str(self._archive / "unpack.sh"), str(self._archive), str(self._site)]
        child = subprocess.run(
            command, env={**os.environ, "PYTHON": self._python}, capture_output=True, text=True, check=False
        )
        wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if not (self._site / ".complete").exists():
            return self._check("unpack", False, child.stderr.strip())
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        shared = cpu / _UNPACK_CORES
        return self._check(
            "unpack",
            shared <= _UNPACK_SECONDS,
            f"{shared:.1f} s of each of {_UNPACK_CORES} cores, at most {_UNPACK_SECONDS:.0f}; {wall:.1f} s by the "
            f"clock at a load of {os.getloadavg()[0]:.1f}; {child.stdout.strip()}",
        )

    def _device_code(self, cuobjdump: str) -> None:
        """NVIDIA's own tool reads the thinned extensions."""
        for path in sorted(self._site.glob("vllm/**/*.so")):
            if b".nv_fatbin\0" not in path.read_bytes():
                continue
            child = subprocess.run([cuobjdump, "-lelf", str(path)], capture_output=True, text=True, check=False)
            listed = child.stdout.count(".cubin")
            own = child.stdout.count(".sm_90")
            self._check(
                f"device code of {path.name}",
                child.returncode == 0 and own > 0,
                f"{own} of {listed} images are for sm_90{child.stderr.strip()[-200:]}",
            )

    def _extensions(self) -> None:
        for found in self._ask("extensions", str(self._site)):
            if "extension" in found:
                detail = found["error"] or "loads, but for the driver's symbols all resolved"
                self._check(found["extension"], found["error"] is None, detail)
            else:
                self._check(found["operator"], found["found"], "registered" if found["found"] else "not registered")

    def _imports(self, title: str, names: Sequence[str]) -> None:
        errors: dict[str, str] = {}
        left, seconds = list(names), 0.0
        while left:
            done, started = set(), left[0]
            for found in self._ask("imports", stdin="\n".join(left), may_die=True):
                started = found.get("start", started)
                if "module" in found:
                    done.add(found["module"])
                    seconds += found["seconds"]
                    errors.update({found["module"]: found["error"]} if found["error"] else {})
            if started not in done:
                done.add(started)
                errors[started] = "the process died"
            left = [name for name in left if name not in done]
        unknown = {name: said for name, said in errors.items() if not self._known.explains("import", name, said)}
        for name, said in unknown.items():
            print(f"       {name}: {' '.join(said.split())[:300]}")
        self._check(
            f"import {title}",
            not unknown,
            f"{len(names) - len(errors)} of {len(names)} modules in {seconds:.0f} s; {len(errors) - len(unknown)} fail "
            "as known.txt says",
        )

    def _requirements(self) -> None:
        unexplained = 0
        for found in self._ask("requirements", str(self._site)):
            text = f"{found['package']} needs {found['requirement']}"
            version = found["found"] or "nothing"
            if not self._known.explains("requirement", text, version):
                unexplained += 1
                print(f"       {text}, there is {version}")
        self._check("requirements", unexplained == 0, f"{unexplained} unmet that known.txt doesn't explain")

    def _kernel(self) -> None:
        command = [self._python, "-m", "vllm_trimix.kernels.triton_compile", "90,128,bf16,bf16"]
        child = subprocess.run(command, cwd=ROOT, env=self._env(), capture_output=True, text=True, check=False)
        last = (child.stdout.strip() or child.stderr.strip() or "no output").splitlines()[-1]
        self._check("the triangle kernel compiles for sm_90", child.returncode == 0, last)

    def _env(self, *, site: bool = True) -> dict[str, str]:
        path = [str(ROOT), *([str(self._site)] if site else [])]
        return {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self._work),
            "LD_LIBRARY_PATH": str(self._libraries),
            "PYTHONNOUSERSITE": "1",
            "PYTHONPATH": os.pathsep.join(path),
            # torch then asks the stand-in for NVML whether there is a device, and Triton asks torch.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }

    def _ask(
        self, question: str, *arguments: str, stdin: str = "", site: bool = True, may_die: bool = False
    ) -> Iterator[dict[str, Any]]:
        """What a process of the target's interpreter says; see child.py."""
        log = self._work / "child.log"
        with open(log, "w") as stderr:
            child = subprocess.run(
                [self._python, "-m", _CHILD, question, *arguments],
                cwd=ROOT,
                env=self._env(site=site),
                input=stdin,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                timeout=_IMPORT_SECONDS,
                check=False,
            )
        for line in child.stdout.splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found
        if child.returncode and not may_die:
            last = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise ValueError(f"{self._python} -m {_CHILD} {question} failed: {last}")


def modules(root: Path, package: str) -> list[str]:
    """Names of all modules of a package, subfolders without ``__init__.py`` included; commands are left out."""
    names = []
    for path in sorted(root.joinpath(*package.split(".")).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts[-1] != "__main__" and all(part.isidentifier() for part in parts):
            names.append(".".join(parts))
    return names


if __name__ == "__main__":
    sys.exit(main())
