"""Where a prefill's time goes: traces, and what each of their moments is charged to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.breakdown.timeline import CATEGORIES, IDLE, REQUEST, STEP, Attribution, attribute, range_name

HOST = {"pid": 100, "tid": 100}


def event(name: str, ts: float, dur: float, cat: str = "user_annotation", **more: Any) -> dict[str, Any]:
    """One complete event; microseconds, as in the file."""
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, **HOST, **more}


def host(category: str, ts: float, dur: float) -> dict[str, Any]:
    return event(range_name(category), ts, dur)


def op(name: str, ts: float, dur: float, **more: Any) -> dict[str, Any]:
    return event(name, ts, dur, "cpu_op", **more)


def kernel(name: str, ts: float, dur: float, *, launched: float, number: int, stream: int = 7, cat: str = "kernel"):
    """A launch on the engine's thread, and what it started."""
    return [
        event("cuLaunchKernelEx", launched, 2, "cuda_driver", args={"correlation": number}),
        event(name, ts, dur, cat, pid=0, tid=stream, args={"correlation": number}),
    ]


def spent(*events: dict[str, Any], window: tuple[float, float] = (0, 1000)) -> Attribution:
    found = attribute({"traceEvents": [*events, event(REQUEST, *window), {"ph": "M", "name": "process_name"}]})
    assert list(found.nanoseconds) == list(CATEGORIES)
    assert sum(found.nanoseconds.values()) == found.window_ns == window[1] * 1000
    return found


def microseconds(found: Attribution) -> dict[str, float]:
    return {category: duration / 1000 for category, duration in found.nanoseconds.items() if duration}


def test_innermost_range_decides_on_cpu() -> None:
    found = spent(
        event(STEP, 10, 900),
        host("scheduler", 0, 10),
        op("vllm::unified_attention_with_output", 100, 300),
        host("dense attention", 110, 280),
        # Products inside a range are that range's, however deep.
        op("aten::bmm", 120, 50),
        host("tail", 200, 40),
        op("aten::linear", 500, 100),
        op("aten::addmm", 510, 80),
        op("aten::silu", 600, 25.5),
    )
    assert found.device == "cpu"
    assert found.steps == 1
    assert microseconds(found) == {
        "linear": 100,
        "dense attention": 240,
        "tail": 40,
        "scheduler": 10,
        "other": 610,
    }
    assert found.ranges["dense attention"] == found.ranges["tail"] == found.ranges["scheduler"] == 1
    assert found.other["aten::silu"] == 25500
    assert found.other["vllm::unified_attention_with_output"] == 20000


def test_of_ranges_that_begin_together_the_shorter_is_the_inner_one() -> None:
    found = spent(host("tail", 100, 50), host("dense attention", 100, 200))
    assert microseconds(found) == {"dense attention": 150, "tail": 50, "other": 800}


def test_other_threads_and_times_do_not_count_on_cpu() -> None:
    found = spent(
        {**host("tail", 0, 1000), "tid": 99},
        host("plan", -50, 40),
        host("plan", -50, 60),
        host("scheduler", 990, 500),
        {**host("linear", 0, 1000), "tid": 101},
        op("aten::mm", 2000, 10),
    )
    assert microseconds(found) == {"plan": 10, "scheduler": 10, "other": 980}
    # Ranges count where they begin.
    assert (found.ranges["plan"], found.ranges["scheduler"]) == (0, 1)


@pytest.mark.parametrize(
    "name",
    "aten::mm aten::addmm aten::bmm aten::linear aten::_scaled_mm _C::onednn_mm _C::onednn_scaled_mm _C::marlin_gemm "
    "_C::weight_packed_linear mkldnn::_linear_pointwise vllm::outplace_fused_experts".split(),
)
def test_linear_operators(name: str) -> None:
    assert microseconds(spent(op(name, 0, 400)))["linear"] == 400


@pytest.mark.parametrize("name", ["aten::mul", "_C::rms_norm", "vllm::linear_attention", "aten::common", "mm_encoder"])
def test_operators_that_are_not_linear(name: str) -> None:
    assert microseconds(spent(op(name, 0, 400))) == {"other": 1000}


def test_asynchronous_kernels_count_where_they_run_under_the_range_that_launched_them() -> None:
    found = spent(
        host("triangle body", 100, 20),
        host("tail", 130, 20),
        op("aten::mm", 160, 20),
        # Each starts long after its launch, when the thread is elsewhere.
        *kernel("triangle_prefill_kernel", 300, 200, launched=105, number=1),
        *kernel("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", 500, 50, launched=135, number=2),
        *kernel("nvjet_tst_128x128", 550, 100, launched=165, number=3),
        host("scheduler", 250, 700),
    )
    assert found.device == "cuda"
    # 250-300 and 650-950: the device idles while the scheduler works.
    assert microseconds(found) == {"linear": 100, "triangle body": 200, "tail": 50, "scheduler": 350, "other": 300}


def test_idle_device_is_charged_to_scheduler_plan_or_other() -> None:
    found = spent(
        host("plan", 0, 100),
        host("dense attention", 100, 100),
        op("aten::mm", 200, 100),
        *kernel("gemm", 900, 100, launched=210, number=1),
    )
    assert microseconds(found) == {"linear": 100, "plan": 100, "other": 800}
    assert found.other == {IDLE: 800000}


def test_overlapping_streams_count_once() -> None:
    found = spent(
        op("aten::mm", 0, 20),
        host("dense attention", 30, 20),
        host("plan", 60, 20),
        *kernel("gemm", 100, 200, launched=5, number=1, stream=7),
        # Begins inside the product, outlasts it.
        *kernel("flash_fwd", 200, 300, launched=35, number=2, stream=8),
        # A copy never hides a kernel, not even one that began later.
        *kernel("Memcpy HtoD", 400, 200, launched=65, number=3, stream=9, cat="gpu_memcpy"),
        *kernel("unknown", 550, 100, launched=95, number=4, stream=10),
        # A kernel that nobody can name does not hide one that somebody can.
        *kernel("gemm", 600, 50, launched=6, number=5, stream=7),
    )
    assert microseconds(found) == {"linear": 250, "dense attention": 200, "plan": 70, "other": 480}
    assert found.other["unknown"] == 50000


def test_replayed_kernels_fall_back_to_annotation_then_name() -> None:
    device = {"pid": 0, "tid": 7}
    graph = [event("cudaGraphLaunch", 10, 5, "cuda_runtime", args={"correlation": 9})]

    def replayed(name: str, ts: float) -> dict[str, Any]:
        return event(name, ts, 50, "kernel", **device, args={"correlation": 9})

    found = spent(
        *graph,
        event(range_name("tail"), 100, 50, "gpu_user_annotation", **device),
        # Another stream's annotation says nothing here.
        event(range_name("plan"), 0, 1000, "gpu_user_annotation", pid=0, tid=8),
        replayed("flash_fwd_splitkv", 100),
        replayed("flash_fwd_splitkv", 200),
        replayed("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", 300),
        replayed("sm90_xmma_gemm_bf16", 400),
        replayed("triangle_prefill_kernel", 500),
        replayed("triton_poi_fused_mul_silu", 600),
        # No launch in the trace at all.
        event("ampere_sgemm", 700, 50, "kernel", **device),
    )
    assert microseconds(found) == {
        "linear": 100,
        "dense attention": 100,
        "triangle body": 50,
        "tail": 50,
        "other": 700,
    }


def test_kernels_are_clipped_to_the_request() -> None:
    found = spent(
        *kernel("gemm", -100, 150, launched=-200, number=1),
        *kernel("gemm", 950, 500, launched=940, number=2),
        *kernel("gemm", 5000, 500, launched=960, number=3),
    )
    assert microseconds(found) == {"linear": 100, "other": 900}


@pytest.mark.parametrize("count", [0, 2])
def test_a_trace_holds_one_request(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} ranges named 'breakdown: request'"):
        attribute({"traceEvents": [event(REQUEST, 0, 1)] * count})


moments = st.integers(-200, 1200).map(lambda tick: tick / 8)
durations = st.integers(0, 800).map(lambda tick: tick / 8)
ranges = st.builds(host, st.sampled_from(CATEGORIES), moments, durations)
operators = st.builds(op, st.sampled_from(["aten::mm", "aten::mul"]), moments, durations)
kernels = st.builds(
    lambda name, ts, dur, launched, number, stream, cat: kernel(
        name, ts, dur, launched=launched, number=number, stream=stream, cat=cat
    ),
    st.sampled_from(["gemm", "flash_fwd", "triangle_prefill_kernel", "mystery"]),
    moments,
    durations,
    moments,
    st.integers(0, 5),
    st.integers(7, 9),
    st.sampled_from(["kernel", "gpu_memcpy"]),
)
projections = st.builds(
    lambda category, ts, dur, stream: event(range_name(category), ts, dur, "gpu_user_annotation", pid=0, tid=stream),
    st.sampled_from(CATEGORIES),
    moments,
    durations,
    st.integers(7, 9),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ranges | operators | projections, max_size=12), st.lists(kernels, max_size=6))
def test_categories_sum_to_the_request_whatever_overlaps(
    events: list[dict[str, Any]], launched: list[list[dict[str, Any]]]
) -> None:
    found = spent(*events, *(part for pair in launched for part in pair), window=(0, 100))
    assert min(found.nanoseconds.values()) >= 0
    assert sum(found.other.values()) == found.nanoseconds["other"]
    if found.device == "cuda":
        # Busy time is the union of the device's events, counted the plain way: eight ticks a microsecond.
        busy = set()
        for raw in (part for pair in launched for part in pair if part["cat"] in ("kernel", "gpu_memcpy")):
            busy.update(range(max(0, int(raw["ts"] * 8)), min(800, int((raw["ts"] + raw["dur"]) * 8))))
        assert found.other.get(IDLE, 0) <= (800 - len(busy)) * 125
