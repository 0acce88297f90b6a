"""Mutants by mutmut's operators: what a list written by hand forgets.

Of its operators those that change a number, a comparison, an operation or a truth value: what replaces a value by None
or a text by another crashes or changes a message, and says little.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.mutants.bench import ROOT

PLAN = ("tests/plan/test_plan.py", "tests/plan/test_oracle.py::test_any_step_that_hypothesis_thinks_of[0]")
LAYERS = ("tests/config/test_config.py",)
WORK = ("tests/kernels/test_work_items.py",)
CPU = tuple(f"tests/kernels/test_torch_cpu.py::{name}" for name in ("test_parameters", "test_threads_batch_tiles"))

TESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm_trimix/plan.py": dict.fromkeys(("build_plan", "build_dynamic_plan", "_prompt_spans"), PLAN),
    "vllm_trimix/patterns/triangle.py": {
        "mask": PLAN[:1],
        "visible_pairs": ("tests/patterns/test_cli.py::test_density_counts_pairs",),
        "is_dense": PLAN[:1],
    },
    "vllm_trimix/patterns/selection.py": dict.fromkeys(
        ("part", "mask", "merge"), ("tests/patterns/test_selection.py",)
    ),
    "vllm_trimix/kernels/torch_cpu.py": dict.fromkeys(("triangle_prefill", "_span"), CPU),
    "vllm_trimix/kernels/work_items.py": dict.fromkeys(("cut_work", "_parts", "_cut_tiles"), WORK),
    "vllm_trimix/layers.py": dict.fromkeys(("parse_layers", "format_layers"), LAYERS),
}
"""Functions that are mutated, and the tests that must notice."""

# Of the other files every so many-th: their tests take longer, and the rule is in the plan.
_EVERY = {"vllm_trimix/plan.py": 1}
EVERY_OTHER = 3

_KINDS = ("BinaryOperation", "BooleanOperation", "ComparisonTarget", "IfExp", "Integer", "Name", "UnaryOperation")


class Generated(NamedTuple):
    """A mutant.

    Attributes:
        path: File in the checkout.
        function: Where in it.
        old: The lines that it changes, without indentation.
        new: What stands there instead.
        text: The whole file with the defect.
        tests: The tests that must notice.
    """

    path: str
    function: str
    old: str
    new: str
    text: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.path}:{self.function}: {self.old} -> {self.new}"


def mutants(path: str) -> list[Generated]:
    """The mutants of a file that are tried, in the order of their places."""
    return list(generate(path))[:: _EVERY.get(path, EVERY_OTHER)]


def generate(path: str) -> Iterator[Generated]:
    """All mutants of a file."""
    import libcst
    from mutmut.mutation.file_mutation import create_mutations

    source = (ROOT / path).read_text()
    with contextlib.chdir(ROOT):
        module, mutations, _, _ = create_mutations(path, source)
    raised = _RaisedNodes()
    module.visit(raised)
    for mutation in mutations:
        function: Any = mutation.contained_by_top_level_function
        name = function.name.value if isinstance(function, libcst.FunctionDef) else ""
        kind = type(mutation.original_node).__name__
        if name not in TESTS[path] or kind not in _KINDS or id(mutation.original_node) in raised.nodes:
            continue
        text = module.deep_replace(mutation.original_node, mutation.mutated_node).code
        old, new = _changed(source, text)
        yield Generated(path, name, old, new, text, TESTS[path][name])


def _changed(source: str, text: str) -> tuple[str, str]:
    lines = list(difflib.ndiff(source.splitlines(), text.splitlines()))
    return tuple(" ".join(line[2:].strip() for line in lines if line.startswith(sign)) for sign in ("- ", "+ "))  # type: ignore[return-value]


def _RaisedNodes() -> Any:
    """Collects the nodes within ``raise`` statements: a message is no result."""
    import libcst

    class Collector(libcst.CSTVisitor):
        def __init__(self) -> None:
            self.nodes: set[int] = set()
            self._depth = 0

        def visit_Raise(self, node: libcst.Raise) -> None:
            self._depth += 1

        def leave_Raise(self, original_node: libcst.Raise) -> None:
            self._depth -= 1

        def on_visit(self, node: libcst.CSTNode) -> bool:
            wanted = super().on_visit(node)
            if self._depth:
                self.nodes.add(id(node))
            return wanted

    return Collector()


EQUIVALENT: dict[str, str] = {}
"""Survivors that change no result, and why; by name."""
