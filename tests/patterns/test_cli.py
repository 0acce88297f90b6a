"""`vllm-trimix patterns`: what it lists, what it shows of a file, and what a mistake says."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_trimix.cli.main import main
from vllm_trimix.cli.patterns import KERNELS, TRIANGLE_KERNELS, TRIANGLE_SOURCE, density
from vllm_trimix.config.entry import TrimixConfig
from vllm_trimix.config.head_files import write_head_file
from vllm_trimix.config.resolve import resolve
from vllm_trimix.patterns import triangle
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.flexprefill import FlexPrefill
from vllm_trimix.patterns.registry import PATTERNS, make_pattern
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.patterns.xattention import XAttention

ROOT = Path(__file__).parents[2]

LAYERS: list[list[DynamicPattern] | None] = [
    [VerticalSlash(1000, 6096), VerticalSlash(30, 800), VerticalSlash(1000, 6096), Dense()],
    None,
    [AShape(100, 800), BlockSparse(50), FlexPrefill(0.9, block_size=64), XAttention(0.8, block_size=64)],
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "heads.json"
    write_head_file(path, LAYERS, model="some/model", provenance={"date": "2026-01-01"})
    return path


def run(*arguments: object) -> int:
    return main(["patterns", *map(str, arguments)])


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    default = capsys.readouterr().out
    assert run("list") == 0
    text = capsys.readouterr().out
    assert text == default
    entries = {entry.splitlines()[0]: entry for entry in re.split(r"\n(?=\S)", text)}
    assert list(entries) == ["triangle", *PATTERNS], "the product's main pattern comes first"
    for name, cls in PATTERNS.items():
        assert cls.source in entries[name]
        assert re.search(r"what +\S.{20,}", entries[name])
        assert re.search(r"layers +shallow layers .* head file", entries[name])
        assert all(kernel in entries[name] for kernel in KERNELS.values())
    assert "parameters  gamma=0.95 tau=0.1 block_size=128 min_budget=0 max_budget=None\n" in entries["flexprefill"]


def test_list_names_the_triangle(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    assert capsys.readouterr().out.splitlines()[:6] == [
        "triangle",
        "  what        TriangleMix's deep-layer pattern: sink keys, a local window, dense last rows",
        "  layers      the triangle set (starting_layer, layers)",
        "  source      TriangleMix (arXiv 2507.21526)",
        "  parameters  n_init=8 n_local=512 last_n=128",
        "  kernels     PyTorch (CPU), Triton (CUDA)",
    ]


def test_a_pattern_stands_where_the_list_says() -> None:
    """The triangle is no dynamic pattern: neither ``shallow`` nor a head file may name it."""
    assert {"starting_layer", "layers", "shallow"} <= set(TrimixConfig.model_fields)
    with pytest.raises(ValueError, match="'triangle' is not a pattern"):
        make_pattern({"pattern": "triangle"}, where="shallow")
    for name in PATTERNS:
        entry = {"starting_layer": 1, "shallow": {"pattern": name}}
        shallow = resolve(entry, model="m", num_layers=2).shallow
        assert shallow is not None
        assert (shallow.layers, [pattern["pattern"] for pattern in shallow.patterns]) == ((0,), [name])


def test_kernels_are_those_that_exist() -> None:
    modules = {path.stem: path.read_text() for path in (ROOT / "vllm_trimix/kernels").rglob("*.py")}
    assert {name for name in modules if name.endswith("_sparse")} == set(KERNELS)
    assert {name for name, text in modules.items() if "\ndef triangle_prefill(" in text} == set(TRIANGLE_KERNELS)
    assert TRIANGLE_SOURCE in (inspect.getdoc(triangle) or "")


def test_show_gives_a_line_a_layer(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", file, "--length", 1000) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "own form, 3 layers, for some/model"
    assert lines[1] == "date: 2026-01-01"
    thirty = density(VerticalSlash(30, 800), 1000)
    assert thirty is not None
    assert lines[3].split(maxsplit=3) == [
        "0",
        "64",
        f"{(3 + thirty) / 4:.4f}",
        "2 x vertical_slash 1000/6096, 1 x vertical_slash 30/800, 1 x dense",
    ]
    assert lines[4].split(maxsplit=3) == ["1", "-", "-", "left out"]
    assert lines[5].split(maxsplit=3)[2] == "-", "the prompt decides, there is no density"
    assert "1 x flexprefill 0.9/0.1" in lines[5]
    assert len(lines) == 6, "no mean where a head has none"


def test_show_sums_up_where_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.json").write_text(json.dumps([{"0": ["stream_llm", 100, 800, 0.5]}]))
    assert run("show", tmp_path / "m.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "MInference's form, 1 layers"
    assert lines[-1] == "all heads: 0.0137 of causal attention at 131072 tokens, by budget"


def test_show_one_layer(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", file, "--layer", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "0.0137", "a_shape", "n_init=100", "n_local=800", "block_size=64"]
    assert lines[3].split() == [
        "2",
        "-",
        "flexprefill",
        "gamma=0.9",
        "tau=0.1",
        "block_size=64",
        "min_budget=0",
        "max_budget=None",
    ]
    assert len(lines) == 5
    assert run("show", file, "--layer", 1) == 0
    assert capsys.readouterr().out == "left out\n"


@pytest.mark.parametrize("length", [1, 899, 900, 901, 5000])
def test_density_counts_pairs(length: int) -> None:
    everything = length * (length + 1) // 2
    triangle = Triangle(100, 800, last_n=0).visible_pairs(length)
    assert density(AShape(100, 800), length) == pytest.approx(triangle / everything, rel=1e-12)
    assert density(Dense(), length) == 1
    assert density(XAttention(), length) is None
    blocks = sum(min(i + 1, 3 * 64) for i in range(length))
    assert density(BlockSparse(3), length) == pytest.approx(blocks / everything, rel=1e-12)


def test_plot(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    assert run("show", file, "--plot", tmp_path / "heads.png") == 0
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert f"plot: {tmp_path / 'heads.png'}" in capsys.readouterr().out


def test_plot_marks_every_head(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    # As text, what it draws can be read.
    assert run("show", file, "--plot", tmp_path / "heads.svg") == 0
    comments = re.findall(r"<!-- (.*?) -->", (tmp_path / "heads.svg").read_text())
    marks = ["7.1k", "0.83k", "7.1k", "all", "0.9k", "3.2k", "0.9", "0.8"]
    drawn = [comment for comment in comments if comment in marks]
    assert sorted(drawn) == sorted(marks)
    assert [name for name in PATTERNS if name in comments] == list(PATTERNS)


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("vllm-trimix: error: ")
    assert err.count("\n") == 1
    return err


def test_mistakes(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in error(capsys, "show", tmp_path / "none.json")
    assert "--layer: 3 is outside the file's 3 layers (0-2)" in error(capsys, "show", file, "--layer", 3)
    assert "--layer: -1" in error(capsys, "show", file, "--layer", -1)
    assert "--length: 0 is too small; the least is 1" in error(capsys, "show", file, "--length", 0)
    file.write_text(file.read_text().replace('"dense"', '"dnse"'))
    assert "layer 0, head 3.pattern: 'dnse' is not a pattern; did you mean 'dense'?" in error(capsys, "show", file)


def test_plot_without_matplotlib(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'vllm-trimix[plot]'" in error(capsys, "show", file, "--plot", "heads.png")


@pytest.mark.parametrize("arguments", [["shw"], ["show"], ["show", "heads.json", "--lenght", "5"]], ids=str)
def test_bad_command_lines_exit_2(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "vllm_trimix.cli.main", "patterns", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "vllm-trimix" in result.stderr
    assert "Traceback" not in result.stderr
