"""The predictions as Markdown tables: the generated parts of ``docs/bounds.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from benchmarks.kernels.bounds.bound import Bound
from benchmarks.kernels.bounds.devices import DEVICES
from benchmarks.kernels.bounds.layer import PATTERN, WAYS, predict_layer
from benchmarks.kernels.bounds.request import DENSITY, MODES, RequestPrediction, predict_request
from benchmarks.kernels.bounds.sparse import (
    BLOCK_SIZES,
    DENSITIES,
    predict_estimate,
    predict_selection,
    predict_sparse,
)
from benchmarks.kernels.bounds.targets import targets
from vllm_trimix.config.shallow import DEFAULT_MIN_SEQ_LEN

LENGTHS = (8192, 32768, 65536, 131072)
CHUNK = 8192
"""vLLM's default on GPUs of this size, for servers."""
CHUNKS = (2048, 8192, None)
REQUEST_LENGTHS = (32768, 65536, 131072)
SHORT_LENGTHS = (512, 1024, 2048, 3072, 4096, 8192)
_RESOURCES = ("tensor cores", "shared memory", "instructions", "exponentials", "L2", "HBM", "latencies")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def tables() -> dict[str, str]:
    """Every generated part, by name."""
    makers: dict[str, Callable[[], str]] = {
        "devices": _devices,
        "layers": _layers,
        "chunks": _chunks,
        "ways": _ways,
        "sparse": _sparse,
        "choice": _choice,
        "estimate": _estimate,
        "requests": _requests,
        "parts": _parts,
        "rates": _rates,
        "short": _short,
        "targets": lambda: table(("target", "at best", "allowed", "room: ours may take its bound"), targets()),
    }
    return {name: make() for name, make in makers.items()}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _k(length: int | None) -> str:
    return "whole" if length is None else f"{length // 1024}K" if length >= 1024 else str(length)


def _devices() -> str:
    rows = [
        (
            device.name,
            str(device.multiprocessors),
            f"{device.clock / 1e9:.2f}",
            str(device.tensor_flop),
            f"{device.matmul_flop_s / 1e12:.0f}",
            f"{device.l2_bytes_s / 1e12:.1f}",
            f"{device.hbm_bytes_s / 1e12:.1f}",
            f"{device.dense_flop_s / 1e12:.0f} ({device.dense_kernel})",
        )
        for device in DEVICES.values()
    ]
    header = ("device", "multiprocessors", "clock (GHz)", "tensor FLOP a cycle", "matmul (TFLOP/s)")
    return table((*header, "L2 (TB/s)", "HBM (TB/s)", "dense attention (TFLOP/s)"), rows)


def _alone(bound: Bound) -> list[str]:
    return [_ms(bound.alone[name]) if name in bound.alone else "unread" for name in _RESOURCES]


def _layers() -> str:
    rows = []
    for name in DEVICES:
        for length in LENGTHS:
            ours, dense = predict_layer(name, length, CHUNK), predict_layer(name, length, CHUNK, "dense")
            pairs = length * (length + 1) / 2 / PATTERN.visible_pairs(length)
            ratios = (f"{dense.seconds / ours.seconds:.0f}x", f"{pairs:.0f}x")
            rows.append(
                (name, _k(length), *_alone(ours), _ms(ours.seconds), ours.resource, _ms(dense.seconds), *ratios)
            )
    return table(("device", "prompt", *_RESOURCES, "ours at best", "bound by", "dense", "ratio", "pairs"), rows)


def _chunks() -> str:
    rows = []
    for name in DEVICES:
        for length in LENGTHS:
            bounds = [predict_layer(name, length, chunk) for chunk in CHUNKS]
            dense = predict_layer(name, length, CHUNK, "dense").seconds
            rows.append((name, _k(length), *(f"{_ms(b.seconds)} ({dense / b.seconds:.0f}x)" for b in bounds)))
    return table(("device", "prompt", *(f"chunks of {_k(c)}" if c else "whole" for c in CHUNKS)), rows)


def _ways() -> str:
    rows = [
        (name, _k(length), *(_ms(predict_layer(name, length, CHUNK, way).seconds) for way in WAYS))
        for name in ("H100", "H200")
        for length in LENGTHS
    ]
    return table(("device", "prompt", *(f"`{way}`" if "_" in way else way for way in WAYS)), rows)


def _sparse() -> str:
    rows = []
    for name in DEVICES:
        for end in (32768, 131072):
            dense = predict_layer(name, end, CHUNK, "dense").seconds
            dense -= predict_layer(name, end - CHUNK, CHUNK, "dense").seconds
            for size in BLOCK_SIZES:
                cells = []
                for density in DENSITIES:
                    best, worst = (
                        predict_sparse(name, end - CHUNK, end, density, block_size=size, shared=shared)
                        for shared in (True, False)
                    )
                    cells.append(f"{_ms(best.seconds)} to {_ms(worst.seconds)} ({dense / best.seconds:.1f}x)")
                at_tenth = predict_sparse(name, end - CHUNK, end, 0.1, block_size=size).resource
                rows.append((name, _k(end), str(size), *cells, at_tenth, _ms(dense)))
    return table(("device", "keys", "blocks of", *(f"density {d:g}" for d in DENSITIES), "bound by", "dense"), rows)


def _choice() -> str:
    rows = []
    for name in DEVICES:
        for end in (32768, 131072):
            for chunk in (2048, 8192):
                chosen = predict_selection(name, chunk, end).seconds
                attention = predict_sparse(name, end - chunk, end, DENSITY).seconds
                rows.append((name, _k(end), _k(chunk), _ms(chosen), _ms(attention)))
    return table(("device", "keys", "chunk", "choosing", f"attention at density {DENSITY:g}"), rows)


def _estimate() -> str:
    rows = []
    for name in DEVICES:
        for keys in (32768, 131072):
            for last in (64, 128):
                bound = predict_estimate(name, keys, rows=last)
                rows.append((name, _k(keys), str(last), *_alone(bound), _ms(bound.seconds)))
    return table(("device", "keys", "rows", *_RESOURCES, "at best"), rows)


def _requests() -> str:
    rows = []
    for name in DEVICES:
        for length in REQUEST_LENGTHS:
            for chunk in CHUNKS:
                stock, triangle, both, floor = (
                    predict_request(name, length, chunk, mode).seconds
                    for mode in ("stock", "triangle", "triangle+pattern", "floor")
                )
                late = predict_request(name, length, chunk, "triangle+pattern", min_seq_len=DEFAULT_MIN_SEQ_LEN)
                shown = [f"{s:.3f} ({stock / s:.2f}x)" for s in (triangle, both, late.seconds)]
                rows.append(
                    (name, _k(length), _k(chunk), f"{stock:.3f}", *shown, f"{floor:.3f}", f"{stock / floor:.2f}x")
                )
    header = ("device", "prompt", "chunks", "stock", "triangle", "triangle + pattern", "the same, default start")
    return table((*header, "floor", "ceiling"), rows)


def _parts() -> str:
    rows = []
    for mode in MODES:
        p = predict_request("H200", 131072, CHUNK, mode)
        parts = (p.linear, p.elementwise, p.dense, p.triangle, p.pattern, p.plan, p.seconds)
        rows.append((mode.replace("+", " + "), *(f"{part:.3f}" for part in parts)))
    names = ("linear layers", "elementwise", "dense attention", "triangle", "pattern and choice", "plan", "together")
    return table(("H200, 128K, chunks of 8K", *names), rows)


def _rates() -> str:
    rows = []
    published = DEVICES["H200"].dense_flop_s / 1e12
    for share in (1.0, 0.9, 0.8):
        for rate in (750, 650, 550):

            def at(mode: str, share: float = share, rate: float = rate) -> float:
                p: RequestPrediction = predict_request("H200", 131072, CHUNK, mode)
                return replace(p, linear=p.linear / share, dense=p.dense * published / rate).seconds

            stock = at("stock")
            ratios = (f"{stock / at(mode):.2f}x" for mode in MODES[1:])
            rows.append((f"{share:g}", str(rate), f"{stock:.2f}", *ratios))
    header = ("share of the matmul's rate", "dense attention (TFLOP/s)", "stock (s)", "triangle", "triangle + pattern")
    return table((*header, "ceiling"), rows)


def _short() -> str:
    rows = []
    for name in DEVICES:
        for length in SHORT_LENGTHS:
            stock = predict_request(name, length, CHUNK, "stock")
            served = predict_request(name, length, CHUNK, "triangle")
            forced = predict_request(name, length, CHUNK, "triangle", min_prompt_len=0)
            layer = [predict_layer(name, length, CHUNK, way).seconds for way in ("dense", "trimix_triton")]
            rows.append(
                (
                    name,
                    str(length),
                    _ms(stock.seconds),
                    f"{100 * stock.dense / stock.seconds:.1f}%",
                    f"{served.seconds / stock.seconds:.3f}",
                    f"{forced.seconds / stock.seconds:.3f}",
                    *(f"{1e3 * seconds:.3f}" for seconds in layer),
                )
            )
    header = ("device", "prompt tokens", "stock (ms)", "of it attention", "TRIMIX / stock", "with `min_prompt_len` 0")
    return table((*header, "dense layer (ms)", "triangle layer (ms)"), rows)
