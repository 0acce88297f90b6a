"""Defects of the patterns and of the plan that is made of them."""

from __future__ import annotations

from tests.mutants.hand.group import SELECTION, Group

PLAN = "tests/plan/test_plan.py"
ORACLE = "tests/plan/test_oracle.py::test_any_step_that_hypothesis_thinks_of[0]"
TRUTH = "tests/patterns/test_truth.py"

GROUPS = (
    Group(
        "vllm_trimix/patterns/triangle.py",
        (PLAN,),
        (
            ("n_init off by one", "(j < self.n_init)", "(j <= self.n_init)"),
            ("n_local not counting the query", "(i - j < self.n_local)", "(i - j <= self.n_local)"),
            ("last_n off by one", "(i >= prompt_len - self.last_n)", "(i >= prompt_len - self.last_n - 1)"),
            ("diagonal dropped", "(j <= i) & (", "(j < i) & ("),
            ("dense_len off by one", "+ self.n_local + self.last_n", "+ self.n_local + self.last_n + 1"),
            ("dense_len without the last rows", "+ self.n_local + self.last_n", "+ self.n_local"),
        ),
    ),
    Group(
        "vllm_trimix/plan.py",
        (PLAN,),
        (
            (
                "last_n by chunk instead of prompt",
                "body = max(0, min(prompt_rows, prompt_len - last_n - position))",
                "body = max(0, prompt_rows - last_n)",
            ),
            ("min_prompt_len off by one", "min_prompt_len - 1)", "min_prompt_len)"),
        ),
    ),
    Group(
        "vllm_trimix/plan.py",
        (PLAN, ORACLE),
        (
            (
                "opt-out leak: the request's reason is not asked",
                'step_reason or request.dense_reason or ("short_prompt"',
                'step_reason or ("short_prompt"',
            ),
            (
                "opt-out leak: the dynamic pattern's reason is not asked",
                "step_reason or request.dense_reason or request.dynamic_reason",
                "step_reason or request.dense_reason",
            ),
            (
                "decode routed sparse",
                "            dense.append(span)\n            rows[DECODE]",
                '            getattr(plan, "triangle", dense).append(span)\n            rows[DECODE]',
            ),
            (
                "last rows keep the chunk's position",
                "rest.append(Span(index, first_row + body, num_rows - body, position + body))",
                "rest.append(Span(index, first_row + body, num_rows - body, position))",
            ),
            (
                "a request's rows by its place among those that have rows",
                "span = Span(index, first_row",
                "span = Span(len(set(query_start_loc[: index + 1])) - 1, first_row",
            ),
            (
                "the dynamic choice looks from the last sparse row",
                "position), position + prompt_rows))",
                "position), position + body))",
            ),
        ),
    ),
    Group(
        "vllm_trimix/patterns/xattention.py",
        (f"{SELECTION}::test_what_kernels_rely_on",),
        (("a tile without its own block", "        blocks.diagonal(tiles.first, 1, 2).fill_(True)\n", ""),),
    ),
    Group(
        "vllm_trimix/patterns/selection.py",
        (f"{SELECTION}::test_merged_heads_see_what_they_saw_alone",),
        (("merged heads keep the first one's band", "band[heads] = part.band", "band[:] = part.band[:1]"),),
    ),
    Group(
        "vllm_trimix/patterns/vertical_slash.py",
        (f"{TRUTH}::test_selection_is_the_papers",),
        (("forced sinks left out", "        columns[:, :FORCED_COLUMNS] = math.inf\n", ""),),
    ),
    Group(
        "vllm_trimix/patterns/estimate.py",
        (f"{TRUTH}::test_selection_is_the_papers",),
        (("a chunk's first, partial block overwritten", "out[:, bool(first) :][:, :whole]", "out[:, :whole]"),),
    ),
)
