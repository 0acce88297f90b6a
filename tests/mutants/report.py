"""``docs/mutants.md``: every mutant and the test that notices it."""

from __future__ import annotations

from collections.abc import Mapping

from tests.mutants import generated, hand
from tests.mutants.bench import ROOT, Outcome

DOCS = ROOT / "docs" / "mutants.md"

_INTRO = """\
# Mutants

Defects put into the sources on purpose: each must fail some test. `tests/mutants` tries them in a copy of the checkout;
`make test-full` tries all as tier G, `make test` a few, and `python -m tests.mutants.run --write-docs` writes this page
(it needs mutmut, of the extra `dev`). Tests named `scenario:` are those of `tests/backend`, a scenario at a time on one
dense backend.

Addresses have mutants of their own: every cast to 64 bits of the Triton kernels in `tests/kernels/test_addresses.py`,
offsets of the compiled CPU kernel in `tests/kernels/test_narrow_offsets.py`.
"""


def render(outcomes: Mapping[str, Outcome]) -> str:
    """The page.

    Args:
        outcomes: Of all mutants, by name.
    """
    lines = [_INTRO, "## By hand", "", "| mutant | file | killed by |", "|---|---|---|"]
    lines += [row(mutant.name, mutant.path, outcomes[mutant.name].killed_by) for mutant in hand.MUTANTS]
    lines += [
        "",
        "## By mutmut's operators",
        "",
        "Those that change a number, a comparison, an operation or a truth value, in functions that decide what is",
        f"computed: one in {generated.EVERY['vllm_trimix/plan.py']} of `vllm_trimix/plan.py`, one in "
        f"{generated.EVERY_OTHER} of the other files.",
        "",
        "| file | function | mutants | killed | survived |",
        "|---|---|---|---|---|",
    ]
    survivors = []
    for path, functions in generated.TESTS.items():
        mutants = generated.mutants(path)
        for function in functions:
            mine = [mutant for mutant in mutants if mutant.function == function]
            alive = [mutant for mutant in mine if not outcomes[mutant.name].killed_by]
            survivors += alive
            lines.append(
                f"| `{path}` | `{function}` | {len(mine)} | {len(mine) - len(alive)} | {len(alive) or 'none'} |"
            )
    lines += [
        "",
        "Survivors, none of which changes a result:",
        "",
        "| file | change | why it survives |",
        "|---|---|---|",
    ]
    for mutant in survivors:
        why = generated.EQUIVALENT.get(mutant.name, "**unexplained**")
        lines.append(f"| `{mutant.path}` | {_code(mutant.old)} becomes {_code(mutant.new)} | {why} |")
    lines += [
        "",
        "Each of the others, and the test that noticed it first:",
        "",
        "| file | change | killed by |",
        "|---|---|---|",
    ]
    for path in generated.TESTS:
        for mutant in generated.mutants(path):
            killed_by = outcomes[mutant.name].killed_by
            if killed_by:
                lines.append(f"| `{path}` | {_code(mutant.old)} becomes {_code(mutant.new)} | {_killer(killed_by)} |")
    return "\n".join(lines) + "\n"


def row(name: str, path: str, killed_by: str) -> str:
    """A line of the table by hand."""
    return f"| {name} | `{path}` | {_killer(killed_by)} |"


def _killer(killed_by: str) -> str:
    # Parameters of a test may hold anything; the function is enough.
    return f"`{killed_by.split('[')[0]}`" if killed_by else "**survived**"


def _code(text: str) -> str:
    # In a table even code must hide its bars.
    return "`" + text.replace("|", "\\|") + "`"
