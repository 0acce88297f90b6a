"""Mutants by mutmut's operators: what a list written by hand forgets.

Of its operators those that change a number, a comparison, an operation or a truth value: what replaces a value by None
or a text by another crashes or changes a message, and says little.
"""

from __future__ import annotations

import contextlib
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
        "visible_pairs": PLAN[:1],
        "is_dense": PLAN[:1],
    },
    "vllm_trimix/patterns/selection.py": dict.fromkeys(
        ("part", "mask", "merge"), ("tests/patterns/test_selection.py",)
    ),
    "vllm_trimix/kernels/torch_cpu.py": dict.fromkeys(("triangle_prefill", "_span"), CPU),
    "vllm_trimix/kernels/work_items.py": dict.fromkeys(("cut_work", "_parts", "_cut_tiles"), WORK),
    "vllm_trimix/config/layers.py": dict.fromkeys(("parse_layers", "format_layers"), LAYERS),
}
"""Functions that are mutated, and the tests that must notice."""

# Every so many-th: the run must end within minutes, and neighbours on a line die of the same test.
EVERY = {"vllm_trimix/plan.py": 2}
EVERY_OTHER = 5

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
    import libcst
    from mutmut.mutation.file_mutation import create_mutations

    source = (ROOT / path).read_text()
    with contextlib.chdir(ROOT):
        module, mutations, _, _ = create_mutations(path, source)
    raised = _raised_nodes()
    module.visit(raised)
    wanted = []
    for mutation in mutations:
        function: Any = mutation.contained_by_top_level_function
        name = function.name.value if isinstance(function, libcst.FunctionDef) else ""
        kind = type(mutation.original_node).__name__
        if name in TESTS[path] and kind in _KINDS and id(mutation.original_node) not in raised.nodes:
            wanted.append((name, mutation))
    found = []
    for name, mutation in wanted[:: EVERY.get(path, EVERY_OTHER)]:
        mutated = module.deep_replace(mutation.original_node, mutation.mutated_node)
        assert isinstance(mutated, libcst.Module)
        text = mutated.code
        old, new = _changed(source.splitlines(), text.splitlines())
        found.append(Generated(path, name, old, new, text, TESTS[path][name]))
    return found


def _changed(old: list[str], new: list[str]) -> tuple[str, str]:
    """The lines that differ, in one line each; a mutant changes one place."""
    first = next(number for number, (mine, its) in enumerate(zip(old, new, strict=False)) if mine != its)
    last = next(number for number, (mine, its) in enumerate(zip(old[::-1], new[::-1], strict=False)) if mine != its)
    mine, its = (" ".join(line.strip() for line in lines[first : len(lines) - last]) for lines in (old, new))
    return mine, its


def _raised_nodes() -> Any:
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


EQUIVALENT: dict[str, str] = {
    "vllm_trimix/patterns/selection.py:merge: "
    "if len(selections) == 1 and len(selections[0][0]) == num_heads: -> "
    "if len(selections) != 1 and len(selections[0][0]) == num_heads:": (
        "a single selection is copied instead of handed on"
    ),
    "vllm_trimix/kernels/torch_cpu.py:triangle_prefill: "
    "base = max(0, span.position - n_local + 1) // block_size * block_size -> "
    "base = max(0, span.position - n_local - 1) // block_size * block_size": (
        "now and then one more page is gathered, of which no row sees a key"
    ),
    "vllm_trimix/kernels/torch_cpu.py:_span: "
    "batch = max(1, torch.get_num_threads() // num_kv_heads) -> "
    "batch = max(2, torch.get_num_threads() // num_kv_heads)": "tiles are batched for threads that there are not",
    "vllm_trimix/kernels/torch_cpu.py:_span: "
    "else torch.cat((x[:, :num_sinks], x[:, columns[0]]), dim=1).unsqueeze(0) -> "
    "else torch.cat((x[:, :num_sinks], x[:, columns[0]]), dim=1).unsqueeze(1)": (
        "the dimension of size 1 is flattened away, wherever it stands"
    ),
    "vllm_trimix/kernels/work_items.py:_parts: "
    "if spare > 0 and len(lengths): -> if spare > 1 and len(lengths):": "a single spare partial result stays unused",
}
"""Survivors that change no result, and why; by name."""
