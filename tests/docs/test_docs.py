"""README and docs say what is so: paths, commands, keys, presets, counters."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.kernels.prediction import predict_layer
from tests.docs.reading import PAGES, ROOT, code_blocks, prose, rows, section
from vllm_trimix.backend.announce import REASONS, start_line
from vllm_trimix.backend.names import ALLOWED
from vllm_trimix.backend.namespaces import RESERVED
from vllm_trimix.cli.main import COMMANDS, build_parser
from vllm_trimix.config.entry import TrimixConfig, parse_config
from vllm_trimix.config.layers import format_layers
from vllm_trimix.config.preset_files import preset_config
from vllm_trimix.config.presets import preset_names
from vllm_trimix.config.resolve import resolve
from vllm_trimix.config.shallow import ShallowConfig
from vllm_trimix.patterns.registry import PATTERNS
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.stats import Stats

SNIPPET = r"""--additional-config\s+'(\{.*?\})'"""


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (folder / target).exists(), target
    for path in re.findall(r"`((?:vllm_trimix|benchmarks|tests|docs|csrc|scripts)/[\w./-]+)`", PAGES[page]):
        assert "NAME" in path or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_links_into_pages_meet_a_heading(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", PAGES[page]):
        text = ((ROOT / page).parent / target).read_text() if target else PAGES[page]
        headings = [heading.lower() for heading in re.findall(r"^#+ (.*)$", text, re.M)]
        assert anchor in [re.sub(r"[^\w\s-]", "", heading).replace(" ", "-") for heading in headings], anchor


@pytest.mark.parametrize("page", PAGES)
def test_trimix_snippets_are_valid(page: str) -> None:
    snippets = re.findall(SNIPPET, PAGES[page])
    for snippet in snippets:
        if "..." not in snippet:
            parse_config(json.loads(snippet)["trimix"])
    if page == "README.md":
        assert any("..." not in snippet for snippet in snippets)


@pytest.mark.parametrize("page", PAGES)
def test_json_blocks_are_valid(page: str) -> None:
    """Each is a ``trimix`` entry, a preset file, or a head file or list of patterns, which other tests read."""
    for block in code_blocks(page, "json"):
        data = json.loads(block)
        if "trimix" in data:
            parse_config(data["trimix"])
        elif "base" in data:
            preset_config({key: value for key, value in data.items() if key != "base"}, page)
        else:
            assert "format" in data or all(entry["pattern"] in PATTERNS for entry in data)


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in code_blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert words[1] in targets, line
            elif words[:1] == ["vllm-trimix"]:
                assert words[1] in COMMANDS, line
                parser, _ = build_parser(words[1])
                parser.parse_args(words[1 : words.index("--") if "--" in words else None])
            elif words and page == "README.md":
                assert words[0] in ("vllm", "pip"), line
            elif words and Path(words[0]).name not in ("vllm", "pip", "python", "python3.12", "grep"):
                assert (ROOT / words[0]).is_file(), line
    if page == "README.md":
        assert code_blocks(page, "bash")


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


def _keys(text: str) -> dict[str, str]:
    """A table's keys with their defaults."""
    return {row[0].strip("`"): row[1] for row in rows(text)}


def test_configuration_table_is_complete() -> None:
    table = _keys(section("docs/configuration.md", "## Keys"))
    assert list(table) == list(TrimixConfig.model_fields)
    resolved = resolve({"layers": "1"}, model="m", num_layers=2)
    for key in ("n_init", "n_local", "last_n", "min_prompt_len", "stats_log_interval"):
        assert float(table[key]) == getattr(resolved, key), key
    assert (Triangle.n_init, Triangle.n_local, Triangle.last_n) == (8, 512, 128)


def test_the_table_of_shallow_is_complete() -> None:
    assert list(_keys(section("docs/patterns.md", "## Setting it"))) == list(ShallowConfig.model_fields)


def test_the_table_of_what_requests_may_ask_is_complete() -> None:
    named = [json.loads(row[0].strip("`")) for row in rows(section("docs/configuration.md", "## Requests"))]
    assert sorted(named) == sorted(ALLOWED)


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md"])
def test_log_lines_have_the_keys_of_the_code(page: str) -> None:
    written = [re.findall(r"(\w+)=", line) for line in re.findall(r"^TRIMIX.*$", PAGES[page], re.M)]
    resolved = resolve({"layers": "1"}, model="m", num_layers=2)
    counters = {**Stats().snapshot(), "short_prompt": 40}
    lines = [start_line(resolved, dense="FLASH_ATTN", kernel="triton", stock={}), Stats.line({}, counters)]
    assert written == [re.findall(r"(\w+)=", line) for line in lines]


def test_preset_table_is_the_shipped_one() -> None:
    table = re.findall(
        r"^\| `([\w./-]+)` \| ([\d,-]+) of (\d+) \|", section("docs/layers.md", "## Presets"), re.MULTILINE
    )
    assert sorted(name for name, _, _ in table) == sorted(preset_names())
    for name, layers, num_layers in table:
        assert format_layers(resolve(None, model=name, num_layers=int(num_layers)).layers) == layers


def _reasons(heading: str) -> set[str]:
    cells = [row[0] for row in rows(section("docs/dense.md", heading))]
    return set(re.findall(r"`(\w+)`", " ".join(cells)))


def test_every_reason_is_documented() -> None:
    assert _reasons("## Requests and steps") == {*REASONS, "few_keys"}


def test_every_reason_of_a_layer_is_documented() -> None:
    """They are what functions named ``..._reason`` return, and what the backend's builder says of wrapped ones."""
    given: set[str] = {"wrapped_backend"}
    for path in [*(ROOT / "vllm_trimix/backend").rglob("*.py"), ROOT / "vllm_trimix/config/layer_types.py"]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_reason"):
                returned = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
                texts = [node for each in returned for node in ast.walk(each) if isinstance(node, ast.Constant)]
                given |= {node.value for node in texts if re.fullmatch(r"[a-z]\w+", str(node.value))}
    assert len(given) > 10
    assert _reasons("## Layers") == given - REASONS.keys()


def test_reserved_namespaces_are_documented() -> None:
    table = rows(PAGES["docs/prefix-caching.md"])
    named = re.findall(r"`(trimix-\w+)(?:-<hash>)?`", " ".join(cells[1] for cells in table))
    assert sorted(named) == sorted(RESERVED)


def test_no_placeholder_is_left() -> None:
    for page, text in PAGES.items():
        assert "@@" not in text, page


def test_predicted_times_are_the_documented_ones() -> None:
    sentence = r"at least ([\d.]+) ms for 128K tokens on an H200.*takes (\d+)\."
    ((ours, dense),) = re.findall(sentence, prose(PAGES["docs/kernels.md"]))
    seconds = {way: predict_layer("H200", 131072, 8192, way).seconds for way in ("trimix_triton", "dense")}
    assert (ours, dense) == (f"{1e3 * seconds['trimix_triton']:.1f}", f"{1e3 * seconds['dense']:.0f}")
