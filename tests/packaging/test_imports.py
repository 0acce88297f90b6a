"""Who imports what: nothing heavy with the package, and the borders between folders that lint enforces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["vllm_trimix", "vllm_trimix.plugin", "vllm_trimix.cli.main"])
def test_import_is_light(module: str) -> None:
    heavy = {"torch", "vllm", "triton", "transformers", "numpy"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize(
    ("folder", "statement", "allowed"),
    [
        ("backend", "import vllm.config", True),
        ("backend", "import triton", False),
        ("kernels", "import triton.language as tl", True),
        ("kernels", "import vllm.config", False),
        ("kernels", "from vllm_trimix.policy import Policy", False),
        ("patterns", "from vllm_trimix.kernels import reference", False),
        ("patterns", "import triton", False),
        ("patterns", "import vllm", False),
        ("cli", "from vllm.config import VllmConfig", False),
        ("cli", "import triton", False),
        (".", "import vllm", False),
    ],
)
def test_lint_guards_the_borders(folder: str, statement: str, allowed: bool) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed beside this interpreter (extra dev)")
    name = (ROOT / "vllm_trimix" / folder / "example.py").as_posix()
    command = [str(ruff), "check", "--select", "TID251", "--no-cache", "--stdin-filename", name, "-"]
    result = subprocess.run(command, cwd=ROOT, input=f"{statement}\n", capture_output=True, text=True, check=False)
    assert (result.returncode == 0) is allowed, result.stdout + result.stderr
    assert allowed or "TID251" in result.stdout
