"""Recorded measurements say what they were measured on and keep their samples; the pages quote them right."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.generated import fill
from benchmarks.real_models import figures, pattern_tables, report, results, tables
from tests.docs.reading import PAGES, ROOT, prose, rows, section
from vllm_trimix.evaluation.statistics import paired_difference

RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT / "benchmarks" / "results").as_posix()


@pytest.mark.parametrize("path", RESULTS, ids=_name)
def test_a_result_names_its_machine_and_keeps_its_samples(path: Path) -> None:
    result = json.loads(path.read_text())
    if path.name.startswith("calibrate"):
        provenance = result["provenance"]
        assert provenance["date"]
        assert provenance["hardware"]
        assert provenance["versions"]["vllm"]
        assert all(sample["dense_s"] and sample["triangle_s"] for sample in provenance["samples"])
        return
    if result.get("kind") == "patterns":
        for part in (*result["density"], *result["ttft"]):
            _check_environment(part["environment"], path.parents[1].joinpath("README.md").read_text())
        return
    environment = result["environment"]
    if result.get("kind") == "evaluation":
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
        assert environment["hardware"]
        assert environment["versions"]["vllm"]
        _check_scores(result, path.parent)
        return
    _check_environment(environment, result.get("note", ""))
    if path.name == "result.json" and "rounds" in result:
        for row in result["rows"]:
            same = [r for r in result["rounds"] if all(r[key] == row[key] for key in ("length", "concurrency"))]
            assert len(same) == row["repeats"]
            assert all(r["measurements"][row["config"]]["ttfts_s"] for r in same)
    for row in result.get("rows", []):
        if path.name in ("kernels.json", "breakdown.json") and row["status"] == "ok":
            assert row["samples"], row


def _check_environment(environment: dict[str, Any], note: str) -> None:
    """A machine, versions and code; of code that no commit holds the note says what differed."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", environment["date"])
    assert environment["cpu"] or environment["gpu"]
    assert environment["versions"]["torch"]
    if environment["commit"].endswith("-dirty"):
        assert "-dirty:" in note, "the note must say what differed"


def _check_scores(result: dict[str, Any], folder: Path) -> None:
    """Each cell's score is the mean of the answers that are kept beside it; so is a divergence, where that is kept."""
    packed = folder / "answers.jsonl.gz"
    lines = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else (folder / "answers.jsonl").read_text()
    # Those that aren't packed begin with what they are of.
    entries = [json.loads(line) for line in lines.splitlines()[0 if packed.exists() else 1 :]]
    answers = [entry for entry in entries if "facts" not in entry]
    for cell in result["cells"]:
        keys = ("task", "length", "configuration")
        mine = [answer for answer in answers if all(answer[key] == cell[key] for key in keys)]
        assert len(mine) == cell["n"] > 0
        if cell["measure"] != "agreement":
            assert sum(answer["score"] for answer in mine) / len(mine) == pytest.approx(cell["score"])
        elif packed.exists() and "kl" in cell:
            means = [sum(answer["kl"]) / len(answer["kl"]) for answer in mine]
            assert sum(means) / len(means) == pytest.approx(cell["kl"], rel=1e-2, abs=1e-12)


def test_the_readme_table_is_the_recorded_one() -> None:
    text = section("README.md", "## Time to first token")
    [folder] = re.findall(r"`(benchmarks/results/[\w.-]+-ttft)/?`", text)
    result = json.loads((ROOT / folder / "result.json").read_text())
    assert result["environment"]["date"] in text
    measured = {(row["config"], row["length"]): row for row in result["rows"]}
    table = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \((.*?)\) \| (\S*) \| (\S*) \|$", text, re.M)
    assert [int(line[0]) for line in table] == sorted({row["length"] for row in result["rows"]})
    for length, stock, trimix, ratio, interval, captured, bound in table:
        mine = measured["trimix", int(length)]
        assert float(stock) == pytest.approx(measured["stock", int(length)]["ttft_median_s"], rel=5e-3)
        assert float(trimix) == pytest.approx(mine["ttft_median_s"], rel=5e-3)
        assert float(ratio) == pytest.approx(mine["ratio_to_stock"], abs=5.1e-3)
        assert interval == "{:.2f}-{:.2f}".format(*mine["ratio_ci95"])
        assert captured == ("" if mine["captured_saving"] is None else f"{mine['captured_saving']:.2f}")
        assert bound == ("" if mine["pair_bound"] is None else f"{mine['pair_bound']:.2f}")


def test_the_measurements_quote_evaluations_right() -> None:
    text = section("docs/measurements.md", "## What the mask costs")
    [folder] = re.findall(r"`(benchmarks/results/[\w.-]+-eval)`", text)
    table = re.findall(
        r"^\| (circuit|small trained).*? \| (`.*?`) \| [^|]+ \| (\d+) \| ([\d.]+) \| ([\d.]+) \| (.*?) \|$",
        text,
        re.M,
    )
    assert len(table) == 2
    for model, suites, count, stock, trimix, interval in table:
        scores: dict[str, dict[str, float]] = {"stock": {}, "trimix": {}}
        for suite in re.findall(r"`(\w+)`", suites):
            for path in (ROOT / folder).glob(f"{model.split()[-1]}-{suite}*/answers.jsonl"):
                for answer in map(json.loads, path.read_text().splitlines()[1:]):
                    if "facts" in answer:
                        continue
                    scores[answer["configuration"]][f"{path.parent.name} {answer['sample']}"] = answer["score"]
        names = sorted(scores["stock"])
        assert sorted(scores["trimix"]) == names
        assert len(names) == int(count)
        mine, dense = ([scores[name][key] for key in names] for name in ("trimix", "stock"))
        assert f"{100 * sum(dense) / len(dense):.1f}" == stock
        assert f"{100 * sum(mine) / len(mine):.1f}" == trimix
        found = paired_difference(mine, dense)
        assert interval == f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    _check_perplexity(text, folder)


def _check_perplexity(text: str, folder: str) -> None:
    sentence = r"costs perplexity ([\d.]+) nats a token at 247 tokens \(([\d.]+) to ([\d.]+)\)"
    ((nats, low, high),) = re.findall(sentence, prose(text))
    result = json.loads((ROOT / folder / "trained-ppl" / "result.json").read_text())
    (cell,) = [c for c in result["cells"] if c["length"] == 247 and c["configuration"] == "trimix"]
    quoted = {"mean": -float(nats), "high": -float(low), "low": -float(high)}
    assert cell["difference"] == pytest.approx(quoted, abs=5.1e-3)


def test_the_measurements_quote_dynamic_patterns_right() -> None:
    """Ratio to stock and density by length: the triangle alone, then with each pattern."""
    page = "docs/measurements.md"
    text = section(page, "## Time to first token, with dynamic patterns too")
    [folder] = re.findall(r"\(\.\./(benchmarks/results/[\w.-]+)/report\.md\)", text)
    result = json.loads((ROOT / folder / "result.json").read_text())
    assert result["environment"]["date"] in text
    measured = {(row["config"], row["length"]): row for row in result["rows"]}
    lines = rows(text)
    assert [int(line[0]) for line in lines] == sorted({row["length"] for row in result["rows"]})
    for length, *cells in lines:
        for config, cell in zip(("trimix", "trimix+minference", "trimix-block_sparse"), cells, strict=True):
            row = measured[config, int(length)]
            figures = [float(figure) for figure in re.findall(r"[\d.]+", cell)]
            expected = [row[key] for key in ("ratio_to_stock", "density") if row[key] is not None]
            assert figures == pytest.approx(expected, abs=5.1e-3)


def test_the_pages_show_what_is_kept_of_pretrained_models() -> None:
    page = PAGES["docs/is-it-lossless.md"]
    [folder] = re.findall(r"generated from `(benchmarks/results/[\w.-]+-real-models)`", prose(page))
    found = results.read(ROOT / folder)
    drawn = {part: name for part, name, _ in figures.PICTURES if (ROOT / "docs" / "figures" / name).exists()}
    assert fill(page, report.parts(found, drawn)) == page
    assert fill(PAGES["docs/patterns.md"], {"choice": pattern_tables.choice(found)}) == PAGES["docs/patterns.md"]
    assert fill(PAGES["README.md"], {"real-models": tables.summary(found)}) == PAGES["README.md"]
