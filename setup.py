"""Builds the compiled CPU kernel where a compiler and a CPU build of torch are at hand; the rest is in pyproject.toml.

``VLLM_TRIMIX_BUILD_CPU``: 0 never builds it, 1 builds it for a CUDA build of torch too. Without the kernel the package
works the same, on plain PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-g0",
]
# The oldest torch whose stable ABI has all that is used, 2.10.
TORCH = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
X86 = ["-DTRIMIX_WITH_X86"]
# Exceptions would leave symbols that several translation units share.
ISA = ["-fno-exceptions"]
AVX512 = [*ISA, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]

# Sources that are compiled for instructions which not every CPU has; they run only on those that do.
ISA_FLAGS = {
    "csrc/cpu/isa/avx2.cpp": [*ISA, "-mavx2", "-mfma"],
    "csrc/cpu/isa/avx512.cpp": AVX512,
    "csrc/cpu/isa/avx512_bf16.cpp": AVX512_BF16,
    "csrc/cpu/isa/amx.cpp": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    "csrc/cpu/isa/amx_emulated.cpp": AVX512_BF16,
}
COMMON = [
    "csrc/library.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/sparse_prefill.cpp",
    "csrc/cpu/isa/portable.cpp",
]


def compiler_command() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def torch_folder() -> Path | None:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def why_not() -> str | None:
    """Why the kernel is not built here, or None."""
    wish = os.environ.get("VLLM_TRIMIX_BUILD_CPU", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"VLLM_TRIMIX_BUILD_CPU is {wish!r}; it must be 0, 1 or unset")
    if wish == "0":
        return "VLLM_TRIMIX_BUILD_CPU is 0"
    if platform.system() != "Linux":
        return f"it is for Linux, this is {platform.system()}"
    compiler = compiler_command()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on the PATH"
    torch = torch_folder()
    if torch is None:
        return "torch is not installed where this package is built"
    if wish != "1" and runpy.run_path(str(torch / "version.py")).get("cuda"):
        return "torch is a CUDA build (VLLM_TRIMIX_BUILD_CPU=1 builds it all the same)"
    return None


class BuildKernel(build_ext):
    """Compiles each source with flags of its own; a failure leaves the package without the kernel, and says so."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            _say(f"not built, compiling failed: {error}")

    def _build(self, ext: Extension) -> None:
        torch = torch_folder()
        assert torch is not None
        compiler = compiler_command()
        self.compiler.set_executables(
            compiler_so=[*compiler, "-fPIC"],
            compiler_so_cxx=[*compiler, "-fPIC"],
            linker_so=[*compiler, "-shared"],
            linker_so_cxx=[*compiler, "-shared"],
        )
        objects = []
        for source in ext.sources:
            isa = source.startswith("csrc/cpu/isa/")
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[] if isa else [str(torch / "include")],
                extra_postargs=[*FLAGS, *ext.extra_compile_args, *(ISA_FLAGS.get(source, ISA) if isa else TORCH)],
            )
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, libraries=["torch_cpu"], library_dirs=[str(torch / "lib")], target_lang="c++"
        )


def _say(text: str) -> None:
    print(f"vllm-trimix: compiled CPU kernel: {text}", flush=True)


def extensions() -> list[Extension]:
    reason = why_not()
    if reason:
        _say(f"not built, {reason}")
        return []
    x86 = platform.machine() in ("x86_64", "AMD64")
    sources = [*COMMON, *(ISA_FLAGS if x86 else {})]
    flags = X86 if x86 else []
    # It holds no Python API: loaded as a torch library, it serves every Python.
    return [Extension("vllm_trimix._cpu", sources, extra_compile_args=flags, optional=True, py_limited_api=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if not why_not() else {},
)
