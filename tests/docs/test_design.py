"""docs/design.md shows the architecture that .importlinter holds."""

from __future__ import annotations

import configparser
import re

from tests.docs.reading import ROOT, bullets, rows, section

PAGE = "docs/design.md"


def _contracts() -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser()
    parser.read_string((ROOT / ".importlinter").read_text())
    return {name.rpartition(":")[2]: dict(parser[name]) for name in parser.sections() if ":contract:" in name}


CONTRACTS = _contracts()


def _names(value: str) -> list[str]:
    return [name.removeprefix("vllm_trimix.") for name in value.split()]


def test_the_layers_are_the_contracts() -> None:
    shown = [re.findall(r"`(\w+)`", row[0]) for row in rows(section(PAGE, "## Layers"))]
    assert shown == [line.split(" | ") for line in CONTRACTS["layers"]["layers"].strip().splitlines()]


def test_every_contract_is_told() -> None:
    told = [match[1] for item in bullets(section(PAGE, "## Layers")) if (match := re.match(r"\*\*(.*?)\*\*: \w", item))]
    assert told == [contract["name"] for contract in CONTRACTS.values()]


def test_the_three_parts_are_the_contracts() -> None:
    """What serves, what helps to choose and check, and the command, which is all that's left."""
    serves, helps, command = re.split(r"^What helps.*:$|^The command:$", section(PAGE, "## Folders"), flags=re.M)
    shown = [[_module(row[0]) for row in rows(part)] for part in (serves, helps, command)]
    serving, helping = (_names(CONTRACTS[name]["source_modules"]) for name in ("serving", "helping"))
    assert [sorted(names) for names in shown] == [sorted(serving), sorted(helping), ["cli"]]
    layers = {name for line in CONTRACTS["layers"]["layers"].strip().splitlines() for name in line.split(" | ")}
    assert layers == {name for names in shown for name in names}


def _module(cell: str) -> str:
    (path,) = re.findall(r"^`vllm_trimix/([\w.]+)`$", cell)
    assert (ROOT / "vllm_trimix" / path).exists(), path
    return str(path).removesuffix(".py")
