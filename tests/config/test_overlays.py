"""Preset files that build on another preset by ``base``."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_trimix.config.entry import Resolved
from vllm_trimix.config.resolve import resolve


def write(path: Path, entry: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry))
    return str(path)


def run(raw: object, *, num_layers: int = 36) -> Resolved:
    return resolve(raw, model="some/model", num_layers=num_layers)


def test_over_a_shipped_preset(tmp_path: Path) -> None:
    overlay = write(tmp_path / "o.json", {"base": "Qwen/Qwen3-8B", "min_prompt_len": 1536, "provenance": {"a": 1}})
    resolved = run({"preset": overlay})
    assert resolved.layers == (5, 7, 10, *range(15, 36))
    assert (resolved.n_local, resolved.min_prompt_len) == (512, 1536)
    assert resolved.source == "preset:o.json+Qwen/Qwen3-8B"


def test_the_nearest_key_wins(tmp_path: Path) -> None:
    write(tmp_path / "deep/base.json", {"layers": "4-7", "n_init": 1, "n_local": 100, "last_n": 10, "models": ["a/b"]})
    write(tmp_path / "deep/middle.json", {"base": "base.json", "n_local": 200, "last_n": 20})
    top = write(tmp_path / "top.json", {"base": "deep/middle.json", "last_n": 30, "min_prompt_len": 0})
    resolved = run({"preset": top, "min_prompt_len": 7}, num_layers=8)
    assert resolved.layers == (4, 5, 6, 7)
    assert (resolved.n_init, resolved.n_local, resolved.last_n, resolved.min_prompt_len) == (1, 200, 30, 7)
    assert resolved.source == "preset:top.json+middle.json+base.json"


@pytest.mark.parametrize(
    ("base", "own", "layers"),
    [
        ({"layers": "1-2"}, {"starting_layer": 6}, (6, 7)),
        ({"starting_layer": 6}, {"layers": "1-2"}, (1, 2)),
        ({"starting_layer": 6}, {"layers": ""}, ()),
        ({"starting_layer": 6}, {}, (6, 7)),
    ],
)
def test_two_spellings_of_the_layers(tmp_path: Path, base: Any, own: Any, layers: tuple[int, ...]) -> None:
    write(tmp_path / "base.json", base)
    overlay = write(tmp_path / "o.json", {"base": "base.json", **own})
    assert run({"preset": overlay}, num_layers=8).layers == layers


@pytest.mark.parametrize(
    ("base", "own", "entry", "expected"),
    [
        # Only what is named changes: what calibrate writes over a preset with a pattern.
        ({"pattern": "flexprefill", "gamma": 0.9, "last_n": 5}, {"min_seq_len": 7}, None, ("flexprefill", 5, 7)),
        ({"pattern": "flexprefill", "last_n": 5}, {"min_seq_len": 7}, {"min_seq_len": 9}, ("flexprefill", 5, 9)),
        ({"pattern": "flexprefill"}, None, {"last_n": 3}, ("flexprefill", 3, 65536)),
        # Another pattern has other parameters: nothing of the base's is left.
        (
            {"pattern": "flexprefill", "gamma": 0.9, "last_n": 5},
            {"pattern": "xattention"},
            None,
            ("xattention", 128, 65536),
        ),
        ({"pattern": "flexprefill", "last_n": 5}, None, {"pattern": "xattention"}, ("xattention", 128, 65536)),
        ({"pattern": "flexprefill"}, "dense", None, None),
        ({"pattern": "flexprefill"}, {"min_seq_len": 7}, "dense", None),
    ],
)
def test_shallow_over_shallow(tmp_path: Path, base: Any, own: Any, entry: Any, expected: Any) -> None:
    write(tmp_path / "base.json", {"layers": "4-7", "shallow": base})
    overlay = write(tmp_path / "o.json", {"base": "base.json", **({} if own is None else {"shallow": own})})
    shallow = run({"preset": overlay, **({} if entry is None else {"shallow": entry})}, num_layers=8).shallow
    assert expected == (shallow and (shallow.label, shallow.last_n, shallow.min_seq_len))
    if own == {"min_seq_len": 7} and expected is not None and "gamma" in base:
        assert shallow is not None
        assert shallow.patterns[0]["gamma"] == 0.9


def test_a_head_file_below_is_sought_beside_its_own_preset(tmp_path: Path) -> None:
    heads = {str(head): ["vertical_and_slash", 30, 50, 0.5] for head in range(2)}
    write(tmp_path / "there/heads.json", [heads] * 8)
    write(tmp_path / "there/base.json", {"layers": "4-7", "shallow": {"heads": "heads.json"}})
    overlay = write(tmp_path / "o.json", {"base": "there/base.json", "shallow": {"min_seq_len": 7}})
    shallow = resolve({"preset": overlay}, model="m", num_layers=8, num_heads=2).shallow
    assert shallow is not None
    assert (shallow.source, shallow.min_seq_len) == ("heads.json", 7)


def test_keys_of_a_pattern_that_is_nowhere_named(tmp_path: Path) -> None:
    overlay = write(tmp_path / "o.json", {"base": "Qwen/Qwen3-8B", "shallow": {"min_seq_len": 7}})
    with pytest.raises(ValueError, match=r'trimix.shallow: write either "pattern" \(.*\) or "heads"'):
        run({"preset": overlay})


def test_a_base_is_sought_beside_the_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "there/base.json", {"layers": "3"})
    write(tmp_path / "there/o.json", {"base": "./base.json", "min_prompt_len": 5})
    os.symlink("there/o.json", tmp_path / "link.json")
    monkeypatch.chdir(tmp_path)
    assert run({"preset": "there/o.json"}).layers == (3,)
    assert run({"preset": "link.json"}).layers == (3,)
    absolute = write(tmp_path / "abs.json", {"base": str(tmp_path / "there/base.json")})
    assert run({"preset": absolute}).layers == (3,)


def test_without_a_base_it_is_a_preset(tmp_path: Path) -> None:
    alone = write(tmp_path / "o.json", {"layers": "3", "min_prompt_len": 5})
    assert run({"preset": alone}).source == "preset:o.json"
    short = write(tmp_path / "short.json", {"min_prompt_len": 5})
    with pytest.raises(ValueError, match=r'short\.json.* names no layers .* add "layers" to it, or "base"'):
        run({"preset": short})
    assert run({"preset": short, "layers": "3"}).min_prompt_len == 5


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"base": "nope/nope"}, "o.json': base: 'nope/nope' is neither a shipped preset nor a file; shipped: "),
        ({"base": "nope.json"}, "o.json': base: cannot read "),
        ({"base": 5}, "o.json': base: 5 is not valid: should be a shipped preset or the path of a preset file"),
        ({"base": ""}, "o.json': base: '' is not valid"),
        ({"base": None}, "o.json': base: None is not valid"),
        ({"base": "o.json"}, "o.json': base: o.json -> o.json is a circle"),
        ({"base": "back.json"}, "back.json': base: o.json -> back.json -> o.json is a circle; one of them must name"),
        ({"base": "bad.json"}, "bad.json': unknown key 'n_last' in trimix config; did you mean 'last_n'?"),
        ({"base": "broken.json"}, "o.json': base: cannot read "),
        ({"base": "list.json"}, "list.json': trimix: expected a JSON object"),
        ({"base": "fine.json", "n_local": 0}, "o.json': trimix.n_local: 0 is not valid"),
        ({"base": "fine.json", "preset": "x"}, "o.json': 'preset' is a setting of the server"),
        ({"base": "fine.json", "layers": "1", "starting_layer": 1}, "o.json': trimix: starting_layer (1) and layers"),
    ],
)
def test_mistakes_name_the_file_and_the_fix(tmp_path: Path, overlay: Any, message: str) -> None:
    write(tmp_path / "back.json", {"base": "o.json"})
    write(tmp_path / "bad.json", {"layers": "1", "n_last": 3})
    write(tmp_path / "fine.json", {"layers": "1"})
    write(tmp_path / "list.json", [1])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        run({"preset": write(tmp_path / "o.json", overlay)})
    assert "\n" not in str(refused.value)


def test_only_files_build_on_others() -> None:
    with pytest.raises(ValueError, match="unknown key 'base' in trimix config"):
        run({"base": "Qwen/Qwen3-8B"})
    with pytest.raises(ValueError, match=r"config.json entry 'trimix'.*unknown key 'base'"):
        resolve(None, model="m", num_layers=36, model_entry={"base": "Qwen/Qwen3-8B"})
