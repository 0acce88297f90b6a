"""What a served benchmark found, as Markdown and as plots."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.serving.configurations import IDEAL, STOCK
from benchmarks.serving.prompts import DOCUMENT, KV_RETRIEVAL, RANDOM

_COLOURS = {STOCK: "#4d4d4d", IDEAL: "#b0b0b0"}
_OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#000000")
_PROMPTS = {
    RANDOM: "random tokens",
    KV_RETRIEVAL: "the published speed test's (6,000 pairs of UUIDs, cut to the length); it warms up once per length "
    "and reports the mean of 3, so that means stand beside the medians",
    DOCUMENT: "documents in the demo language, one question each",
}


def _prompts(kind: str) -> str:
    """In words; what has no name is a text's file."""
    return _PROMPTS.get(kind) or f"passages of `{kind}`, cut anywhere"


def device_line(environment: dict[str, Any]) -> str:
    """Hardware, versions and date in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    amx = "AMX" if environment["amx"] else "no AMX"
    device = environment["gpu"] or f"{environment['cpu']} ({environment['cores']} cores, {amx})"
    return f"{device}; {versions}; {environment['date']}; commit {environment['commit']}"


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    settings, rows = result["settings"], result["rows"]
    cores = "" if result["environment"]["gpu"] else f", each server's worker on core(s) {settings['cpus']}"
    repeats = sorted({row["repeats"] for row in rows})
    confidence = min(row["confidence"] for row in rows)
    lines = [
        "# Time to first token, TRIMIX against stock vLLM",
        "",
        f"{device_line(result['environment'])}. Model `{settings['model']}`{cores}; "
        f"{'-'.join(map(str, repeats))} interleaved rounds after a warm-up per length, one server awake at a time "
        f"(idle ones used at most {100 * max(row['idle_cpu'] for row in rows):.1f}% of a core), prefix caching off. "
        "Medians over rounds, ratios and savings round by round; in brackets the interval that holds the true median "
        f"with at least {100 * confidence:.0f}% probability (order statistics). Prompts: "
        f"{_prompts(settings.get('prompts', RANDOM))}.",
        "",
        *(f"- `{name}`: {_describe(entry)}" for name, entry in settings["configurations"].items()),
        "",
        *(f"- correctness gate, `{name}`: {seen}" for name, seen in result["gate"].items()),
    ]
    lines += ["", "![time to first token against prompt length](ttft.png)"]
    for concurrency in dict.fromkeys(row["concurrency"] for row in rows):
        mine = [row for row in rows if row["concurrency"] == concurrency]
        means = settings.get("prompts") == KV_RETRIEVAL
        table = _table(mine, means=means)
        lines += ["", f"## {concurrency} request{'s' if concurrency > 1 else ''} at a time", "", *table]
    lines += [
        "",
        "`captured saving` = (T_stock - T) / (T_stock - T_ideal), where `ideal` leaves out the triangle layers' "
        "prefill attention and does everything else: 1 would be attention that costs nothing. `pair bound` is the "
        "saving if a triangle layer's attention cost what its visible (query, key) pairs cost. Latency is the mean "
        "time between tokens after the first; throughput counts prompt and generated tokens; memory is the sum over a "
        "server's processes of each one's peak while it served that length (on GPUs the device memory they hold).",
    ]
    if _with_density(rows):
        lines += [
            "",
            "`density` is the share of the keys before them that the rows of a dynamic pattern read, counted by the "
            "kernels while this length was asked, warm-up left out; behind it the share of the prompt rows of the "
            "pattern's layers that were its own (the last rows, and chunks below `min_seq_len`, are dense). It is a "
            "matter of the model and of the prompt: on random weights attention is flat, and patterns that keep a "
            "share of it keep more keys than on a trained model.",
        ]
    return "\n".join(lines) + "\n"


def _describe(entry: dict[str, Any]) -> str:
    if entry["trimix"] is None:
        return "stock vLLM, the plugin not loaded"
    what = f"`{json.dumps(entry['trimix'])}`"
    return f"{what}{' '.join(['', *entry['arguments']])}"


def _with_density(rows: list[dict[str, Any]]) -> bool:
    return any(row["dynamic_share"] is not None for row in rows)


def _table(rows: list[dict[str, Any]], *, means: bool) -> list[str]:
    more = [*(["mean (s)"] if means else []), *(["density (of rows)"] if _with_density(rows) else [])]
    columns = ["prompt tokens", "configuration", "TTFT (s)", "ratio to stock", "captured saving", "pair bound"]
    columns += [*more, "latency (ms), ratio", "throughput (tokens/s)", "memory (MiB)"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        low, high = row["ttft_ci95_s"]
        cells = [
            str(row["length"]),
            row["config"],
            f"{row['ttft_median_s']:.3f} ({low:.3f}-{high:.3f})",
            _with_interval(row["ratio_to_stock"], row["ratio_ci95"]) if row["config"] != STOCK else "1",
            _with_interval(row["captured_saving"], row["captured_ci95"]),
            "" if row["pair_bound"] is None else f"{row['pair_bound']:.2f}",
            *([f"{row['ttft_mean_s']:.3f}"] if means else []),
            *([_density(row)] if "density (of rows)" in more else []),
            _latency(row),
            f"{row['throughput_tokens_s']:.0f}",
            f"{(row['gpu_memory_bytes'] or row['peak_memory_bytes']) / 2**20:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    return "" if value is None or interval is None else f"{value:.2f} ({interval[0]:.2f}-{interval[1]:.2f})"


def _density(row: dict[str, Any]) -> str:
    if row["dynamic_share"] is None:
        return ""
    return f"{'none' if row['density'] is None else format(row['density'], '.3f')} ({100 * row['dynamic_share']:.0f}%)"


def _latency(row: dict[str, Any]) -> str:
    if row["itl_median_s"] is None:
        return ""
    ratio = _with_interval(row["itl_ratio_to_stock"], row["itl_ratio_ci95"])
    return f"{1000 * row['itl_median_s']:.1f}" + ("" if row["config"] == STOCK else f", {ratio}")


def plot_ttft(result: dict[str, Any], path: Path) -> None:
    """TTFT against prompt length, the ratio to stock, and densities, at the lowest concurrency that was measured."""
    # Heavy, and only for the plot.
    import matplotlib

    matplotlib.use("Agg")
    # After the choice of how to draw.
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    concurrency = min(row["concurrency"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["concurrency"] == concurrency]
    names = list(result["settings"]["configurations"])
    others = itertools.cycle(_OTHERS)
    colours = {name: _COLOURS.get(name) or next(others) for name in names}
    panels = 3 if _with_density(rows) else 2
    figure, (times, ratios, *densities) = plt.subplots(1, panels, figsize=(5 * panels, 4.2), layout="constrained")
    for name in names:
        mine = sorted((row for row in rows if row["config"] == name), key=lambda row: row["length"])
        lengths = [row["length"] for row in mine]
        style = {"color": colours[name], "label": name, "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.6}
        if name == IDEAL:
            style["linestyle"] = "--"
        times.errorbar(
            lengths, [row["ttft_median_s"] for row in mine], yerr=_bars(mine, "ttft_median_s", "ttft_ci95_s"), **style
        )
        if name != STOCK:
            bars = _bars(mine, "ratio_to_stock", "ratio_ci95")
            ratios.errorbar(lengths, [row["ratio_to_stock"] for row in mine], yerr=bars, **style)
        for axes in densities:
            known = [(row["length"], row["density"]) for row in mine if row["density"] is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=colours[name], marker="o", markersize=4, linewidth=1.6)
    ratios.axhline(1, color=colours[STOCK], linewidth=1)
    times.set(title="Time to first token", ylabel="seconds", yscale="log")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    times.yaxis.set_minor_formatter(NullFormatter())
    ratios.set(title="Ratio to stock (lower is better)", ylim=(0, None))
    for axes in densities:
        axes.set(title="Keys that dynamic patterns read (share)", ylim=(0, 1))
    for axes in (times, ratios, *densities):
        ticks = sorted({row["length"] for row in rows})
        axes.set(xscale="log", xlabel="prompt tokens")
        axes.set_xticks(ticks, [_thousands(tick) for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    times.legend(frameon=False)
    environment = result["environment"]
    device = environment["gpu"] or f"{environment['cpu']}, cores {result['settings']['cpus']}"
    figure.supxlabel(f"{device}; {environment['date']}; medians and intervals over rounds", fontsize=8, color="#666666")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(rows: list[dict[str, Any]], key: str, interval: str) -> list[list[float]]:
    return [
        [max(0.0, row[key] - row[interval][0]) for row in rows],
        [max(0.0, row[interval][1] - row[key]) for row in rows],
    ]


def _thousands(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
