"""The floor leaves out the triangle layers' prefill attention, all of it and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from vllm_trimix.cli.main import main as trimix_cli
from vllm_trimix.config.entry import TrimixConfig

ROOT = Path(__file__).parents[2]


def test_calls_of_the_floor(tmp_path: Path) -> None:
    model = tmp_path / "bench"
    trimix_cli(["make-bench-model", str(model), "--shape", "bench-8l"])
    length, chunk, tokens = 1500, 512, 4
    command = [sys.executable, "-m", "tests.benchmarks.ideal_child", str(model), str(length), str(chunk), str(tokens)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    calls = json.loads(result.stdout.splitlines()[-1])
    # Eight layers, four of them triangle; three chunks, the last of which gives the first token; three decode steps.
    assert calls["left_out"] == 3 * 4
    assert calls["dense"] == 3 * 4 + (tokens - 1) * 8
    assert "triangle" not in calls
    assert calls["zeroed"] == {"_forward_cpu": [1, 2], "_forward_triton": [1, 2]}


def test_no_setting_leads_to_the_floor() -> None:
    assert "ideal" not in " ".join(TrimixConfig.model_fields)
    for path in (ROOT / "vllm_trimix").rglob("*.py"):
        text = path.read_text()
        assert "benchmarks.serving.ideal" not in text, path
        assert "worker_extension" not in text, path
