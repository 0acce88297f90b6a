"""What runs have seen, in ``build/families``, and the page that is written from it."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.families.family import Family
from tests.families.run import Report

ROOT = Path(__file__).parents[2]
STORE = ROOT / "build" / "families"
DOCS = ROOT / "docs" / "models.md"
VERSIONS = ("vllm", "transformers", "torch")

_SAID = ("published", "covers", "note", "feature")
"""What no run depends on."""
WHY = {
    "sliding_window": "layers with a window",
    "no_attention": "layers without attention",
    "soft_cap": "layers with a soft cap, on CPUs",
    "learned_sinks": "layers with learned sinks",
    "alibi": "layers with ALiBi",
    "kv_sharing": "layers that read another's keys",
    "wrapped_backend": "layers whose steps vLLM rewrites (chunks, prefixes)",
    "not_decoder": "layers that aren't causal",
}
"""Reasons of the start-up line, in words."""

_HEAD = """# Families of models

What TRIMIX does in each family of models that vLLM serves, for whoever wonders about theirs. A real engine has run each
as a toy: its `config.json` as published, small sizes, random weights. `make test-full` runs them (tier K), and
`python -m tests.families.table --write-docs` writes this page from what was seen; {versions},
on a CPU, {date}.

- **Sparse** layers run the triangle where they are chosen. Opted-out requests got stock vLLM's answers, bit for bit.
- **Compared**: masked log-probabilities are Hugging Face's under `use_triangle`, so `vllm-trimix probe` finds layers
  there. Elsewhere rows were counted, and answers change with the mask.
- A fine-tuned model, or another size, is of its family. What a server would do with yours:
  `vllm-trimix doctor MODEL`.

"""


def key(family: Family) -> str:
    """Changes with what a run of the entry depends on."""
    said = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
    plain = Family(family.name, family.published, {})
    entry = json.dumps(
        {name: value for name, value in said.items() if name not in _SAID and value != getattr(plain, name)},
        sort_keys=True,
        default=sorted,
    )
    return hashlib.sha256(entry.encode()).hexdigest()


def keep(family: Family, report: Report) -> None:
    """Writes down what was seen of a family."""
    STORE.mkdir(parents=True, exist_ok=True)
    found = {"key": key(family), "versions": versions(), **dataclasses.asdict(report)}
    (STORE / f"{family.slug}.json").write_text(json.dumps(found))


def kept(family: Family) -> dict[str, Any] | None:
    """What was seen of a family with this very entry, or None."""
    path = STORE / f"{family.slug}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("key") == key(family) else None


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    return {name: metadata.version(name) for name in VERSIONS}


def rows(families: list[Family]) -> dict[str, list[str]]:
    """The rows of the page's three tables."""
    tables: dict[str, list[str]] = {"served": [], "refused": [], "stock_fails": []}
    for family in families:
        names = ", ".join(f"`{name}`" for name in family.architectures or family.config.get("architectures", ()))
        hub = f" ([{family.published}](https://huggingface.co/{family.published}))" if family.published else ""
        model = f"{family.name}{hub}"
        if family.outcome == "served":
            stays = "; ".join(dict.fromkeys(WHY[reason] for reason in family.stock.values())) or "nothing"
            sparse = "all layers" if not family.stock else "the others" if family.sparse else "nothing"
            note = f"{stays} ({family.note})" if family.note else stays
            compared = "yes" if family.truth == "hf" else f"no: {family.truth}"
            tables["served"].append(f"| {model} | {names} | {sparse} | {note} | {compared} |")
        else:
            said = family.words.replace("|", "\\|")
            note = f"; {family.note}" if family.note else ""
            tables[family.outcome].append(f"| {model} | {names} | {said}{note} |")
    return tables


def page(families: list[Family], *, date: str, said: dict[str, str]) -> str:
    """The whole page."""
    tables = rows(families)
    found = ", ".join(f"{name} {version}" for name, version in said.items())
    parts = [
        _HEAD.format(versions=found, date=date),
        f"## Served ({len(tables['served'])})\n\n",
        "| family | architectures | sparse | stays stock | compared |\n|---|---|---|---|---|\n",
        "\n".join(tables["served"]),
        f"\n\n## Refused at start ({len(tables['refused'])})\n\n| family | architectures | says |\n|---|---|---|\n",
        "\n".join(tables["refused"]),
        f"\n\n## Not served by stock vLLM on this machine ({len(tables['stock_fails'])})\n\n",
        "| family | architectures | stock vLLM says |\n|---|---|---|\n",
        "\n".join(tables["stock_fails"]),
        "\n",
    ]
    return "".join(parts)


def write_docs(families: list[Family]) -> None:
    """Writes the page, if all entries have been run as they are.

    Raises:
        ValueError: Some haven't, or by other versions.
    """
    missing = [family.name for family in families if (kept(family) or {}).get("versions") != versions()]
    if missing:
        raise ValueError(f"{len(missing)} families have not been run as they are: {', '.join(missing)}")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    DOCS.write_text(page(families, date=today, said=versions()))
