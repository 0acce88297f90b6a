"""Tier E: the compiled kernel's offsets are 64 bits wide, by its source; ``test_addresses`` runs it on far tensors."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from torch.utils.cpp_extension import include_paths

from tests.tiers import Tier

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.tier("E")

# Narrow on purpose: types in messages, a count of keys, and places within a panel of 64 keys.
EXPLICIT = re.compile(r"\((?:u?int(?:16|32)?(?:_t)?|unsigned|long)\) ?[\w(]|_cast<(?:u?int(?:16|32)?(?:_t)?|unsigned)>")
CALLED = re.compile(r"\b(?:u?int|u?int32_t|unsigned)\(")
WANTED = re.compile(r"int\((?:tensor|q)\.scalar_type\(\)\)|= int32_t\(keys\);|splat\(int32_t\(max\(|uint32_t\(x")


def narrow_integers(root: Path, source: str, flags: list[str]) -> list[str]:
    """Where a source of csrc, or what it includes, makes a 64-bit integer narrower: by itself, and by casts."""
    command = [*compiler_command(), "-std=c++17", "-fsyntax-only", "-Wconversion", "-Wno-psabi", *flags]
    command += [f"-isystem{path}" for path in include_paths()]
    result = subprocess.run([*command, source], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = re.findall(
        r".*warning: (?:conversion from .(?:int64_t|long int|size_t)|.*loses integer precision).*", result.stderr
    )
    for path in [root / source, *(root / "csrc").rglob("*.h")]:
        for line in path.read_text().splitlines():
            code = WANTED.sub("", line.split("//")[0])
            found += [line.strip()] if EXPLICIT.search(code) or CALLED.search(code) else []
    return found


def _sources() -> dict[str, list[str]]:
    """The sources of the compiled kernel and their flags, as setup.py has them."""
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    flags = {source: list(setup["TORCH"] + setup["X86"]) for source in setup["COMMON"]}
    return flags | {source: list(setup["ISA_FLAGS"][source]) for source in setup["ISA_FLAGS"]}


def _compiles() -> bool:
    return shutil.which(compiler_command()[0]) is not None and platform.machine() == "x86_64"


def compiler_command() -> list[str]:
    return os.environ.get("CXX", "g++").split()


needs_compiler = pytest.mark.skipif(not _compiles(), reason="needs a C++ compiler, on x86_64")
PORTABLE, OPERATOR = "csrc/cpu/isa/portable.cpp", "csrc/cpu/sparse_prefill.cpp"


@needs_compiler
def test_the_compiled_kernels_offsets_are_64_bits_wide(tier: Tier) -> None:
    """The compiler sees no number lose its upper half, and no cast throws it away but those that are known."""
    sources = _sources()
    assert set(sources) == {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
    chosen = sorted(sources)[:: tier.size(sample=4, full=1)]
    for source in chosen:
        assert narrow_integers(ROOT, source, sources[source]) == [], source
        tier.case("source", source)


@needs_compiler
@pytest.mark.parametrize(
    ("source", "file", "good", "bad"),
    [
        (PORTABLE, "csrc/cpu/isa/unit.h", "const void* base, int64_t offset", "const void* base, int32_t offset"),
        (PORTABLE, "csrc/cpu/isa/attend.h", "const int64_t offset = (first_", "const int offset = (first_"),
        (PORTABLE, "csrc/cpu/isa/attend.h", "key * p_.k_key", "int32_t(key * p_.k_key)"),
        (PORTABLE, "csrc/cpu/isa/attend.h", "+ key / kUnitDepth * padded", "+ (int)(key / kUnitDepth * padded)"),
        (OPERATOR, "csrc/cpu/problem.h", "int64_t q_row, q_head, k_head", "int q_row, q_head, k_head"),
    ],
    ids=["parameter", "variable", "cast", "c-cast", "stride"],
)
def test_a_narrow_offset_is_seen(tmp_path: Path, source: str, file: str, good: str, bad: str) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (tmp_path / file).read_text()
    assert good in text
    (tmp_path / file).write_text(text.replace(good, bad))
    assert narrow_integers(tmp_path, source, _sources()[source])
