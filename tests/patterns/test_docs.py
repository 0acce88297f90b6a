"""Pages about patterns say what the code does: names, sources, parameters, kernels, a head file that can be read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tests.docs.reading import PAGES, ROOT, code_blocks, prose, rows, section
from vllm_trimix.cli.patterns import KERNELS, TRIANGLE_KERNELS
from vllm_trimix.config.head_files import read_head_file
from vllm_trimix.config.shallow import COMPILED_CPU_MIN_SEQ_LEN, DEFAULT_MIN_SEQ_LEN
from vllm_trimix.patterns.flexprefill import DENSE_KEYS, MAX_COLUMNS, FlexPrefill
from vllm_trimix.patterns.registry import PATTERNS
from vllm_trimix.patterns.vertical_slash import FORCED_COLUMNS, FORCED_SLASHES, VerticalSlash

PAGE = "docs/patterns.md"
HEAD_FILES = "docs/head-files.md"


def test_the_overview_is_the_registry() -> None:
    """Every pattern once, the triangle among them, with the layers for which it is."""
    table = rows(PAGES[PAGE].split("\n## ", 1)[0])
    names = [name for row in table for name in row[0].split(", ")]
    assert sorted(names) == sorted(["triangle", *PATTERNS])
    layers = {name: row[1] for row in table for name in row[0].split(", ")}
    assert layers.pop("triangle") == "deep: the triangle set"
    assert set(layers.values()) == {"shallow"}
    kernels = {row[0]: row[3] for row in table}
    assert kernels["triangle"] == ", ".join([*TRIANGLE_KERNELS.values(), "reference"])


def test_the_table_is_the_registry() -> None:
    table = re.findall(
        r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", section(PAGE, "## Dynamic patterns"), re.MULTILINE
    )
    assert [row[0] for row in table] == list(PATTERNS)
    for name, source, parameters, kernels in table:
        cls = PATTERNS[name]
        assert source == cls.source
        expected = [f"{key}={value}" for key, value in dataclasses.asdict(cls()).items()]
        assert re.findall(r"`([^`]+)`", parameters) == expected
        assert kernels == ", ".join(KERNELS.values())


def test_every_pattern_says_what_chunks_change() -> None:
    first = " ".join(re.findall(r"^\| (`[^|]+) \|", section(PAGE, "## Chunks"), re.MULTILINE))
    assert sorted(re.findall(r"`(\w+)`", first)) == sorted(PATTERNS)


def test_constants_are_the_codes() -> None:
    page = prose(PAGES[PAGE])
    assert f"the first {FORCED_COLUMNS} keys and the nearest {FORCED_SLASHES} distances" in page
    assert f"the last {VerticalSlash.last_rows} rows' attention" in page
    assert f"the last {FlexPrefill.last_rows} rows' true attention" in page
    assert f"dense up to {DENSE_KEYS} keys" in page
    assert f"more than {MAX_COLUMNS} columns" in PAGES["docs/published-code.md"]


def test_the_example_file_can_be_read(tmp_path: Path) -> None:
    [text] = [text for text in code_blocks(HEAD_FILES, "json") if "vllm-trimix-heads" in text]
    (tmp_path / "heads.json").write_text(text)
    file = read_head_file(tmp_path / "heads.json", where="docs")
    assert file.model == "org/model"
    assert len(file.layers) == 2


def test_the_default_of_shallow_is_the_codes() -> None:
    (row,) = [row for row in rows(section(PAGE, "## Setting it")) if row[0] == "`min_seq_len`"]
    assert [int(number) for number in re.findall(r"\d+", row[1])] == [COMPILED_CPU_MIN_SEQ_LEN, DEFAULT_MIN_SEQ_LEN]


def test_the_recipe_names_every_place() -> None:
    """CONTRIBUTING.md's list of files is where each pattern that users can name really stands."""
    paths = re.findall(r"^- `([\w./]+\.(?:py|md))`", section("CONTRIBUTING.md", "### A dynamic pattern"), re.MULTILINE)
    assert len(paths) == 7
    for name in PATTERNS.keys() - {"dense"}:
        for path in paths:
            assert name in (ROOT / path.replace("NAME", name)).read_text(), path
