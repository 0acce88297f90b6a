"""docs/patterns.md says what the code does: names, sources, parameters, kernels, and a head file that can be read."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

from vllm_trimix.cli.main import build_parser
from vllm_trimix.cli.patterns import KERNELS
from vllm_trimix.config.head_files import read_head_file
from vllm_trimix.patterns.flexprefill import DENSE_KEYS, MAX_COLUMNS, FlexPrefill
from vllm_trimix.patterns.registry import PATTERNS
from vllm_trimix.patterns.vertical_slash import FORCED_COLUMNS, FORCED_SLASHES, VerticalSlash

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/patterns.md").read_text()


def test_the_table_is_the_registry() -> None:
    table = PAGE.split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE)
    assert [row[0] for row in rows] == list(PATTERNS)
    for name, source, parameters, kernels in rows:
        cls = PATTERNS[name]
        assert source == cls.source
        expected = [f"{key}={value}" for key, value in dataclasses.asdict(cls()).items()]
        assert re.findall(r"`([^`]+)`", parameters) == expected
        assert kernels == ", ".join(KERNELS.values())


def test_every_pattern_says_what_chunks_change() -> None:
    section = PAGE.split("## Chunks", 1)[1].split("\n## ", 1)[0]
    first = " ".join(re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE))
    assert sorted(re.findall(r"`(\w+)`", first)) == sorted(PATTERNS)


def test_constants_are_the_codes() -> None:
    assert f"the first {FORCED_COLUMNS} keys and the nearest {FORCED_SLASHES} distances" in PAGE
    assert f"the last {VerticalSlash.last_rows} rows' attention" in PAGE
    assert f"the last {FlexPrefill.last_rows} rows' true attention" in PAGE
    assert f"dense up to {DENSE_KEYS} keys" in PAGE
    assert f"more than {MAX_COLUMNS} columns" in PAGE


def test_the_example_file_can_be_read(tmp_path: Path) -> None:
    [text] = [text for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL) if "vllm-trimix-heads" in text]
    (tmp_path / "heads.json").write_text(text)
    file = read_head_file(tmp_path / "heads.json", where="docs")
    assert file.model == "org/model"
    assert len(file.layers) == 2


def test_commands_are_real() -> None:
    parser, _ = build_parser("patterns")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "vllm-trimix"
        parser.parse_args(arguments)


def test_the_recipe_names_every_place() -> None:
    """CONTRIBUTING.md's list of files is where each pattern that users can name really stands."""
    recipe = (ROOT / "CONTRIBUTING.md").read_text().split("## To add a dynamic pattern", 1)[1].split("\n## ", 1)[0]
    paths = [path for path in re.findall(r"`([\w./]+\.(?:py|md))`", recipe) if path != "base.py"]
    assert len(paths) == 6
    for name in PATTERNS.keys() - {"dense"}:
        assert (ROOT / "vllm_trimix/patterns" / f"{name}.py").is_file()
        for path in paths:
            assert name in (ROOT / path).read_text(), path
