"""Takes a family through its phases, and says what was seen."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.families.family import VOCAB_SIZE, Family
from vllm_trimix.patterns.triangle import Triangle

PATTERN = Triangle(n_init=4, n_local=16, last_n=8)
MODEL_LEN = 2048
# Every boundary of the rule, and some that straddle chunks of 200 tokens.
LENGTHS = [PATTERN.dense_len, PATTERN.dense_len + 1, 131, 300]
MAX_TOKENS = 4
PHASE_SECONDS = 240
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # One thread each, on whichever core is free.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ROUNDING = 4e-6
"""Of a log-probability in single precision: some units in the last place."""
MOVES = 1e-3
"""Nats by which the mask must move answers that nothing else is known of."""
LIMITS = {"float32": (0.05, 20), "bfloat16": (0.3, 2)}
"""By dtype: the largest budget in nats, since stock vLLM and Hugging Face must mean the same model; and by how many
budgets a dense reference must differ."""


@functools.cache
def _forks() -> Any:
    """Processes begin as copies of one that has imported vLLM: that takes ten seconds once."""
    # OpenMP reads them when it is loaded, in the one that all others are copies of.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.families.phases"])
    return context


@dataclass
class Seen:
    """What a phase left.

    Attributes:
        result: Its result; None where it failed.
        error: Type and message of what it raised, or how it ended.
        log: What it printed.
    """

    result: Any
    error: str
    log: str


@dataclass
class Report:
    """What was seen of a family.

    Attributes:
        start_line: The start-up line, or none.
        sparse: Rows that our kernel computed, by the name of the attention.
        rows: Rows by class, over both waves.
        stock_error: How far opted-out answers are from Hugging Face, in nats.
        error: How far masked ones are.
        gap: How far masked answers are from dense Hugging Face.
        moved: How far masked answers are from opted-out ones.
    """

    start_line: str = ""
    sparse: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    stock_error: float = 0.0
    error: float = 0.0
    gap: float = 0.0
    moved: float = 0.0


def phase(name: str, job: dict[str, Any], folder: Path) -> Seen:
    """Runs a phase in a fork, within its time."""
    process = _forks().Process(target=_start, args=(name, job, str(folder)))
    process.start()
    process.join(PHASE_SECONDS)
    ended = f"ended with status {process.exitcode}"
    if process.is_alive():
        process.kill()
        process.join()
        ended = f"ran longer than {PHASE_SECONDS} s"
    log_path, found_path = folder / f"{name}.log", folder / f"{name}.json"
    log = log_path.read_text(errors="replace") if log_path.exists() else ""
    found = json.loads(found_path.read_text()) if found_path.exists() else {"error": "Crash", "message": ended}
    error = f"{found['error']}: {found['message']}" if "error" in found else ""
    return Seen(found.get("result"), error, log)


def _start(name: str, job: dict[str, Any], folder: str) -> None:
    # In the fork, where it is imported already; the test's own process stays free of vLLM.
    from tests.families import phases

    phases.start(name, job, folder)


_OWN_CODE = """
from transformers import AutoConfig, PretrainedConfig

class Block(dict):
    def __getattr__(self, name):
        if name in self:
            value = self[name]
            return Block(value) if isinstance(value, dict) else value
        raise AttributeError(name)

class OwnConfig(PretrainedConfig):
    model_type = {model_type!r}
    attribute_map = {attribute_map!r}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **keys):
        # The base class looks at some of them.
        keys = {{
            name: [Block(each) for each in value] if name == "block_configs" else value for name, value in keys.items()
        }}
        nested = keys.keys() & {{"text_config", "vision_config"}}
        keys |= {{name: AutoConfig.for_model(**keys[name]) for name in nested}}
        for name, value in keys.items():
            setattr(self, name, value)
        super().__init__(**keys)
"""


def save(family: Family, folder: Path) -> Path:
    """Writes the configuration as files of this family have it."""
    model = folder / "model"
    model.mkdir(parents=True)
    config = dict(family.config)
    if family.own_code:
        config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
        (model / "configuration_own.py").write_text(
            _OWN_CODE.format(model_type=config["model_type"], attribute_map=dict(family.attribute_map))
        )
    (model / ("params.json" if family.mistral else "config.json")).write_text(json.dumps(config, indent=1))
    return model


def prompts() -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


def engine_job(family: Family, model: Path, *, trimix: bool, drawn: bool) -> dict[str, Any]:
    """A real engine's arguments and requests; stock vLLM is asked what opts out of TRIMIX."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": MODEL_LEN,
        "max_num_batched_tokens": 200,
        "max_num_seqs": 8,
        "block_size": 32,
        "enable_prefix_caching": False,
        "seed": 0,
        "trust_remote_code": family.own_code,
        **({"load_format": "dummy"} if drawn else {}),
        **family.engine,
    }
    opted_out = [{"prompt": prompt, "max_tokens": MAX_TOKENS} for prompt in prompts()]
    waves = [opted_out]
    if trimix:
        arguments["attention_backend"] = "TRIMIX"
        entry = {"starting_layer": 0, "min_prompt_len": 0, "n_init": 4, "n_local": 16, "last_n": 8}
        arguments["additional_config"] = {"trimix": entry}
        waves = [[{**request, "extra_args": {"trimix": "off"}} for request in opted_out], opted_out]
    return {"engine": arguments, "waves": waves, "std": family.stds, "env": ENVIRONMENT}


def start_line(log: str) -> str:
    """The start-up line."""
    found = re.findall(r"TRIMIX: layers=.*", log)
    return found[0].strip() if found else ""


def label(line: str, key: str) -> str:
    """The value of a key of the start-up line."""
    found = re.search(rf"\b{key}=(\S+)", line)
    return found[1] if found else ""


def named_stock(line: str) -> dict[int, str]:
    """The stock layers that a start-up line names, with their reasons."""
    found = re.findall(r"(\d+)(?:-(\d+))?:(\w+)", label(line, "stock_layers"))
    return {layer: reason for first, last, reason in found for layer in range(int(first), int(last or first) + 1)}


def distance(first: list[float], second: list[float]) -> float:
    """Largest difference."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def check(family: Family, folder: Path) -> Report:
    """Runs a family and asserts all that its entry says.

    Args:
        family: The entry.
        folder: An empty one.
    """
    model = save(family, folder)
    drawn = family.truth != "hf" and not family.mistral
    if not drawn and family.outcome == "served":
        job = {"model": str(model), "std": family.stds, "dtype": family.dtype}
        made = phase("make", job, folder)
        assert not made.error, f"{family.name}: transformers made no checkpoint: {made.error}\n{made.log[-3000:]}"
    drawn = drawn or family.outcome != "served"
    if family.outcome != "refused":
        stock = phase("stock", engine_job(family, model, trimix=False, drawn=drawn), folder)
    if family.outcome == "stock_fails":
        assert family.words, "say with which words stock vLLM fails"
        assert stock.error, f"{family.name}: stock vLLM serves it here: its entry is out of date"
        assert family.words in stock.error + stock.log, f"{stock.error}\n{stock.log[-3000:]}"
        return Report()
    ours = phase("trimix", engine_job(family, model, trimix=True, drawn=drawn), folder)
    if family.outcome == "refused":
        assert family.words, "say with which words it is refused"
        assert family.words in ours.error, f"{family.name}: {ours.error}\n{ours.log[-3000:]}"
        assert "\n" not in ours.error
        return Report()
    assert not stock.error, f"{family.name}: stock vLLM fails: {stock.error}\n{stock.log[-6000:]}"
    assert not ours.error, f"{family.name}: {ours.error}\n{ours.log[-6000:]}"
    report = Report(start_line(ours.log), sparse=ours.result["layer_rows"], rows=ours.result["rows"])
    _assert_said(family, report, ours.log)
    _assert_rows(family, report)
    opted_out, masked = ours.result["waves"]
    assert opted_out == stock.result["waves"][0], f"{family.name}: opted-out answers are not stock's"
    _assert_bites(family, report, opted_out, masked)
    if family.truth == "hf":
        _assert_true(family, report, model, opted_out, masked)
    return report


def _assert_said(family: Family, report: Report, log: str) -> None:
    assert report.start_line, f"{family.name}: no start-up line\n{log[-3000:]}"
    assert named_stock(report.start_line) == family.stock, report.start_line
    assert ("NOTHING IS SPARSE" in log) == (not family.sparse)
    # vLLM prints tracebacks of its own, such as for want of a tokenizer.
    assert not re.search(r'File ".*/vllm_trimix/', log), log[-6000:]


def _assert_rows(family: Family, report: Report) -> None:
    """Triangle rows are those of the rule, each counted once, in exactly the layers that are sparse."""
    body = sum(length - PATTERN.last_n for length in LENGTHS if length > PATTERN.dense_len)
    assert report.rows.get("triangle", 0) == (body if family.sparse else 0), report.rows
    # Where all layers have builders that vLLM made of ours, none of ours counts.
    counted = report.rows.get("opt_out" if family.sparse else "stock_layers", 0)
    assert counted > 0 or set(family.stock.values()) == {"wrapped_backend"}, report.rows
    assert {family.layer_of(name) for name in report.sparse} == family.sparse, report.sparse
    assert set(report.sparse.values()) <= {body * family.passes}, report.sparse
    assert report.rows.get("triangle_layer_rows", 0) == sum(report.sparse.values())


def _assert_bites(
    family: Family, report: Report, opted_out: list[dict[str, Any]], masked: list[dict[str, Any]]
) -> None:
    """The mask changes answers where a layer is sparse, and none of a prompt in which it hides nothing."""
    pairs = list(zip(LENGTHS, opted_out, masked, strict=True))
    if not family.sparse:
        assert masked == opted_out
        return
    assert all(sparse == dense for length, dense, sparse in pairs if length <= PATTERN.dense_len)
    report.moved = min(
        float("inf") if sparse["tokens"] != dense["tokens"] else distance(sparse["logprobs"], dense["logprobs"])
        for length, dense, sparse in pairs
        if length > 4 * PATTERN.dense_len
    )
    assert report.moved > MOVES, f"{family.name}: the mask moves log-probabilities by {report.moved}"


def _assert_true(
    family: Family, report: Report, model: Path, opted_out: list[dict[str, Any]], masked: list[dict[str, Any]]
) -> None:
    """Masked answers are as close to Hugging Face under the mask as opted-out ones to dense Hugging Face."""
    answers = [
        {"prompt": prompt, **answer}
        for prompt, answer in zip([*prompts(), *prompts()], [*opted_out, *masked], strict=True)
    ]
    job = {
        "model": str(model),
        "config": dict(family.truth_config),
        "answers": answers,
        "layers": sorted(family.sparse),
        "pattern": {"n_init": PATTERN.n_init, "n_local": PATTERN.n_local, "last_n": PATTERN.last_n},
    }
    found = phase("truth", job, model.parent)
    assert not found.error, f"{family.name}: Hugging Face: {found.error}\n{found.log[-3000:]}"
    from_dense, from_masked = (
        [distance(answer["logprobs"], true[mask]) for answer, true in zip(answers, found.result, strict=True)]
        for mask in ("dense", "masked")
    )
    report.stock_error, report.error = max(from_dense[: len(LENGTHS)]), max(from_masked[len(LENGTHS) :])
    most, times = LIMITS[family.dtype]
    budget = 2 * report.stock_error + ROUNDING
    assert budget < most, f"{family.name}: stock vLLM is {report.stock_error} from Hugging Face"
    assert report.error <= budget, f"{family.name}: {report.error} from the masked truth, stock {report.stock_error}"
    if family.sparse:
        gaps = zip(LENGTHS, from_dense[len(LENGTHS) :], strict=True)
        report.gap = min(gap for length, gap in gaps if length > 4 * PATTERN.dense_len)
        assert report.gap > times * budget, (
            f"{family.name}: a dense reference is only {report.gap} away, budget {budget}"
        )
