"""A scripted scheduler and sampler around model runner V2: steps it, and compares every row."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from tests.backend.v2_runner import BLOCK_SIZE, MAX_LEN, NUM_BLOCKS, dense_backend, make_runner
from tests.backend.v2_truth import Outcome, Request, compare
from vllm_trimix.backend import requests
from vllm_trimix.backend.attention import _compose


class Engine:
    """The scripted scheduler: steps the runner and compares every row."""

    def __init__(self, model_runner: Any, config: Any, dense: str, *, layout: str, seed: int) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.backend = _compose(dense_backend(dense))
        self.runner = make_runner(model_runner, config, self.backend, layout=layout, seed=seed)
        self.model = self.runner.model
        self.requests: dict[str, Request] = {}
        self.numbers = 0
        self.free = (1 + torch.randperm(NUM_BLOCKS - 1, generator=self.generator)).tolist()
        self.finished: set[str] = set()
        self.preempted: set[str] = set()
        self.expected: Counter[str] = Counter()
        self.outcome = Outcome()
        self.steps = 0
        self.told: set[str] = set()
        self.last_common: Any = None
        self._keep_common()

    @property
    def counted(self) -> dict[str, int]:
        """The counters of this engine's runner."""
        step = requests._steps.get(self.runner)
        return step.stats.snapshot() if step is not None else {}

    def add(
        self, name: str, prompt_len: int, *, stamp: str | None = None, prompt_logprobs: bool = False, cached: int = 0
    ) -> None:
        """Submits a request, of which the prefix cache already holds ``cached`` tokens."""
        request = Request(self.numbers, prompt_len, stamp, stamp, prompt_logprobs, known=prompt_len, computed=cached)
        if prompt_logprobs:
            request.reason = "prompt_logprobs"
        self.numbers += 1
        self.requests[name] = request
        if cached:
            self._grow(request, cached)
            self._fill(request, cached)

    def finish(self, name: str) -> None:
        """Ends a request; the runner hears of it with the next step."""
        self.free.extend(self.requests.pop(name).pages)
        self.finished.add(name)

    def preempt(self, name: str) -> None:
        """Takes a request's pages away; the next step that schedules it recomputes everything."""
        request = self.requests[name]
        self.free.extend(request.pages)
        request.pages, request.computed, request.running = [], 0, False
        self.preempted.add(name)

    def extend_prompt(self, name: str, prompt_len: int) -> None:
        """A streaming-input session's next chunk: the same id comes again with a longer prompt."""
        request = self.requests[name]
        request.prompt_len = request.known = prompt_len
        request.running, request.reason = False, "streaming_input"

    @property
    def tracked(self) -> dict[str, Any]:
        """The requests that the wrapper knows of this engine's runner."""
        step = requests._steps.get(self.runner)
        return step.requests if step is not None else {}

    def _keep_common(self) -> None:
        """Keeps the metadata that vLLM hands to the builder."""
        builder = self.runner.attn_groups[0][0].get_metadata_builder(0)
        build = builder.build

        def keep(common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            self.last_common = common_attn_metadata
            return build(common_prefix_len, common_attn_metadata, fast_build)

        builder.build = keep

    def dummy_step(self, scheduled: dict[str, int], *, positional: bool = False) -> None:
        """A warm-up batch, as vLLM runs between real steps."""
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = dict(scheduled)
        output.total_num_scheduled_tokens = sum(scheduled.values())
        self.runner.num_scheduled_tokens = 0
        self.runner.execute_model(
            output, *((None, True) if positional else ()), **({} if positional else {"dummy_run": True})
        )

    def step(self, scheduled: dict[str, int], drafts: dict[str, int] | None = None) -> None:
        """Runs one step: tokens by request, drafts among them by request."""
        known = [name for name in scheduled if self.requests[name].running]
        output = self._scheduler_output(scheduled, drafts or {})
        self.runner.num_scheduled_tokens = output.total_num_scheduled_tokens
        states = self.runner.req_states
        for name in known:
            self._sampled(states.req_id_to_index[name], self.requests[name], (drafts or {}).get(name, 0))
        self.runner.execute_model(output)
        if scheduled:
            self.steps += 1
            self._compare(scheduled)
        for name, num_tokens in scheduled.items():
            request = self.requests[name]
            request.computed += num_tokens
            if request.computed >= request.prompt_len:
                request.known = max(request.known, request.computed + 1)
            states.num_computed_tokens.gpu[states.req_id_to_index[name]] = request.computed

    def _sampled(self, index: int, request: Request, num_drafts: int) -> None:
        """What the sampler and the drafter left for this request."""
        ids = torch.tensor(request.tokens(request.computed, request.computed + 1 + num_drafts))
        self.runner.req_states.last_sampled_tokens[index] = ids[0]
        if num_drafts:
            self.runner.req_states.draft_tokens[index, :num_drafts] = ids[1:]

    def _grow(self, request: Request, length: int) -> list[int]:
        added = [self.free.pop(0) for _ in range(-(-length // BLOCK_SIZE) - len(request.pages))]
        request.pages += added
        return added

    def _fill(self, request: Request, length: int) -> None:
        """Writes a cached prefix."""
        ids = torch.tensor(request.tokens(0, length))
        pages = torch.tensor(request.pages)[torch.arange(length) // BLOCK_SIZE]
        for index, layer in enumerate(self.model.layers):
            pair = torch.cat([self.model.k[index][ids], self.model.v[index][ids]], dim=-1)
            layer.kv_cache.transpose(1, 2)[pages, torch.arange(length) % BLOCK_SIZE] = pair

    def _scheduler_output(self, scheduled: dict[str, int], drafts: dict[str, int]) -> SchedulerOutput:
        output = SchedulerOutput.make_empty()
        output.finished_req_ids, self.finished = self.finished, set()
        self.told -= output.finished_req_ids
        cached = CachedRequestData.make_empty()
        for name, num_tokens in scheduled.items():
            request = self.requests[name]
            added = self._grow(request, request.computed + num_tokens)
            if not request.running:
                request.running = True
                if name not in self.told:
                    self.expected["cached"] += min(request.computed, request.prompt_len)
                output.scheduled_new_reqs.append(self._new(name, request))
                continue
            cached.req_ids.append(name)
            cached.new_block_ids.append((added,) if added else None)
            cached.num_computed_tokens.append(request.computed)
            cached.num_output_tokens.append(max(0, request.computed + 1 - request.prompt_len))
        self.told |= set(scheduled)
        output.scheduled_cached_reqs = cached
        output.num_scheduled_tokens = dict(scheduled)
        output.total_num_scheduled_tokens = sum(scheduled.values())
        output.scheduled_spec_decode_tokens = {
            name: self.requests[name].tokens(self.requests[name].computed + 1, self.requests[name].computed + 1 + count)
            for name, count in drafts.items()
        }
        output.preempted_req_ids, self.preempted = self.preempted or None, set()
        return output

    def _new(self, name: str, request: Request) -> NewRequestData:
        extra_args = {"trimix_dense": request.stamp} if request.stamp else None
        return NewRequestData(
            req_id=name,
            prompt_token_ids=request.tokens(0, request.prompt_len),
            mm_features=[],
            sampling_params=SamplingParams(
                max_tokens=64, extra_args=extra_args, prompt_logprobs=0 if request.prompt_logprobs else None
            ),
            pooling_params=None,
            block_ids=(list(request.pages),),
            num_computed_tokens=request.computed,
            lora_request=None,
            prefill_token_ids=request.tokens(0, request.known),
        )

    def _compare(self, scheduled: dict[str, int]) -> None:
        alive = {request.number: request for request in self.requests.values()}
        rows = {self.requests[name].number: count for name, count in scheduled.items()}
        assert Counter(token // MAX_LEN for token in self.model.tokens) == rows, "the runner ran other rows"
        full_graphs = self.config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        replays = full_graphs and max(scheduled.values()) <= self.runner.decode_query_len
        self.expected += compare(self.model, alive, self.outcome, replays=replays)
