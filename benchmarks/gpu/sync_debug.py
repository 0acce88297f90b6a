"""Does TRIMIX ever wait for the device? PyTorch's own detector around its metadata builder and its layers."""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine import engine_arguments
from benchmarks.gpu.report import Report
from benchmarks.gpu.small_model import prompts, save_small_model
from tests.engine.run import CONFIG, both_ways

_MESSAGE = "synchronizing"


class Watch:
    """Counts calls, and where inside them PyTorch saw a wait.

    The mode is "warn", which reports every wait with its place; "error" would end the run at the first.
    """

    def __init__(self, *, cuda: bool) -> None:
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._cuda = cuda

    def around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """``original``, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            with self._detecting():
                return original(*args, **kwargs)

        return watched

    @contextlib.contextmanager
    def _detecting(self) -> Iterator[None]:
        if not self._cuda:
            yield
            return
        # Heavy; loaded by now.
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._record
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def _record(self, message: Warning | str, *_: object, **__: object) -> None:
        if _MESSAGE in str(message):
            frames = [frame for frame in traceback.extract_stack()[:-1] if "warnings.py" not in frame.filename]
            self.waits[place(frames)] += 1


def place(frames: list[traceback.FrameSummary]) -> str:
    """The innermost frame of vLLM or TRIMIX, as ``package file:line function``."""
    for frame in reversed(frames):
        for package in ("vllm_trimix", "vllm"):
            if package in Path(frame.filename).parts:
                return f"{package} {Path(frame.filename).name}:{frame.lineno} {frame.name}"
    return f"other {Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}"


def sync_debug(report: Report) -> None:
    """A warm-up wave, then a watched one of the same shape: chunked prompts beside decodes."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Heavy, and it reads the environment.
    from vllm import LLM, SamplingParams

    from vllm_trimix.backend import builder, impl

    model = save_small_model(report.folder / "model")
    llm = LLM(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=2048,
        block_size=32,
        enable_prefix_caching=False,
        enforce_eager=True,
        attention_backend="TRIMIX",
        additional_config={"trimix": CONFIG},
        **engine_arguments(report, "bfloat16"),
    )

    def wave(seed: int) -> None:
        asked = both_ways(prompts([5, 40, 300, 500], seed=seed))
        params = [
            SamplingParams(
                temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, extra_args=request["extra_args"]
            )
            for request in asked
        ]
        llm.generate([{"prompt_token_ids": request["prompt"]} for request in asked], params, use_tqdm=False)

    wave(0)
    watch = Watch(cuda=report.cuda)
    saved = builder.TrimixBuilder.build, impl.TrimixImpl.forward
    builder.TrimixBuilder.build = watch.around("build", saved[0])  # type: ignore[method-assign]
    impl.TrimixImpl.forward = watch.around("forward", saved[1])  # type: ignore[method-assign]
    try:
        wave(1)
    finally:
        builder.TrimixBuilder.build, impl.TrimixImpl.forward = saved  # type: ignore[method-assign]
    ours = {where: count for where, count in watch.waits.items() if where.startswith("vllm_trimix ")}
    others = {where: count for where, count in watch.waits.items() if where not in ours}
    report.figure(watched_calls=dict(watch.calls), waits_of_trimix=ours, waits_of_vllm=others)
    report.check("watched", watch.calls["build"] > 0 and watch.calls["forward"] > 0, f"{dict(watch.calls)} calls")
    report.check("no waiting", not ours, f"waits in TRIMIX: {ours or 'none'}; in vLLM's own code: {others or 'none'}")
    mode = "" if report.cuda else " (hooks only: the detector needs CUDA)"
    report.seen(f"{dict(watch.calls)} calls, waits in TRIMIX: {ours or 'none'}, in vLLM: {others or 'none'}{mode}")
