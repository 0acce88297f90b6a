"""What the mask costs two published models, by this package's own commands, where their weights lie on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.report import Report, load
from benchmarks.gpu.running.source import ROOT

WEIGHTS = "TRIMIX_REAL_MODELS"
"""Environment variable: a folder that holds a folder for each model, by its name without its organisation."""
_PROGRAM = "import sys; from vllm_trimix.cli.main import main; sys.exit(main())"
_INDEX = "model.safetensors.index.json"
# The exit status of a command that can't begin.
_REFUSED = 2


def evaluate(report: Report) -> None:
    """``vllm-trimix eval``, stock and TRIMIX: no loss beyond chance. What was asked before a stop isn't asked again."""
    model = _weights(report)
    if model is None:
        return
    settings = report.settings
    trimix = f"--trimix={json.dumps(settings['trimix'])}"
    arguments = [settings["suite"], str(model), trimix, *settings["arguments"]]
    if settings["suite"] == "ppl":
        arguments.append(f"--text={_text(report.folder / 'text.txt')}")
    ended = _run(report, "eval", arguments, [] if report.cuda else ["--dtype=float32", "--enforce-eager"])
    if ended is None:
        return
    status, last = ended
    result = load(report.folder / "eval" / "result.json")
    if result is None:
        raise RuntimeError(f"vllm-trimix eval: exit status {status}: {last}")
    report.figure(evaluation={key: result[key] for key in ("settings", "cells", "unavailable", "notes")})
    compared = [cell for cell in result["cells"] if "difference" in cell]
    report.check("compared", compared, f"{len(compared)} cells of stock and TRIMIX")
    report.check("answered", not result["failed"], f"{len(result['failed'])} prompts without an answer")
    lost = [cell for cell in compared if cell["measure"] == "answer" and cell["verdict"] == "loss"]
    names = [f"{cell['task']} at {cell['length']}: {cell['baseline']:.2f} -> {cell['score']:.2f}" for cell in lost]
    report.check("no loss beyond chance", not lost, "; ".join(names) or "every interval holds 0 or lies above it")
    report.seen(f"{len(compared)} cells, {len(lost)} of them with a loss beyond chance")


def probe(report: Report) -> None:
    """``vllm-trimix probe``: which layers, beside those of the shipped preset."""
    model = _weights(report)
    if model is None:
        return
    ended = _run(report, "probe", [str(model), *report.settings["arguments"]], [])
    if ended is None:
        return
    status, last = ended
    preset = load(report.folder / "probe" / "preset.json") or {}
    report.figure(preset=preset)
    # It ends with 1 where it proves no layer: an answer as well.
    report.check("probed", status in (0, 1), f"exit status {status}: {last}")
    report.seen(f"layers {preset.get('layers', 'none')}, the configuration's {json.dumps(report.settings['trimix'])}")


def find(name: str) -> tuple[Path | None, str]:
    """Looks for a model's weights, on this machine alone.

    Args:
        name: Of the hub, or a folder seen from the checkout.

    Returns:
        Its folder, or None and where it was looked for.
    """
    if (ROOT / name).is_dir():
        return ROOT / name, ""
    given = os.environ.get(WEIGHTS)
    if given:
        folder = Path(given) / name.rpartition("/")[2]
        missing = _missing(folder)
        return (None, f"{WEIGHTS}: {missing}") if missing else (folder, "")
    # Heavy, and not everywhere.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None, f"the hub's cache on this machine doesn't hold it, and {WEIGHTS} names no folder"
    missing = _missing(folder)
    return (None, f"the hub's cache: {missing}") if missing else (folder, "")


def _missing(folder: Path) -> str:
    """What a folder lacks of a model, or nothing."""
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json"
    index = load(folder / _INDEX)
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    lacks = [name for name in names if not (folder / name).is_file()]
    return f"{folder} lacks {lacks[0]}, one of {len(names)} files of weights" if lacks else ""


def _weights(report: Report) -> Path | None:
    folder, reason = find(report.settings["model"])
    if folder is None:
        report.skip(f"no weights of {report.settings['model']}: {reason}")
    return folder


def _run(report: Report, command: str, arguments: list[str], flags: list[str]) -> tuple[int, str] | None:
    """Runs a command into the stage's folder, its output in the stage's log.

    Returns:
        Its exit status and its last line on stderr; None where a package of it is not installed, and the stage is
        skipped with its words.
    """
    words = [command, *arguments, f"--output={report.folder / command}", *(["--", *flags] if flags else [])]
    print("vllm-trimix", " ".join(words), flush=True)
    child = subprocess.run([sys.executable, "-c", _PROGRAM, *words], stderr=subprocess.PIPE, text=True, check=False)
    print(child.stderr, flush=True)
    last = (child.stderr.strip().splitlines() or ["no word on stderr"])[-1]
    if child.returncode == _REFUSED and "needs the package" in last:
        report.skip(last)
        return None
    return child.returncode, last


def _text(path: Path) -> Path:
    """Python's own language reference, which every installation has: some 100,000 tokens."""
    # Long, and only needed here.
    from pydoc_data.topics import topics

    path.write_text("\n".join(topics.values()))
    return path
