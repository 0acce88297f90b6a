"""Prompt lengths and per-request arguments of the step that a model runner is executing.

Neither is in vLLM's attention metadata, so ``execute_model`` of both model runners is wrapped: it keeps a table of the
requests this runner knows, and marks the step as current while the runner builds attention metadata. Everything built
outside (dummy runs, CUDA-graph capture, drafts) sees no step and stays dense.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

from vllm_trimix.backend import announce, compat, settings
from vllm_trimix.backend.names import DENSE_KEY, KEY, RESOLVED, reads_prompt_rows
from vllm_trimix.config.entry import Resolved
from vllm_trimix.plan import Request
from vllm_trimix.stats import Stats

RUNNER_MODULES = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


class Step:
    """One runner's requests and counters; ``current()`` while that runner executes."""

    def __init__(self, runner: Any, resolved: Resolved) -> None:
        self._runner = weakref.ref(runner)
        self._resolved = resolved
        self._mm_prefix = bool(getattr(runner, "is_mm_prefix_lm", False)) or bool(
            getattr(runner.vllm_config.model_config, "is_mm_prefix_lm", False)
        )
        self.requests: dict[str, Request] = {}
        self.stats = self._totals = Stats()
        self.planned = self.warming_up = False
        # Of this step, by what they depend on besides its rows; builders of several KV-cache groups share them.
        self.plans: dict[tuple[object, ...], Any] = {}
        self.cached_rows = 0
        self._scheduled: Any = None

    def begin(self, scheduler_output: Any) -> None:
        """Applies the scheduler's news: finished ids first, because ids may be reused in the same step."""
        for req_id in scheduler_output.finished_req_ids:
            self.requests.pop(req_id, None)
        cached = 0
        for new in scheduler_output.scheduled_new_reqs:
            known = self.requests.get(new.req_id)
            self.requests[new.req_id] = self._request(new, known)
            if known is None:
                cached += min(new.num_computed_tokens, new.prompt_len)
        self.stats.tracked_requests = len(self.requests)
        # vLLM's own warm-up is planned and computed like any other step, but nobody asked for it. It is alone in
        # its steps.
        first = next(iter(scheduler_output.num_scheduled_tokens), "")
        self.warming_up = self.planned = first.startswith(compat.WARM_UP_IDS)
        self.stats = Stats() if self.warming_up else self._totals
        self.plans.clear()
        self.cached_rows = cached
        self._scheduled = scheduler_output

    def end(self) -> None:
        """Shows the totals again, which a step of vLLM's own warm-up is not part of."""
        self.stats = self._totals

    def scheduled_rows(self) -> dict[str, Any]:
        """The whole step for ``build_plan``, from the scheduler: micro-batching's metadata show parts of it only.

        Positions are exact for rows that are still in their prompt.
        """
        output = self._scheduled
        first = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        old = output.scheduled_cached_reqs
        first.update(zip(old.req_ids, old.num_computed_tokens, strict=True))
        counts = [output.num_scheduled_tokens[req_id] for req_id in first]
        return {
            "query_start_loc": [0, *itertools.accumulate(counts)],
            "seq_lens": [position + count for position, count in zip(first.values(), counts, strict=True)],
            "requests": [self.requests.get(req_id) for req_id in first],
        }

    def _request(self, new: Any, known: Request | None) -> Request:
        prompt_len = new.prompt_len
        if known is not None and (known.prompt_len != prompt_len or known.dense_reason == "streaming_input"):
            return Request(prompt_len, "streaming_input")
        if new.pooling_params is not None or new.sampling_params is None:
            return Request(prompt_len, "pooling")
        params = new.sampling_params
        stamp = (params.extra_args or {}).get(DENSE_KEY)
        if stamp is not None:
            return Request(prompt_len, stamp)
        if (params.extra_args or {}).get(KEY) == "off":
            # Only where admission was bypassed: without a namespace, but dense.
            return Request(prompt_len, "opt_out")
        if self._resolved.prompt_logprobs == "dense" and reads_prompt_rows(params):
            return Request(prompt_len, "prompt_logprobs")
        if self._mm_prefix and new.mm_features:
            return Request(prompt_len, "mm_prefix")
        if (params.extra_args or {}).get(KEY) == "triangle":
            return Request(prompt_len, dynamic_reason="opt_out_dynamic")
        return Request(prompt_len)

    def rows(self, common_attn_metadata: Any) -> list[Request | None]:
        """The request behind each row of the batch; None where it is unknown.

        Model runner V2 says which table entry each row is; V1's rows are its input batch in order.
        """
        runner = self._runner()
        num_rows = common_attn_metadata.num_reqs
        if runner is None:
            return [None] * num_rows
        indices = common_attn_metadata.req_idx
        if indices is not None:
            names = runner.req_states.index_to_req_id
            ids = [names.get(int(index)) for index in indices]
        elif hasattr(runner, "input_batch"):
            ids = list(runner.input_batch.req_ids)
        else:
            ids = []
        get = self.requests.get
        rows = [get(req_id) if req_id is not None else None for req_id in ids[:num_rows]]
        return rows + [None] * (num_rows - len(rows))


_steps: weakref.WeakKeyDictionary[Any, Step] = weakref.WeakKeyDictionary()
_current: Step | None = None


def current() -> Step | None:
    """The step being executed in this process, or None outside a runner's ``execute_model``."""
    return _current


def all_steps() -> list[Step]:
    """The step tables of every runner alive in this process."""
    return list(_steps.values())


class outside_step:
    """Hides the current step while draft metadata is built."""

    def __enter__(self) -> None:
        global _current
        self._saved, _current = _current, None

    def __exit__(self, *exc: object) -> None:
        global _current
        _current = self._saved


def install() -> None:
    """Wraps ``execute_model`` of whichever model runners this process has loaded."""
    for module in RUNNER_MODULES:
        if module in sys.modules:
            compat.wrap_once(sys.modules[module].GPUModelRunner, "execute_model", _tracked)


def _tracked(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # Only V2's has dummy_run: second positional after the intermediate tensors.
        dummy = kwargs.get("dummy_run", args[1] if len(args) > 1 else False)
        if dummy:
            return original(self, scheduler_output, *args, **kwargs)
        global _current
        step = _steps.get(self)
        if step is None:
            if RESOLVED not in (self.vllm_config.additional_config or {}):
                return original(self, scheduler_output, *args, **kwargs)
            step = _steps[self] = Step(self, settings.of(self.vllm_config))
            announce.start_stats_log(self.vllm_config, step.stats)
        step.begin(scheduler_output)
        saved, _current = _current, step
        try:
            return original(self, scheduler_output, *args, **kwargs)
        finally:
            _current = saved
            step.end()

    return execute_model
