"""README and docs say what is so: paths, commands, keys, presets, counters."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.kernels.prediction import predict_layer
from vllm_trimix.backend.announce import REASONS
from vllm_trimix.cli.main import COMMANDS
from vllm_trimix.config.entry import TrimixConfig, parse_config
from vllm_trimix.config.layers import format_layers
from vllm_trimix.config.presets import preset_names
from vllm_trimix.config.resolve import resolve
from vllm_trimix.patterns.triangle import Triangle

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (folder / target).exists(), target
    for path in re.findall(r"`((?:vllm_trimix|benchmarks|tests|docs|csrc|scripts)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_trimix_snippets_are_valid(page: str) -> None:
    snippets = re.findall(r"""--additional-config\s+'(\{.*?\})'""", PAGES[page])
    for snippet in snippets:
        if "..." not in snippet:
            parse_config(json.loads(snippet)["trimix"])
    if page == "README.md":
        assert any("..." not in snippet for snippet in snippets)


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert words[1] in targets, line
            elif words[:1] == ["vllm-trimix"]:
                assert words[1] in COMMANDS, line
            elif words:
                assert words[0] in ("vllm", "pip"), line


def test_the_changelog_lists_every_command_once() -> None:
    (line,) = re.findall(r"^- Command `vllm-trimix`: (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.findall(r"`([\w-]+)`", line) == list(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_benchmark_commands_are_real(page: str) -> None:
    for module, arguments in re.findall(r"python -m benchmarks\.([\w.]+\w)([^`\n|]*)", PAGES[page]):
        source = (ROOT / "benchmarks" / f"{module.replace('.', '/')}.py").read_text() + (
            ROOT / "benchmarks/models.py"
        ).read_text()
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert f'"{flag}"' in source, f"{module} has no {flag}"


def test_configuration_table_is_complete() -> None:
    table = README.split("## Configuration", 1)[1].split("###", 1)[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    assert list(rows) == list(TrimixConfig.model_fields)
    resolved = resolve({"layers": "1"}, model="m", num_layers=2)
    for key in ("n_init", "n_local", "last_n", "min_prompt_len", "stats_log_interval"):
        assert float(rows[key]) == getattr(resolved, key), key
    assert (Triangle.n_init, Triangle.n_local, Triangle.last_n) == (8, 512, 128)


def test_preset_table_is_the_shipped_one() -> None:
    rows = re.findall(r"^\| `([\w./-]+)` \| ([\d,-]+) of (\d+) \|", README, re.MULTILINE)
    assert rows
    for name, layers, num_layers in rows:
        assert name in preset_names()
        assert format_layers(resolve(None, model=name, num_layers=int(num_layers)).layers) == layers


def test_every_reason_is_documented() -> None:
    design = PAGES["docs/design.md"]
    assert [reason for reason in REASONS if f"`{reason}`" not in design] == []


def test_no_placeholder_is_left() -> None:
    for page, text in PAGES.items():
        assert "@@" not in text, page


def test_predicted_times_are_the_documented_ones() -> None:
    sentence = r"at least ([\d.]+) ms for 128K tokens on an H200.*takes (\d+)\."
    ((ours, dense),) = re.findall(sentence, " ".join(PAGES["docs/kernels.md"].split()))
    seconds = {way: predict_layer("H200", 131072, 8192, way).seconds for way in ("trimix_triton", "dense")}
    assert (ours, dense) == (f"{1e3 * seconds['trimix_triton']:.1f}", f"{1e3 * seconds['dense']:.0f}")
