"""The list of what a GPU must check: ranked, complete, and struck by results alone."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import todo
from benchmarks.gpu.programs import PROGRAMS

ROOT = Path(__file__).parents[2]
TEXT = todo.TODO.read_text()
ITEMS = todo.items(TEXT)
KNOWN = {name: [stage.name for stage in program.stages] for name, program in PROGRAMS.items()}


def test_it_is_ranked_by_worth_over_minutes() -> None:
    assert [item.rank for item in ITEMS] == list(range(1, len(ITEMS) + 1))
    ratios = [item.worth / item.minutes for item in ITEMS]
    assert ratios == sorted(ratios, reverse=True)
    assert len(ITEMS) == len(re.findall(r"^\| \d+ \|", TEXT, re.M)), "a row can't be read"


def test_every_item_has_its_section() -> None:
    sections = re.split(r"^## ", TEXT, flags=re.M)[1:]
    assert [section.split("\n", 1)[0] for section in sections] == [item.name for item in ITEMS]
    assert all(section.count("\n") > 3 for section in sections)


def test_every_stage_is_an_items() -> None:
    for script, names in KNOWN.items():
        patterns = [pattern for item in ITEMS for pattern in item.stages.get(script, [])]
        assert [name for name in names if not any(fnmatch.fnmatch(name, each) for each in patterns)] == []
        assert [each for each in patterns if not fnmatch.filter(names, each)] == []


def test_every_kernel_is_named() -> None:
    sources = [path.read_text() for path in (ROOT / "vllm_trimix" / "kernels").glob("triton_*.py")]
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)}
    assert len(kernels) >= 4
    assert [name for name in sorted(kernels) if f"`{name}`" not in TEXT] == []


def result(status: str = "passed", **settings: Any) -> dict[str, Any]:
    return {"status": status, "settings": {"device": "cuda", "toy": False, **settings}}


def test_an_item_is_struck_when_its_stages_have_passed_on_a_gpu() -> None:
    def struck(results: dict[str, Any]) -> list[str]:
        return [item.name for item in todo.items(todo.strike(TEXT, results, KNOWN, "../r.json")) if item.struck]

    before = [item.name for item in ITEMS if item.struck]
    both = {"engine_v2_graphs": result(), "engine_v2_eager": result()}
    assert set(struck(both)) == {*before, "answers"}
    for wrong in (result("failed"), result("timeout"), result(toy=True), result(device="cpu")):
        assert struck({**both, "engine_v2_eager": wrong}) == before
    assert struck({"engine_v2_graphs": result()}) == before
    once = todo.strike(TEXT, both, KNOWN, "../r.json")
    assert "| ~~[answers](#answers)~~ |" in once
    assert once.count("settled: [results](../r.json)") == 1
    assert todo.strike(once, both, KNOWN, "../r.json") == once


def test_what_is_struck_is_in_committed_results() -> None:
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*/results.json")]
    for item in ITEMS:
        assert item.struck == any(todo.settled(item, found["stages"], KNOWN) for found in results), item.name


def test_a_file_that_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = TEXT
    for text in ("", "[]", '{"stages": []}'):
        (tmp_path / "r.json").write_text(text)
        assert todo.main([str(tmp_path / "r.json")]) == 2
        assert capsys.readouterr().err.endswith("is not a bundle's results.json; name one that --bundle wrote\n")
    assert todo.TODO.read_text() == before
