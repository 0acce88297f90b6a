"""Layer numbers mean the model's own layers, whatever vLLM's model code names its attentions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.startup.test_start_lines import MODELS, SMALL
from vllm_trimix.backend.compat import layer_number
from vllm_trimix.backend.settings import is_window

# Layers, and which of them are hybrid: as Zamba2-1.2B (one block) and -7B (two that take turns) have them, shorter.
ZAMBA2 = {
    "one block": (8, [2, 5], 1),
    "two blocks": (12, [2, 5, 8, 11], 2),
    "two blocks, odd": (10, [1, 4, 7], 2),
}
# Prints, for each layer, the number that its own attention's name is read as.
CHILD = """
import json, sys
from vllm_trimix.backend import preview, survey
from vllm_trimix.backend.engines.job import CONTEXT, engine_arguments
found = {}
for name, folder in json.load(sys.stdin).items():
    config = engine_arguments(folder, ["--enforce-eager", "--skip-tokenizer-init"]).create_engine_config(CONTEXT)
    layer_of = survey.numbering(config.model_config)
    with preview.built(config) as model:
        found[name] = [
            [index, layer_of(layer.shared_transformer.self_attn.dpa_list[layer.block_idx].layer_name)]
            for index, layer in enumerate(model.model.layers)
            if hasattr(layer, "shared_transformer")
        ]
json.dump(found, open(sys.argv[1], "w"))
"""


def test_zamba2_layers_by_the_blocks_that_they_share(tmp_path: Path) -> None:
    folders = {}
    for name, (num_layers, hybrid, num_blocks) in ZAMBA2.items():
        folder = tmp_path / name
        folder.mkdir()
        own = {
            "num_hidden_layers": num_layers,
            "layers_block_type": ["hybrid" if layer in hybrid else "mamba" for layer in range(num_layers)],
            "hybrid_layer_ids": hybrid,
            "num_mem_blocks": num_blocks,
        }
        (folder / "config.json").write_text(json.dumps({**SMALL, **MODELS["zamba2"], **own}))
        folders[name] = str(folder)
    out = tmp_path / "found.json"
    process = subprocess.run(
        [sys.executable, "-c", CHILD, str(out)], input=json.dumps(folders), capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(out.read_text())
    for name, (_, hybrid, _) in ZAMBA2.items():
        assert found[name] == [[layer, layer] for layer in hybrid], name


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.3.self_attn.attn", 3),
        ("language_model.model.layers.12.self_attn.attn", 12),
        ("transformer.h.0.attn.attn", 0),
        ("model.layers.5.self_attn.attn.1", 5),
        ("model.attn", -1),
    ],
)
def test_the_first_number_of_a_name(name: str, number: int) -> None:
    assert layer_number(name, SimpleNamespace(model_type="llama")) == number


def test_a_window_hides_nothing_from_a_context_that_it_covers() -> None:
    sizes = {None: False, 4095: True, 4096: False, 262144: False}
    assert {size: is_window(size, 4096) for size in sizes} == sizes
