"""The page of real results: everything that the folders hold is in it, once, and the same each time."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.reporting.reading import Page, report
from vllm_trimix.cli.main import main
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import report as probe_report
from vllm_trimix.probing.outcome import Outcome, Plan, Settings, Tried
from vllm_trimix.probing.screening import Screened
from vllm_trimix.reporting.page import MAX_LETTERS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = sorted({path.parent for ending in ("*.json", "*.md") for path in RESULTS.rglob(ending)})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(RESULTS, output=tmp_path_factory.mktemp("page") / "all.html")


def test_every_folder_is_a_section(page: Page) -> None:
    assert len(page.attributes("section")) == len(FOLDERS) >= 6
    links = [link["href"] for link in page.attributes("a") if link["href"].startswith("#")]
    assert links == [f"#{section['id']}" for section in page.attributes("section")]
    for folder in FOLDERS:
        # Once in the table of contents, once in the section.
        name = folder.relative_to(RESULTS).as_posix()
        assert len(re.findall(rf"results/{re.escape(name)} ·|results/{re.escape(name)}(?![\w/-])", page.text)) >= 2


def test_titles_are_the_reports_own(page: Page) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", page.raw.decode())
    for folder, title in zip(FOLDERS, titles, strict=True):
        texts = [path for path in (folder / "report.md", folder / "README.md") if path.exists()]
        first = texts[0].read_text().splitlines()[0] if texts else ""
        assert html.unescape(title) == (first.removeprefix("# ") or folder.name)
        assert page.text.count("Time to first token, TRIMIX against stock vLLM") == 2 * titles.count(
            "Time to first token, TRIMIX against stock vLLM"
        )


def test_every_cell_of_every_table_is_there(page: Page) -> None:
    cells = {cell for table in page.tables for row in table for cell in row}
    expected = set()
    for path in RESULTS.rglob("*.md"):
        rows = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("|")]
        expected |= {re.sub(r"[`*]", "", cell).strip() for row in rows for cell in row if not set(cell) <= set("-: ")}
    assert len(expected) > 300
    assert expected - cells == set()


def test_figures_stand_below_each_other(page: Page) -> None:
    html = page.raw.decode()
    assert '<td class="number">8.368 (8.353-8.384)</td>' in html
    assert '<th class="number">TTFT (s)</th>' in html
    assert "<td>trimix+minference</td>" in html
    assert '<td style="text-align:right" class="number">1.3210 (15.9%)</td>' in html


def test_pictures_are_inside(page: Page) -> None:
    inside = [image["src"].partition(",")[2] for image in page.attributes("img")]
    assert sorted(inside) == sorted(base64.b64encode(path.read_bytes()).decode() for path in RESULTS.rglob("*.png"))
    assert all(image["alt"] for image in page.attributes("img"))


def test_json_is_there_up_to_a_limit(page: Page) -> None:
    paths = sorted(RESULTS.rglob("*.json"))
    assert len(page.pre) == len(paths)
    cut = 0
    for text, path in zip(page.pre, paths, strict=True):
        if len(text) < MAX_LETTERS:
            assert json.loads(text) == json.loads(path.read_text())
        else:
            assert len(text) == MAX_LETTERS
            cut += 1
    assert page.text.count("the rest is in the file itself") == cut


def test_where_it_was_measured_is_there(page: Page) -> None:
    facts = [dict(row for row in table if len(row) == 2) for table in page.tables]
    for path in RESULTS.rglob("*.json"):
        value = json.loads(path.read_text())
        said = value.get("environment") or value["provenance"]
        versions = ", ".join(f"{name} {version}" for name, version in said["versions"].items())
        date = said.get("date") or value["date"]
        expected = {"date": date, "versions": versions}
        for key in ("commit", "cpu", "hardware"):
            if key in said:
                expected[key] = said[key]
        if "note" in value:
            expected["note"] = value["note"]
        assert any(expected.items() <= table.items() for table in facts), path
        assert f"{said.get('cpu') or said['hardware']} · {date}" in page.text


def test_json_without_markdown_becomes_tables(page: Page) -> None:
    overhead = json.loads((RESULTS / "2026-11-21-cpu-overhead/result.json").read_text())["plan_64_requests_4_prefill"]
    samples = overhead["samples_us"]
    said = f"1000 values, median {statistics.median(samples):.6g}, {min(samples):g} to {max(samples):g}"
    expected = [["median_us", f"{overhead['median_us']}"], ["p99_us", f"{overhead['p99_us']}"], ["samples_us", said]]
    assert expected in page.tables


def test_the_same_results_give_the_same_bytes(page: Page, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        output = tmp_path / f"{seed}.html"
        command = [sys.executable, "-m", "vllm_trimix.cli.main", "report", str(RESULTS), "--output", str(output)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True)
        assert output.read_bytes() == page.raw


def _probe(folder: Path) -> Path:
    """What a probe of a model of four layers leaves."""
    folder.mkdir()
    settings = Settings(
        model="org/made-up",
        pattern=Triangle(),
        method="gradient",
        score="grad",
        objective="logit",
        num_random=1,
        seed=0,
        lengths=(2048,),
        prompts="0",
        scored=2,
        samples=2,
        dtype="bfloat16",
        device="cpu",
    )
    losses = {1: [0.001, 0.002], 2: [0.002, 0.003], 3: [0.5, 0.7]}
    tried = Tried("gradient", 2048, losses, losses, {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.5})
    outcome = Outcome(
        settings=settings,
        scores={"grad": [[0.1, 0.2, 0.3 * layer] for layer in range(4)]},
        reference="answers",
        screened=(Screened("needle", 2048, 4, 4),),
        plan=Plan(2, 60.0),
        ablation=None,
        ablation_losses=None,
        stock={},
        orders={"gradient": [0, 1, 2, 3]},
        correlations={},
        curve={"gradient": {1: 0.001, 2: 0.002, 4: 0.7}},
        control=3.0,
        tried=[tried],
        compared={"deepest": [2.0, 3.0]},
        logprobs=[-0.1, -0.2],
        chosen=[0, 1],
        kept={"gradient": 2},
    )
    environment = {"device": "Some CPU, 2 threads", "torch": "2.13.0", "transformers": "5.19.0", "python": "3.11.7"}
    probe_report.write(folder, outcome, environment=environment, kinds=["made up"], command="vllm-trimix probe x")
    (folder / "progress.json").write_text(json.dumps({"settings": {}, "results": {"unfinished": 1}}))
    return folder


def test_a_probe(tmp_path: Path) -> None:
    page = report(_probe(tmp_path / "trimix-probe"), output=tmp_path / "page.html")
    assert page.raw.decode().count("<h2>Layer probe of org/made-up</h2>") == 1
    assert [image["alt"] for image in page.attributes("img")] == ["importance", "quality"]
    assert ["2 (chosen)", "0.0025", "0.0057", "0.0025", "0.0057", "100%"] in [
        row for table in page.tables for row in table
    ]
    # The environment's device and the preset's date; what an unfinished probe needs is no result.
    assert page.text.count("Some CPU, 2 threads") >= 2
    assert len(page.pre) == 2
    assert "unfinished" not in page.text


def test_an_evaluation_and_several_reports_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    (folder / "plots").mkdir(parents=True)
    Figure(figsize=(1, 1)).savefig(folder / "plots" / "by length.png")
    (folder / "appendix.md").write_text("# Appendix\n\nmore\n")
    (folder / "report.md").write_text(
        "# Task `scores`\n\n![by length](plots/by%20length.png)\n\n## Details\n\n# More\n"
    )
    result = {"environment": {"gpu": "Some GPU", "date": "2026-01-02"}, "settings": {}, "cells": [{"task": "cwe"}]}
    (folder / "result.json").write_text(json.dumps(result))
    page = report(folder, output=tmp_path / "page.html")
    html = page.raw.decode()
    assert re.findall(r"<h(\d)>(.*?)</h", html) == [
        ("1", "vLLM-TriMix results"),
        ("2", "Task scores"),
        ("3", "Details"),
        ("3", "More"),
    ]
    assert html.index("Details") < html.index("<p>more</p>")
    assert '<p class="about">eval · Some GPU · 2026-01-02</p>' in html
    assert len(page.attributes("img")) == 1


def test_nested_named_twice_and_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b/deep/er", "a", ".hidden", "model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b/deep/er/kernels.md").write_text("text, then\n\n## a heading that is no title\n")
    (tmp_path / "a/result.json").write_text('{"environment": {"date": "2026-01-01"}}')
    (tmp_path / ".hidden/report.md").write_text("# hidden\n")
    (tmp_path / "model/config.json").write_text('{"num_hidden_layers": 4}')
    (tmp_path / "back").symlink_to(tmp_path)
    page = report(tmp_path / "b", tmp_path, tmp_path / "a" / "result.json", output=tmp_path / "page.html")
    assert re.findall(r"<h2>(.*?)</h2>", page.raw.decode()) == ["er", "a", "result.json"]
    assert "b/deep/er" in page.text
    assert "wrote" in (out := capsys.readouterr().out)
    assert "3 results" in out


def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(RESULTS)]) == 0
    assert Page((tmp_path / "trimix-report.html").read_bytes()).attributes("section")
    assert [path.name for path in tmp_path.iterdir()] == ["trimix-report.html"]
