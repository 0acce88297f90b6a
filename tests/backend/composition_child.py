"""Drives every scenario in a process of its own and writes what it found, as JSON, to the file named by argument 1.

Further arguments are names of scenarios; none means all of them.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tests.backend.cuda_on_cpu as hardware
from tests.backend import launches
from tests.backend.report import DENSE, STOCK_TAILS


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    hardware.torch.set_num_threads(1)
    recorder = launches.Recorder()
    recorder.install()
    hardware.use_cpu()
    model_runner = hardware.import_model_runner()
    recorder.install_backend()
    from tests.backend.v2_scenarios import SCENARIOS
    from vllm_trimix.backend.registration import register_trimix

    register_trimix()
    with tempfile.TemporaryDirectory() as folder:
        make = EngineFactory(model_runner, Path(folder))
        report: dict[str, Any] = {"facts": {name: facts(partial(make, name)) for name in DENSE}, "scenarios": {}}
        for dense in DENSE:
            for name in names or SCENARIOS:
                recorder.take()
                found = run(SCENARIOS[name], partial(make, dense, step_begins=recorder.next_step))
                report["scenarios"][f"{dense}-{name}"] = {**found, "launches": recorder.take()}
    report["runners"] = runners()
    out.write_text(json.dumps(report))


class EngineFactory:
    """Makes engines; configurations are made once per kind."""

    def __init__(self, model_runner: Any, folder: Path) -> None:
        from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill

        self.model_runner, self.folder = model_runner, folder
        self.max_tail_rows = TritonPrefill.max_tail_rows
        self.configs: dict[tuple[int, int, bool], Any] = {}

    def __call__(
        self,
        dense: str,
        *,
        layout: str = "LBHNC",
        group: int = 1,
        full_graphs: bool = False,
        num_speculative_tokens: int = 0,
        shallow: bool = True,
        seed: int = 0,
        step_begins: Callable[[], None] | None = None,
    ) -> Any:
        from vllm.config.compilation import CUDAGraphMode

        from tests.backend.v2_engine import Engine
        from tests.backend.v2_runner import make_config
        from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill

        TritonPrefill.max_tail_rows = 0 if dense.endswith(STOCK_TAILS) else self.max_tail_rows
        dense = dense.removesuffix(STOCK_TAILS)
        key = (group, num_speculative_tokens, shallow)
        if key not in self.configs:
            self.configs[key] = make_config(
                self.folder / str(group),
                num_heads=max(2, group),
                num_kv_heads=max(2, group) // group,
                num_speculative_tokens=num_speculative_tokens,
                shallow=shallow,
            )
        config = self.configs[key]
        # The CPU platform turned graphs off; the CUDA path decides by these. The runner narrows the mode.
        config.compilation_config.cudagraph_mode = (
            CUDAGraphMode.FULL_AND_PIECEWISE if full_graphs else CUDAGraphMode.NONE
        )
        config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8, 16, 32] if full_graphs else []
        config.compilation_config.max_cudagraph_capture_size = 32 if full_graphs else 0
        config.compilation_config.static_forward_context.clear()
        engine = Engine(self.model_runner, config, dense, layout=layout, seed=seed)
        if step_begins is not None:
            _tell(engine, step_begins)
        return engine


def _tell(engine: Any, step_begins: Callable[[], None]) -> None:
    """Before each of the engine's steps, warm-up batches included."""
    execute = engine.runner.execute_model

    def executed(*args: Any, **kwargs: Any) -> Any:
        step_begins()
        return execute(*args, **kwargs)

    engine.runner.execute_model = executed


def run(scenario: Callable[..., Any], make: Callable[..., Any]) -> dict[str, Any]:
    """One scenario's findings."""
    hardware.faults.clear()
    try:
        engine, notes = scenario(make)
    except Exception:
        return {"crash": traceback.format_exc()}
    outcome = engine.outcome
    return {
        "error": dict(outcome.error),
        "plain_error": dict(outcome.budget),
        "largest": outcome.largest,
        "gap": outcome.gap,
        "rows": dict(outcome.rows),
        "counted": engine.counted,
        "expected": {name: count for name, count in engine.expected.items() if count},
        "steps": engine.steps,
        "tracked": sorted(engine.tracked),
        "told": sorted(engine.told),
        "prompt_lens": {name: known.prompt_len for name, known in engine.tracked.items()},
        "runner_prompt_lens": {
            name: int(engine.runner.req_states.prompt_len.np[index])
            for name, index in engine.runner.req_states.req_id_to_index.items()
        },
        "notes": {name: bool(value) for name, value in notes.items()},
        "faults": sorted(set(hardware.faults)),
    }


def facts(make: Callable[..., Any]) -> dict[str, Any]:
    """What the composed classes say of themselves."""
    from vllm_trimix.backend import requests

    engine = make(full_graphs=True)
    engine.add("dense", 20, stamp="opt_out")
    backend, builder_cls = engine.backend, engine.backend.get_builder_cls()
    builder = engine.runner.attn_groups[0][0].get_metadata_builder(0)
    config, spec = engine.config, builder.kv_cache_spec
    engine.add("a", 70)
    engine.step({"a": 70, "dense": 20})
    step = requests._steps[engine.runner]
    common = engine.last_common
    saved, requests._current = requests._current, step
    try:
        plan = builder.build(0, common).trimix
        drafted = builder.build_for_drafting(common, 0).trimix
        micro_batched = micro_batches(builder, common, step)
    finally:
        requests._current = saved
    return {
        "micro_batched": micro_batched,
        "name": backend.get_name(),
        "stock_graphs": builder.dense_builder_cls.get_cudagraph_support(config, spec).name,
        "graphs": builder_cls.get_cudagraph_support(config, spec).name,
        "varlen": builder_cls.get_varlen_cudagraph_max_query_len(config, spec),
        "resolved_mode": str(config.compilation_config.cudagraph_mode.name),
        "supports": {
            name: getattr(backend, f"supports_{name}")()
            for name in ("dcp", "pcp", "batch_invariance", "rswa", "device_cpu_query_lens_mismatch")
        },
        "update_block_table": builder.supports_update_block_table,
        "two_builders": builder._dense_builder is not builder
        and type(builder._dense_builder) is builder.dense_builder_cls,
        "planned": plan is not None,
        "remainder_slots": plan.dense_metadata.slot_mapping.equal(common.slot_mapping[plan.dense_rows]),
        "drafted": drafted is not None,
        "captured": builder.build_for_cudagraph_capture(common).trimix is not None,
        "outside": builder.build(0, common).trimix is not None,
        "active": [layer.impl.trimix_active for layer in engine.model.layers],
        "stock_impl": [isinstance(layer.impl, builder_impl(builder)) for layer in engine.model.layers],
        "profiled": without_metadata(engine),
        "profiled_without_patterns": without_metadata(make(shallow=False)),
    }


def micro_batches(builder: Any, common: Any, step: Any) -> dict[str, Any]:
    """What is counted and planned when vLLM cuts the step in the middle of a prompt and builds each half's metadata."""
    from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

    cut, rows = 45, common.num_actual_tokens
    starts = common.query_start_loc_cpu.tolist()
    (index,) = (index for index, start in enumerate(starts[:-1]) if start < cut < starts[index + 1])
    halves = [
        UBatchSlice(slice(0, index + 1), slice(0, cut)),
        UBatchSlice(slice(index, common.num_reqs), slice(cut, rows)),
    ]
    before, step.planned, builder._ubatching = step.stats.rows.copy(), False, True
    planned = [builder.build(0, half).trimix is not None for half in split_attn_metadata(halves, common)]
    builder._ubatching = False
    return {"planned": planned, "counted": dict(step.stats.rows - before), "rows": rows}


def builder_impl(builder: Any) -> type:
    """The stock implementation behind a composed builder."""
    from tests.backend.v2_runner import dense_backend

    return dense_backend(builder.dense_name).get_impl_cls()


def without_metadata(engine: Any) -> dict[str, Any]:
    """A layer in vLLM's profile run, where there is no metadata: whether its output is zero, and what it allocates."""
    layer = engine.model.layers[1]
    rows = hardware.torch.ones(3, layer.num_heads, layer.head_size)
    out = rows.clone()
    with hardware.torch.profiler.profile(profile_memory=True) as profile:
        layer.impl.forward(layer, rows, rows, rows, layer.kv_cache, None, out)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    return {"zero": bool((out == 0).all()), "bytes": allocated}


def runners() -> dict[str, Any]:
    """Whether both model runners are wrapped, and where V2 takes ``dummy_run``."""
    import vllm.v1.worker.gpu.model_runner as v2
    import vllm.v1.worker.gpu_model_runner as v1

    from vllm_trimix.backend import compat, requests

    requests.install()
    wrapped = [vars(module.GPUModelRunner)["execute_model"] for module in (v1, v2)]
    requests.install()
    return {
        "vllm": compat.vllm_version(),
        "wrapped": [getattr(method, compat._MARK, False) for method in wrapped],
        "once": wrapped == [vars(module.GPUModelRunner)["execute_model"] for module in (v1, v2)],
        "parameters": [list(inspect.signature(method).parameters)[:4] for method in wrapped],
    }


if __name__ == "__main__":
    main()
