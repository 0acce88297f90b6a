"""What is kept of an evaluation of the pretrained models, and the tables and pictures that come from it."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from benchmarks.real_models import figures, report, results, tables
from tests.benchmarks import real_answers
from tests.docs.reading import rows


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real-eval")
    real_answers.whole(folder)
    return folder


@pytest.fixture(scope="module")
def kept(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    assert len(results.write(raw, folder)) == 9
    return folder


@pytest.fixture(scope="module")
def found(kept: Path) -> dict[str, results.Kept]:
    return results.read(kept)


def table(found: dict[str, results.Kept], part: str) -> list[list[str]]:
    return rows(tables.parts(found)[part])


def test_what_is_kept_is_small_and_whole(raw: Path, kept: Path, found: dict[str, results.Kept]) -> None:
    before = (raw / "smollm2-documents" / "answers.jsonl").stat().st_size
    packed = kept / "smollm2-documents" / "answers.jsonl.gz"
    assert packed.stat().st_size < before / 10
    documents = found["smollm2-documents"]
    assert len(documents.answers) == 6
    [first, *_] = [line for line in documents.answers if line["configuration"] == "trimix"]
    # Up to where the answers part, that place among them.
    assert len(first["kl"]) == 20
    assert first["kl"] == pytest.approx([0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)] * 20, rel=5e-3)
    cell = documents.cell("prompts", 2048, "trimix")
    assert cell is not None
    assert cell["kl"] == pytest.approx(first["kl"][0], rel=5e-3)
    assert "likeliest" not in first
    assert documents.result["environment"] == {
        key: real_answers.FACTS[key] for key in ("hardware", "versions", "engine")
    }
    assert documents.result["configurations"]["trimix"]["resolved"]["layers"] == list(range(20, 30))


def test_the_same_answers_are_kept_the_same(raw: Path, kept: Path, tmp_path: Path) -> None:
    results.write(raw, tmp_path)
    for path in kept.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(kept)).read_bytes() == path.read_bytes()


def test_a_running_evaluation_can_be_kept(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "smollm2-ruler"
    folder.mkdir(parents=True)
    text = (raw / "smollm2-ruler" / "answers.jsonl").read_text()
    torn = text + '{"configuration": "tri'
    (folder / "answers.jsonl").write_text(torn)
    assert results.write(tmp_path / "raw", tmp_path / "kept") == ["smollm2-ruler"]
    assert len(results.read(tmp_path / "kept")["smollm2-ruler"].answers) == 118
    assert (folder / "answers.jsonl").read_text() == torn
    (folder / "answers.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl holds no answers of an evaluation"):
        results.write(tmp_path / "raw", tmp_path / "kept")


def test_too_much_is_not_kept(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match=r"answers\.jsonl\.gz: \d+ bytes are more than 10"):
        results.write(raw, tmp_path)


def test_results_that_are_broken_are_named(kept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "smollm2-ruler"
    folder.mkdir()
    (folder / "result.json").write_text((kept / "smollm2-ruler" / "result.json").read_text())
    with pytest.raises(ValueError, match="smollm2-ruler: no results that were kept"):
        results.read(tmp_path)
    (folder / "answers.jsonl.gz").write_bytes(gzip.compress(b"no JSON\n"))
    with pytest.raises(ValueError, match="smollm2-ruler: no results that were kept"):
        results.read(tmp_path)


def test_tables_of_tasks(found: dict[str, results.Kept]) -> None:
    # What stock doesn't solve isn't shown; what has few prompts says so.
    assert table(found, "tasks") == [
        ["needle", "100 to 75: -25.0 (-71.7 to +38.3), n=4"],
        ["niah_single_2", "100 to 80: **-20.0 (-31.2 to -7.3)**"],
        ["cwe", "50 to 50: +0.0 (-46.2 to +46.2), n=4"],
    ]
    [row] = rows(tables.summary(found))
    assert row[:6] == ["SmolLM2-135M-Instruct, layers 20-29", "3", "2048", "58", "96.6", "77.6"]
    assert row[7].startswith("needle -25.0")
    assert table(found, "needle") == [
        ["SmolLM2-135M-Instruct", "2048", "4", "100", "75", "-25.0 (-71.7 to +38.3)", "50% (-50)"]
    ]


def test_tables_of_divergence(found: dict[str, results.Kept]) -> None:
    [row] = table(found, "documents")
    assert row[:3] == ["SmolLM2-135M-Instruct", "2048", "2"]
    assert row[3].startswith("0.23 (")
    assert row[5:] == ["100", "100", "0", "100"]
    by_count = [row for row in table(found, "layers") if row[0] in ("3", "9")]
    assert [row[0] for row in by_count] == ["3", "9"]
    # Of two random sets both are named.
    assert by_count[0][2] == "0.13 (0.037 to 0.23)"
    assert by_count[0][3] == "100 to 100"
    assert [row[0] for row in table(found, "layers") if "," in row[0] or row[0] == "5"] == ["5", "5, 11", "5, 11, 17"]
    varied = table(found, "shape")
    assert [row[:2] for row in varied] == [
        *(["shape", "triangle"], ["shape", "window"], ["shape", "a_shape"]),
        *(["last_n", "0"], ["last_n", "16"], ["last_n", "128"]),
        *(["n_local", "64"], ["n_local", "512"]),
    ]
    assert varied[2][4] == varied[3][4] == "100 to 0"


def test_tables_of_long_answers_and_likelihood(found: dict[str, results.Kept]) -> None:
    [row] = table(found, "long")
    assert row[4:9] == ["100", "100", "0", "0", "0"]
    assert row[9].startswith("100 to 100: +0.0 (")
    assert row[10] == "0 to 80"
    [row] = table(found, "perplexity")
    assert row == ["SmolLM2-135M-Instruct", "2048", "3", "3.000", "3.500", "+0.5000 (+0.5000 to +0.5000)"]


def test_agreement_by_place(found: dict[str, results.Kept]) -> None:
    curve = figures.by_place(found["smollm2-long"], "list", "trimix")
    assert (curve[99], curve[100], len(curve)) == (100, 0, 512)
    assert set(figures.by_place(found["smollm2-long"], "list", "noise-floor")) == {100}


def test_pictures_and_pages(
    kept: Path, found: dict[str, results.Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PAGE", "README", "PATTERNS"):
        monkeypatch.setattr(report, name, tmp_path / f"{name}.md")
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures")
    marks = [f"<!-- generated: {part} -->\n<!-- end -->\n" for part in tables.parts(found)]
    report.PAGE.write_text("# Page\n\n" + "\n".join(marks))
    report.README.write_text("# Readme\n\n<!-- generated: real-models -->\n<!-- end -->\n")
    report.PATTERNS.write_text("# Patterns\n\n<!-- generated: choice -->\n<!-- end -->\n")
    for _ in range(2):
        assert report.main([str(kept), "--write-docs"]) == 0
    page = report.PAGE.read_text()
    drawn = sorted(path.name for path in report.FIGURES.iterdir())
    assert drawn == [f"lossless-{name}.png" for name in ("agreement", "layers", "needle", "parts", "tasks")]
    assert all(f"(figures/{name})" in page for name in drawn)
    assert all(path.stat().st_size > 5000 for path in report.FIGURES.iterdir())
    # Dynamic patterns have folders of their own, which aren't among these.
    assert page.count("Not measured yet") == report.PATTERNS.read_text().count("Not measured yet") == 1
    assert tables.summary(found) in report.README.read_text()


def test_nothing_is_measured_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("Not measured yet.") >= len(tables.parts({}))
    assert figures.draw(tmp_path, {}) == {}


def test_a_broken_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "smollm2-ruler").mkdir()
    (tmp_path / "smollm2-ruler" / "result.json").write_text(json.dumps({}))
    assert report.main([str(tmp_path)]) == 1
    assert "real-models: error: " in capsys.readouterr().err
