"""What an overlay of ``vllm-trimix calibrate`` builds on, and what it says of the shallow layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.calibration.fake_engine import RESOLVED, SHALLOW
from vllm_trimix.calibration import overlay
from vllm_trimix.calibration.overlay import make_overlay
from vllm_trimix.config.entry import Resolved, parse_config


@pytest.mark.parametrize(
    ("entry", "source", "expected"),
    [
        ({}, "preset:Qwen/Qwen3-8B", {"base": "Qwen/Qwen3-8B"}),
        ({"n_local": 64}, "preset:Qwen/Qwen3-8B", {"base": "Qwen/Qwen3-8B", "n_local": 64}),
        ({"preset": "Qwen/Qwen3-8B", "prompt_logprobs": "triangle"}, "preset:Qwen/Qwen3-8B", {"base": "Qwen/Qwen3-8B"}),
        ({"preset": "in/p.json"}, "preset:p.json", {"base": "p.json"}),
        ({"preset": "p.json"}, "preset:p.json", {"base": "{cwd}/p.json"}),
        ({}, "model", {"layers": "4-7", "n_init": 8, "n_local": 512, "last_n": 128}),
        (
            {"starting_layer": 4, "preset": "Qwen/Qwen3-8B", "dense_backend": "CPU_ATTN"},
            "config",
            {"layers": "4-7", "n_init": 8, "n_local": 512, "last_n": 128, "dense_backend": "CPU_ATTN"},
        ),
    ],
)
def test_what_an_overlay_builds_on(
    entry: dict[str, Any],
    source: str,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    changes = {"source": source, "dense_backend": entry.get("dense_backend")}
    resolved = Resolved.model_validate({**RESOLVED, **changes})
    overlay = make_overlay(
        parse_config(entry), resolved, min_prompt_len=1536, output=Path("in/o.json"), provenance={"a": 1}
    )
    expected = {key: str(value).format(cwd=tmp_path) if key == "base" else value for key, value in expected.items()}
    assert overlay == {**expected, "min_prompt_len": 1536, "provenance": {"a": 1}}


@pytest.mark.parametrize(
    ("entry", "source", "expected"),
    [
        # The preset's own pattern: only the break-even is the overlay's.
        ({"preset": "p.json"}, "preset:p.json", {"min_seq_len": 9}),
        ({"preset": "p.json", "shallow": {"last_n": 3}}, "preset:p.json", {"last_n": 3, "min_seq_len": 9}),
        (
            {"layers": "4-7", "shallow": {"pattern": "xattention"}},
            "config",
            {"pattern": "xattention", "min_seq_len": 9},
        ),
        # Files move with the overlay, or stay where they are.
        (
            {"layers": "4-7", "shallow": {"heads": "in/heads.json"}},
            "config",
            {"heads": "heads.json", "min_seq_len": 9},
        ),
        ({"layers": "4-7", "shallow": {"heads": "h.json"}}, "config", {"heads": "{cwd}/h.json", "min_seq_len": 9}),
        # A pattern from config.json, or of a preset whose layers are not used.
        ({}, "model", {**SHALLOW["patterns"][0], "layers": "0-3", "last_n": 128, "min_seq_len": 9}),
    ],
)
def test_what_an_overlay_says_of_the_shallow_layers(
    entry: dict[str, Any], source: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    resolved = Resolved.model_validate({**RESOLVED, "source": source, "shallow": SHALLOW})
    overlay = make_overlay(
        parse_config(entry), resolved, min_prompt_len=5, min_seq_len=9, output=Path("in/o.json"), provenance={}
    )
    if "heads" in expected:
        expected = {**expected, "heads": expected["heads"].format(cwd=tmp_path)}
    assert overlay["shallow"] == expected
    dense = make_overlay(parse_config(entry), resolved, min_prompt_len=5, output=Path("in/o.json"), provenance={})
    assert dense["shallow"] == "dense"


def test_a_head_file_that_no_overlay_could_name() -> None:
    heads = {**SHALLOW, "heads": [[0] * 8] * 4, "source": "heads.json"}
    resolved = Resolved.model_validate({**RESOLVED, "source": "model", "shallow": heads})
    with pytest.raises(ValueError, match=r"the head file heads.json is named by a preset .* name it here as well"):
        overlay.overlay_shallow(parse_config({}), resolved, Path("o.json"))
