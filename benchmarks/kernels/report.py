"""The run as a table and as a figure, each with device, date and versions on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = "trimix"


def headline(result: dict[str, Any]) -> str:
    """Device, versions, date and commit."""
    env, settings = result["environment"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return f"{device_name(result)}; {versions}; {env['date']}; commit {env['commit']}; {settings['repeats']} repeats"


def device_name(result: dict[str, Any]) -> str:
    """The GPU, or the CPU with the threads used."""
    env, settings = result["environment"], result["settings"]
    if settings["device"] == "cuda":
        return env["gpu"]
    simd = "AMX" if env["amx"] else "AVX-512 bf16, no AMX" if env["avx512_bf16"] else "no native bf16"
    return f"{env['cpu']} ({simd}), {settings['threads']} thread(s)"


def layer_name(result: dict[str, Any]) -> str:
    """The layer's shape and how it is prefilled."""
    s = result["settings"]
    pattern = s["pattern"]
    return (
        f"one layer of {s['num_heads']} query and {s['num_kv_heads']} KV heads of {s['head_size']}, {s['dtype']}, "
        f"{'fp8' if s['fp8'] else s['dtype']} cache in permuted pages of {s['block_size']}, "
        f"steps of {s['chunk']} tokens; "
        f"triangle n_init={pattern['n_init']}, n_local={pattern['n_local']}, last_n={pattern['last_n']}"
    )


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    ceilings, settings = result["ceilings"], result["settings"]
    on_cpu = settings["device"] == "cpu"
    lines = [
        f"{headline(result)}.",
        "",
        f"{layer_name(result)[0].upper()}{layer_name(result)[1:]}.",
        "",
        "Time: median of interleaved rounds and its 95% interval (order statistics), all steps together; planning "
        f"{'is in it' if on_cpu else 'is not in it (vLLM plans once a step for all layers)'} and stands beside it. "
        f"Speed-up: of medians, against `{settings['dense_baseline']}`, vLLM's own dense kernel here; bound: dense "
        "pairs over triangle pairs. Error: against fp64 on sampled rows, the largest and the worst row's relative RMS; "
        "a kernel above its budget (twice plain PyTorch's error on the same rows, plus rounding) gets no time.",
        "",
        f"Roofline: the larger of counted FLOPs over {ceilings['flops_per_s'] / 1e9:,.0f} GFLOP/s and least bytes over "
        f"{ceilings['bytes_per_s'] / 1e9:,.1f} GB/s, over the time. Both ceilings were measured in this run: the best "
        f"{ceilings['matmul_dtype']} product of two {ceilings['matmul_size']}-square matrices and the best copy of "
        f"{ceilings['copy_bytes'] / 2**20:,.0f} MiB (read and written)."
        + (" The product is torch's own, on the same threads." if on_cpu else "")
        + (
            f" Kernels that multiply in fp8 are held against {ceilings['fp8_flops_per_s'] / 1e9:,.0f} GFLOP/s."
            if "fp8_flops_per_s" in ceilings
            else ""
        ),
        "",
        "| tokens | kernel | pattern | time (ms) | 95% | planning (ms) | speed-up | bound | roofline | max error | "
        "RMS error, worst row | budget (max, RMS) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    timed = [row for row in result["rows"] if row["status"] == "ok"]
    lines += [_line(row) for row in timed]
    lines += ["", "Kernels:", ""]
    known = {row["contender"]: row for row in result["rows"]}
    lines += [
        f"- `{name}`: {row['about']}; {_how(row)}." for name, row in known.items() if row["status"] != "unavailable"
    ]
    untimed = [row for row in result["rows"] if row["status"] != "ok"]
    if untimed:
        lines += ["", "Without a time:", ""]
        lines += [f"- `{row['contender']}`{_at(row)}: {row['status']}: {row['reason']}" for row in untimed]
    lines += ["", "Samples (ms):", ""]
    lines += [
        f"- `{row['contender']}`, {row['length']} tokens: {', '.join(f'{1e3 * s:.4g}' for s in row['samples'])}"
        for row in timed
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    low, high = row["seconds_ci95"]
    speedup = "" if row["speedup_over_dense"] is None else f"{row['speedup_over_dense']:.2f}x"
    name = f"**{row['contender']}**" if row["contender"].startswith(OURS) else row["contender"]
    return (
        f"| {row['length']} | {name} | {row['pattern']} | {1e3 * row['seconds_median']:.4g} "
        f"| {1e3 * low:.4g}-{1e3 * high:.4g} | {1e3 * row['plan_seconds_median']:.3g} | {speedup} "
        f"| {row['pair_bound']:.1f}x | {100 * row['roofline_fraction']:.1f}% | {row['max_error']:.2g} "
        f"| {row['rms_error']:.2g} | {row['error_budget']['max']:.2g}, {row['error_budget']['rms']:.2g} |"
    )


def _how(row: dict[str, Any]) -> str:
    keys = "paged cache" if row["paged"] else "contiguous keys and values"
    return f"{keys}, {'step by step' if row['chunked'] else 'the whole prompt in one call'}"


def _at(row: dict[str, Any]) -> str:
    return "" if row["length"] is None else f" at {row['length']} tokens"


def figure(result: dict[str, Any], path: Path) -> None:
    """Time against length, and speed-up against the bound by pairs."""
    # Heavy, and only for the figure.
    import matplotlib

    matplotlib.use("Agg")
    # After the choice of how to draw.
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = [row for row in result["rows"] if row["status"] == "ok"]
    lengths = sorted({row["length"] for row in rows})
    names = list(dict.fromkeys(row["contender"] for row in rows))
    styles = dict(zip(names, _styles(names, rows), strict=True))
    drawing, (times, speedups) = plt.subplots(1, 2, figsize=(14, 6), dpi=120)
    baseline = result["settings"]["dense_baseline"]
    for axis, key in ((times, "seconds_median"), (speedups, "speedup_over_dense")):
        ends = []
        for name in names:
            points = [(row["length"], row[key]) for row in rows if row["contender"] == name and row[key] is not None]
            if not points or (axis is speedups and name == baseline):
                continue
            axis.plot(*zip(*points, strict=True), **styles[name])
            ends.append((*points[-1], name, styles[name]["color"]))
        if axis is speedups:
            bound = sorted({(row["length"], row["pair_bound"]) for row in rows if row["pattern"] == "triangle"})
            if bound:
                axis.plot(*zip(*bound, strict=True), color="#555555", linestyle=":", linewidth=1.8)
                ends.append((*bound[-1], "bound by pairs", "#555555"))
            axis.axhline(1, color="#999999", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(lengths))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(_tokens))
        axis.set_xlabel("prompt tokens", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.3)
        _label_ends(axis, ends)
    _label_values(times, _seconds)
    _label_values(speedups, lambda value: f"{value:g}x")
    times.set_title("time of one layer's prefill", fontsize=13)
    speedups.set_title(f"speed-up over {baseline}, vLLM's dense kernel", fontsize=13)
    drawing.suptitle(f"{device_name(result)}, {result['environment']['date']}", fontsize=13)
    versions = result["environment"]["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("vllm", "torch", "triton") if name in versions)
    note = f"{layer_name(result)}\n{shown}; median of {result['settings']['repeats']}; samples in kernels.json"
    drawing.text(0.5, 0.012, note, ha="center", va="bottom", fontsize=9.5, color="#444444")
    drawing.subplots_adjust(left=0.07, right=0.87, bottom=0.19, top=0.87, wspace=0.52)
    drawing.savefig(path)
    plt.close(drawing)


def _styles(names: list[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense in blues and greys, dashed; the triangle in warm colours, ours thick."""
    patterns = {row["contender"]: row["pattern"] for row in rows}
    cold = iter(["#1f4e9c", "#6f9bd8", "#5b6770", "#2a9d8f", "#9aa5b1", "#264653", "#7a86c8", "#3d7ea6"])
    warm = iter(["#d1495b", "#e8912d", "#8a5a44", "#c9a227"])
    markers = itertools.cycle("os^Dv*PX")
    return [
        {
            "color": next(cold if patterns[name] == "dense" else warm),
            "linestyle": "--" if patterns[name] == "dense" else "-",
            "linewidth": 2.6 if name.startswith(OURS) else 1.6,
            "marker": next(markers),
            "markersize": 5,
        }
        for name in names
    ]


def _label_ends(axis: Any, ends: list[tuple[float, float, str, str]], *, gap: float = 0.055) -> None:
    """Names lines to the right of the axes, without overlap, by (length, value, name, colour) of their last points."""
    low, high = (math.log(limit) for limit in axis.get_ylim())
    ends = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, value, _, _ in ends:
        place = (math.log(value) - low) / (high - low)
        places.append(max(place, places[-1] + gap) if places else place)
    # Those pushed past the top come back down, and push the ones below.
    ceiling = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    for (length, value, name, color), place in zip(ends, places, strict=True):
        axis.annotate(
            name,
            (length, value),
            (1.06, place),
            textcoords="axes fraction",
            fontsize=11,
            color=color,
            va="center",
            fontweight="bold" if name.startswith(OURS) else "normal",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkB": 4},
        )


def _tokens(value: float, _: int) -> str:
    return f"{value / 1024:g}K" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _label_values(axis: Any, text: Callable[[float], str]) -> None:
    """Labels the powers of ten and a few values between them, fewer on a long axis."""
    # Heavy; loaded by now.
    from matplotlib.ticker import FuncFormatter

    low, high = axis.get_ylim()
    between = (2, 3, 5, 7) if high / low < 20 else (2, 5) if high / low < 1000 else ()

    def minor(value: float, _: int) -> str:
        return text(value) if round(value / 10 ** math.floor(math.log10(value) + 1e-9)) in between else ""

    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.yaxis.set_minor_formatter(FuncFormatter(minor))
    axis.tick_params(which="minor", labelsize=10)


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"
