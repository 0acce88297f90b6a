"""Runs one vLLM engine in a process of its own: a job as JSON on stdin, the results as JSON in a file.

A job is ``{"engine": {LLM arguments}, "waves": [[{"prompt", "max_tokens", "trimix", ...}]], "env": {}}``. Waves run one
after the other on the same engine, so that a later wave can hit the prefix cache of an earlier one. After each wave the
counters of TRIMIX, those of vLLM and what vLLM's scheduler scheduled are written down.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_trimix.plan import DynamicPlan, Request


def totals(worker: object = None) -> list[dict[str, int]]:
    """The counters of every runner in the process of this worker."""
    from vllm_trimix.backend import requests

    found = []
    for step in requests.all_steps():
        dynamic = {f"dynamic_{key}": value for key, value in step.stats.dynamic_rows.items()}
        found.append({**step.stats.snapshot(), **dynamic})
    return found


def counters(llm: Any) -> dict[str, float]:
    """vLLM's own counters by name."""
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def refused(llm: Any, extra_args: dict[str, object]) -> str:
    """What ``LLM.generate`` says to these arguments, whether they are set at construction or smuggled in later."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    said = []
    for smuggled in (False, True):
        try:
            params = SamplingParams(max_tokens=1, detokenize=False, extra_args=None if smuggled else extra_args)
            params.extra_args = extra_args
            llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
            said.append("accepted")
        except VLLMValidationError as error:
            said.append(str(error))
    return said[0] if said[0] == said[1] else f"{said[0]} BUT {said[1]}"


def record_dynamic_spans() -> list[list[int]]:
    """A list that gets every planned chunk of a dynamic pattern: prompt length, position, rows, keys."""
    from vllm_trimix.backend import builder

    spans: list[list[int]] = []
    original = builder.build_dynamic_plan

    def recorded(
        query_start_loc: Sequence[int], seq_lens: Sequence[int], requests: Sequence[Request | None], **rule: Any
    ) -> DynamicPlan:
        plan = original(query_start_loc, seq_lens, requests, **rule)
        for rows, num_keys in plan.spans:
            request = requests[rows.request]
            assert request is not None, "rows of unknown prompts are dense"
            spans.append([request.prompt_len, rows.position, rows.num_rows, num_keys])
        return plan

    builder.build_dynamic_plan = recorded
    return spans


def record_schedule() -> list[list[int]]:
    """A list that gets every scheduled chunk: request, first position, rows, drafts among them, whether resumed."""
    from vllm.v1.core.sched.scheduler import Scheduler

    chunks: list[list[int]] = []
    seen: set[str] = set()
    original = Scheduler.schedule

    def recorded(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        old = output.scheduled_cached_reqs
        # Model runner V2 is told of resumed requests as of new ones.
        new_reqs = output.scheduled_new_reqs
        found = [(new.req_id, new.num_computed_tokens, new.req_id in seen) for new in new_reqs]
        seen.update(new.req_id for new in new_reqs)
        found += [
            (req_id, first, req_id in old.resumed_req_ids)
            for req_id, first in zip(old.req_ids, old.num_computed_tokens, strict=True)
        ]
        for req_id, first, resumed in found:
            drafts = len(output.scheduled_spec_decode_tokens.get(req_id, ()))
            # vLLM numbers requests and appends random letters.
            number = int(req_id.split("-")[0])
            chunks.append([number, first, output.num_scheduled_tokens[req_id], drafts, int(resumed)])
        return output

    Scheduler.schedule = recorded
    return chunks


def main() -> None:
    job = json.load(sys.stdin)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.update(job.get("env", {}))
    from vllm import LLM, SamplingParams

    engine = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 2048,
        "block_size": 32,
        "enable_prefix_caching": False,
        "attention_backend": "TRIMIX",
        "disable_log_stats": False,
        **job["engine"],
    }
    scheduled = record_schedule()
    llm = LLM(**engine)
    spans = record_dynamic_spans()
    waves, ledgers, served, generating = [], [], 0, 0.0
    for wave in job["waves"]:
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=request["max_tokens"],
                logprobs=0,
                ignore_eos=True,
                detokenize=False,
                prompt_logprobs=request.get("prompt_logprobs"),
                extra_args=request.get("extra_args"),
            )
            for request in wave
        ]
        started = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": request["prompt"]} for request in wave], params, use_tqdm=False)
        generating += time.monotonic() - started
        waves.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        step[token].logprob
                        for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
                    ],
                    "cached_tokens": output.num_cached_tokens,
                }
                for output in outputs
            ]
        )
        chunks = [[number - served, *rest] for number, *rest in scheduled]
        # An engine core in another process runs no function of ours, and its schedule isn't seen either.
        here = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        workers = llm.collective_rpc(totals) if here else []
        ledgers.append({"workers": workers, "metrics": counters(llm), "chunks": chunks})
        served += len(wave)
        scheduled.clear()
    refusals = [refused(llm, extra_args) for extra_args in job.get("bad_extra_args", [])]
    with open(sys.argv[1], "w") as file:
        found = {"waves": waves, "ledgers": ledgers, "refusals": refusals, "spans": spans}
        json.dump({**found, "generate_seconds": generating}, file)


if __name__ == "__main__":
    main()
