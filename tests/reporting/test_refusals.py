"""What the command refuses, in one line each, and what it never overwrites."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.reporting.reading import fails, report
from vllm_trimix.cli.main import main
from vllm_trimix.reporting import sources

RESULT = json.dumps({"environment": {"date": "2026-01-02"}})


@pytest.fixture
def result(tmp_path: Path) -> Path:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "result.json").write_text(RESULT)
    return folder


def test_no_such_folder(tmp_path: Path, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    line = fails(capsys, str(result), str(tmp_path / "missing"), "--output", str(output))
    assert f"no such folder: '{tmp_path}/missing'" in line
    assert not output.exists()


@pytest.mark.parametrize("name", [None, "text.txt", "config.json", "progress.json", "list.json", "plot.png"])
def test_a_folder_without_results(name: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = {
        "config.json": '{"hidden_size": 4}',
        "progress.json": '{"settings": {}, "results": {}}',
        "list.json": "[1]",
    }
    if name is not None:
        (folder / name).write_text(contents.get(name, "x"))
    line = fails(capsys, str(folder), "--output", str(tmp_path / "page.html"))
    assert f"no results in '{folder}'; a result is a folder with a report in Markdown, or JSON that names" in line


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("report.md", "# A\n", "is neither a folder nor a .json file"),
        ("config.json", '{"hidden_size": 4}', "is not a result: it names no 'environment' or 'provenance'"),
        ("list.json", "[1]", "is not a result"),
        ("broken.json", "{", "is not valid JSON: Expecting property name"),
    ],
)
def test_a_file_that_is_no_result(
    name: str, text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    line = fails(capsys, str(tmp_path / name), "--output", str(tmp_path / "page.html"))
    assert f"'{tmp_path / name}' {why}" in line


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "Expecting value"),
        (b'{"environment": {"date": ', "Expecting value"),
        (b'{"environment": {}} {}', "Extra data"),
        (b'\xff\xfe{"a": 1}', "can't decode byte 0xff"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 600 + b"]" * 600, None),
        (b"9" * 5000, "Exceeds the limit"),
    ],
)
def test_broken_json(
    raw: bytes, why: str | None, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (result / "other.json").write_bytes(raw)
    output = tmp_path / "page.html"
    if why is None:
        report(result, output=output)
        return
    line = fails(capsys, str(tmp_path), "--output", str(output))
    assert f"'{result}/other.json' is not valid JSON: " in line
    assert why in line
    assert not output.exists()


def test_what_cannot_be_read(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (result / "gone.json").symlink_to("nowhere.json")
    assert "No such file or directory" in fails(capsys, str(result), "--output", str(tmp_path / "page.html"))
    (result / "gone.json").unlink()

    # Permissions don't bind the administrator, who may run the tests.
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    line = fails(capsys, str(result), "--output", str(tmp_path / "page.html"))
    assert f"Permission denied: '{result}/result.json'" in line


def test_a_folder_that_cannot_be_listed(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions don't bind the administrator")
    (result / "closed").mkdir(mode=0)
    assert "Permission denied" in fails(capsys, str(result), "--output", str(tmp_path / "page.html"))


def test_too_many_folders(
    tmp_path: Path, result: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        (tmp_path / f"{number}").mkdir()
    monkeypatch.setattr(sources, "MAX_FOLDERS", 4)
    line = fails(capsys, str(tmp_path), "--output", str(tmp_path / "page.html"))
    assert f"'{tmp_path}' holds more than 4 folders, the limit; name the results' own folders" in line


@pytest.mark.parametrize("text", ["", "not a page", "<!DOCTYPE html><html><body>mine</body></html>"])
def test_a_file_that_is_not_ours_stays(
    text: str, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    output.write_text(text)
    line = fails(capsys, str(result), "--output", str(output))
    assert f"--output: '{output}' exists and is no page of vllm-trimix report" in line
    assert output.read_text() == text


def test_a_page_of_ours_is_replaced(result: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    report(result, output=output)
    (result / "result.json").write_text(RESULT.replace("2026-01-02", "2027-03-04"))
    assert "2027-03-04" in report(result, output=output).text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "result"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("result", "is a folder; name a file in it"),
        ("page.txt", "must end in .html"),
        ("page", "must end in .html"),
        ("pipe.html", "exists and is no page"),
        ("missing/page.html", "cannot write to the folder"),
        ("result/result.json/page.html", "cannot write to the folder"),
    ],
)
def test_bad_outputs(name: str, why: str, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.html")
    line = fails(capsys, str(result), "--output", str(tmp_path / name))
    assert line.startswith("vllm-trimix: error: --output: ")
    assert why in line
    assert (result / "result.json").read_text() == RESULT


def test_nothing_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report"])
    assert stopped.value.code == 2
    assert "required: DIR" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["jinja2", "markdown_it"])
def test_a_missing_package_is_named(
    package: str, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm_trimix.reporting.page

    # Imported anew, and not found.
    for name in ("page", "markdown"):
        monkeypatch.delitem(sys.modules, f"vllm_trimix.reporting.{name}")
        monkeypatch.delattr(vllm_trimix.reporting, name)
    monkeypatch.setitem(sys.modules, package, None)
    line = fails(capsys, str(result), "--output", str(tmp_path / "page.html"))
    assert f"this command needs the package {package!r}, which is not installed" in line
