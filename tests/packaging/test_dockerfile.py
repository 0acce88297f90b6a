"""The image can't be built where these tests run: it is linted, and its contract is read from the text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def test_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed beside this interpreter (extra dev, x86_64 Linux only)")
    result = subprocess.run(
        [str(hadolint), "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout == ""


def test_base_image_is_the_vllm_of_the_pins() -> None:
    (image,) = re.findall(r"^FROM (\S+)$", TEXT, re.MULTILINE)
    pinned = re.findall(r"^vllm==(\S+)$", (ROOT / "requirements/constraints-cuda.txt").read_text(), re.MULTILINE)
    assert image == f"vllm/vllm-openai:v{pinned[0]}"


def test_runs_as_somebody_with_a_health_check() -> None:
    users = re.findall(r"^USER (\S+)$", TEXT, re.MULTILINE)
    assert users
    assert users[-1] not in {"root", "0"}
    assert re.search(r"^HEALTHCHECK .*\\\n\s+CMD .*/health", TEXT, re.MULTILINE)
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", TEXT, re.MULTILINE)[0])
    assert entry[:2] == ["vllm", "serve"]
    assert entry[entry.index("--attention-backend") + 1] == "TRIMIX"


def test_build_context_holds_what_the_build_reads() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "vllm_trimix"} <= kept
    assert all((ROOT / name).exists() for name in kept)
