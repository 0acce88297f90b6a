"""What users may write, and the error each mistake gets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_trimix.config.entry import DEFAULT_MIN_PROMPT_LEN
from vllm_trimix.config.layers import format_layers, parse_layers
from vllm_trimix.config.presets import find_preset, preset_names
from vllm_trimix.config.resolve import resolve


def run(raw: object, *, model: str = "some/model", num_layers: int = 32, entry: object = None) -> Any:
    return resolve(raw, model=model, num_layers=num_layers, model_entry=entry)


@pytest.mark.parametrize(
    ("spec", "layers", "shortest"),
    [
        ("16-18", (16, 17, 18), "16-18"),
        ("5,7,10,29-31", (5, 7, 10, 29, 30, 31), "5,7,10,29-31"),
        (" 3 , 1-2", (1, 2, 3), "1-3"),
        ([4, "6-7", 5], (4, 5, 6, 7), "4-7"),
        ("", (), "none"),
        ([], (), "none"),
    ],
)
def test_layer_lists(spec: Any, layers: tuple[int, ...], shortest: str) -> None:
    assert parse_layers(spec, num_layers=32) == layers
    assert format_layers(layers) == shortest


def test_starting_layer_is_short_for_a_range() -> None:
    assert run({"starting_layer": 16}).layers == run({"layers": "16-31"}).layers == tuple(range(16, 32))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"n_last": 128}, "unknown key 'n_last' in trimix config; did you mean 'last_n'?"),
        ({"startin_layer": 1}, "did you mean 'starting_layer'?"),
        ({"zzz": 1}, "unknown key 'zzz' in trimix config (valid: starting_layer, layers"),
        ({"n_local": 0}, "trimix.n_local: 0 is not valid: should be greater than or equal to 1"),
        ({"n_init": -1}, "trimix.n_init: -1"),
        ({"last_n": -1}, "trimix.last_n: -1"),
        ({"n_init": "8"}, "trimix.n_init: '8' is not valid: should be a valid integer"),
        ({"n_init": 1.5}, "trimix.n_init: 1.5"),
        ({"starting_layer": True}, "trimix.starting_layer: True"),
        ({"min_prompt_len": -5}, "trimix.min_prompt_len: -5"),
        ({"layers": "40"}, "trimix.layers: '40' is outside this model's 32 layers (0-31)"),
        ({"layers": "30-40"}, "trimix.layers: '40' is outside this model's 32 layers (0-31)"),
        ({"layers": "32-40"}, "trimix.layers: '32' is outside this model's 32 layers (0-31)"),
        ({"layers": "32"}, "trimix.layers: '32' is outside this model's 32 layers (0-31)"),
        ({"layers": "7-3"}, "trimix.layers: range '7-3' runs backwards; write '3-7'"),
        ({"layers": "3-"}, "trimix.layers: '3-'"),
        ({"layers": "a,b"}, "trimix.layers: 'a'"),
        ({"layers": "1,,2"}, "trimix.layers: ''"),
        ({"layers": "-1"}, "trimix.layers: '-1'"),
        ({"layers": {"a": 1}}, "trimix.layers: {'a': 1} is not a layer list"),
        ({"layers": [1.5]}, "trimix.layers: [1.5] is not a layer list"),
        ({"starting_layer": 32}, "trimix.starting_layer: 32 is outside this model's 32 layers (0-31)"),
        ({"starting_layer": 1, "layers": "1"}, "two spellings of one setting"),
        ({"dense_backend": "FOO", "layers": "1"}, "'FLASH_ATTN', 'FLASHINFER', 'TRITON_ATTN' or 'CPU_ATTN'"),
        ({"prompt_logprobs": "maybe", "layers": "1"}, "trimix.prompt_logprobs: 'maybe'"),
        ({"preset": "nope"}, "'nope' is neither a shipped preset nor a file; shipped: "),
        ({"preset": "missing.json"}, "cannot read 'missing.json'"),
        ({"trimix": {"layers": "1"}}, "'trimix' stands inside itself: write its keys without it here"),
        ([16], "trimix: expected a JSON object"),
        ("16", "trimix: expected a JSON object"),
        (None, "no preset for model 'some/model'"),
        ({"n_local": 64}, "no preset for model 'some/model'"),
    ],
)
def test_mistakes_name_the_value_the_limit_and_the_fix(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(raw)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"n_init.*n_local"):
        run({"n_init": -1, "n_local": 0})


def test_defaults_are_the_published_ones() -> None:
    resolved = run({"layers": "1"})
    assert (resolved.n_init, resolved.n_local, resolved.last_n) == (8, 512, 128)
    assert resolved.min_prompt_len == DEFAULT_MIN_PROMPT_LEN
    assert resolved.prompt_logprobs == "dense"
    assert resolved.source == "config"


def test_users_keys_win_over_the_presets() -> None:
    resolved = run({"n_local": 1024}, model="Qwen/Qwen3-8B", num_layers=36)
    assert resolved.n_local == 1024
    assert resolved.layers == (5, 7, 10, *range(15, 36))
    assert resolved.source == "preset:Qwen/Qwen3-8B"
    assert run({"layers": "3"}, model="Qwen/Qwen3-8B", num_layers=36).layers == (3,)


def test_preset_sources(tmp_path: Path) -> None:
    entry = {"layers": "4-7", "n_local": 256, "provenance": {"by": "test"}}
    assert run(None, num_layers=8, entry=entry).layers == (4, 5, 6, 7)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(entry))
    resolved = run({"preset": str(file)}, num_layers=8)
    assert (resolved.layers, resolved.n_local, resolved.source) == ((4, 5, 6, 7), 256, "preset:mine.json")
    file.write_text(json.dumps({"layer": "4"}))
    with pytest.raises(ValueError, match=r"preset file .*unknown key 'layer'.*did you mean 'layers'"):
        run({"preset": str(file)})
    with pytest.raises(ValueError, match=r"config.json entry 'trimix'.*unknown key"):
        run(None, entry={"first": 3})


def test_presets_hold_what_a_model_needs(tmp_path: Path) -> None:
    file = tmp_path / "copy.json"
    file.write_text(json.dumps({"models": ["a/b"], "starting_layer": 4, "provenance": {}}))
    assert run({"preset": str(file)}, num_layers=8).layers == (4, 5, 6, 7)
    for key, value in (("prompt_logprobs", "triangle"), ("stats_log_interval", 1), ("preset", "x")):
        with pytest.raises(ValueError, match=f"'{key}' is a setting of the server"):
            run(None, entry={"layers": "1", key: value})
    with pytest.raises(ValueError, match="neither a shipped preset nor a file"):
        run({"preset": str(tmp_path)})


def test_shipped_presets_are_valid_and_say_where_they_come_from() -> None:
    sizes = {"Qwen/Qwen2.5-7B-Instruct": 28, "Qwen/Qwen3-8B": 36}
    assert len(preset_names()) >= 4
    for name in preset_names():
        assert run(None, model=name, num_layers=sizes.get(name, 32)).layers
        provenance = find_preset(name)["provenance"]  # type: ignore[index]
        assert {"source", "date", "measured"} <= provenance.keys()


def test_what_a_head_file_does_not_say_is_said(tmp_path: Path) -> None:
    """Notes reach every process, and are no part of what decides which keys a row sees."""
    fingerprints, notes = set(), []
    for number in (8, 100):
        (tmp_path / "heads.json").write_text(json.dumps([{"0": ["block_sparse", number, 0, 1]}] * 2))
        raw = {"layers": "1", "shallow": {"heads": str(tmp_path / "heads.json")}}
        resolved = resolve(raw, model="m", num_layers=2, num_heads=1)
        assert type(resolved).model_validate_json(resolved.model_dump_json()) == resolved
        assert resolved.shallow is not None
        notes.append(resolved.shallow.notes)
        fingerprints.add(resolved.fingerprint)
    assert notes[1] == ()
    assert "block_sparse heads take 100 blocks: MInference's kernel ignores" in notes[0][0]
    assert len(fingerprints) == 1


def test_a_head_files_own_threshold_is_a_default(tmp_path: Path) -> None:
    heads = {"0": ["vertical_and_slash", 100, 800, 1]}
    file = {"sparse_attention_config": [heads, heads], "sparse_attention_threshold": 0}
    (tmp_path / "heads.json").write_text(json.dumps(file))
    for own, least in (({}, 1), ({"min_seq_len": 9}, 9)):
        raw = {"layers": "1", "shallow": {"heads": str(tmp_path / "heads.json"), **own}}
        shallow = resolve(raw, model="m", num_layers=2, num_heads=1).shallow
        assert shallow is not None
        assert shallow.min_seq_len == least


def test_resolved_settings_survive_json() -> None:
    resolved = run({"layers": "1,3", "stats_log_interval": 0})
    assert type(resolved).model_validate_json(json.dumps(resolved.model_dump(mode="json"))) == resolved
