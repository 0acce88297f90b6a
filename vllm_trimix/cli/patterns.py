"""``vllm-trimix patterns``: the patterns with what they stand for, and what a head file holds."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_trimix.patterns.triangle import Triangle

if TYPE_CHECKING:
    from vllm_trimix.config.head_files import HeadFile
    from vllm_trimix.patterns.base import DynamicPattern

# Module under vllm_trimix/kernels -> what it runs on. They walk lists of blocks and columns, whatever chose those.
KERNELS = {"torch_sparse": "PyTorch (CPU)", "cpp_sparse": "C++ (CPU)", "triton_sparse": "Triton (CUDA)"}
# The same for the triangle, whose keys follow from positions alone.
TRIANGLE_KERNELS = {"torch_cpu": "PyTorch (CPU)", "triton_triangle": "Triton (CUDA)"}
TRIANGLE_SOURCE = "TriangleMix (arXiv 2507.21526)"

# The configuration keys that put a pattern into a layer.
TRIANGLE_LAYERS = "the triangle set (starting_layer, layers)"
DYNAMIC_LAYERS = "shallow layers (shallow), all heads or single heads of a head file"

_COLOURS = {
    "a_shape": "#56B4E9",
    "vertical_slash": "#E69F00",
    "block_sparse": "#009E73",
    "flexprefill": "#CC79A7",
    "xattention": "#F0E442",
    "dense": "#BBBBBB",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "patterns",
        help="list the patterns, or show what a head file holds",
        description="The triangle is for layers of the triangle set. Dynamic patterns are for layers outside it: they "
        "choose keys for each head while a prompt is prefilled (docs/patterns.md).",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="names, layers, sources, parameters with defaults, kernels (the default)")
    show = actions.add_parser(
        "show",
        help="what a head file gives each layer and head",
        description="A line a layer: heads by pattern, with their parameters in the order of `patterns list`, and the "
        "density: the share of causal attention that the budgets allow. Blocks that a diagonal crosses come on top of "
        "it; where the prompt decides (flexprefill, xattention) there is none.",
    )
    show.add_argument("file", type=Path, metavar="FILE", help="a head file, of MInference's, Qwen's or our own form")
    show.add_argument("--layer", type=int, metavar="N", help="this layer, a line a head")
    show.add_argument("--length", type=int, default=131072, metavar="N", help="prompt for the density (131072)")
    show.add_argument("--plot", type=Path, metavar="OUT.png", help="draw layers x heads; needs the extra plot")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints patterns, or a head file.

    Raises:
        ValueError: No head file, no such layer, or no matplotlib.
        OSError: The plot can't be written.
    """
    if args.action != "show":
        _list()
        return 0
    if args.length < 1:
        raise ValueError(f"--length: {args.length} is too small; the least is 1")
    if args.plot is not None:
        _need_matplotlib()
    # Heavy: patterns need torch.
    from vllm_trimix.config.head_files import read_head_file

    file = read_head_file(args.file, where="patterns show")
    if args.layer is not None and not 0 <= args.layer < len(file.layers):
        raise ValueError(
            f"--layer: {args.layer} is outside the file's {len(file.layers)} layers (0-{len(file.layers) - 1})"
        )
    if args.layer is None:
        _show_layers(file, args.length)
    else:
        _show_heads(file.layers[args.layer], args.length)
    if args.plot is not None:
        plot(file, args.plot)
        print(f"plot: {args.plot}")
    return 0


def _list() -> None:
    # Heavy: the dynamic patterns need torch.
    from vllm_trimix.patterns.registry import PATTERNS

    _print_pattern("triangle", Triangle, TRIANGLE_LAYERS, TRIANGLE_SOURCE, TRIANGLE_KERNELS)
    for name, cls in PATTERNS.items():
        _print_pattern(name, cls, DYNAMIC_LAYERS, cls.source, KERNELS)


def _print_pattern(name: str, cls: type, layers: str, source: str, kernels: dict[str, str]) -> None:
    parameters = " ".join(f"{key}={value}" for key, value in dataclasses.asdict(cls()).items())
    print(name)
    print(f"  what        {_summary(cls)}")
    print(f"  layers      {layers}")
    print(f"  source      {source}")
    print(f"  parameters  {parameters}")
    print(f"  kernels     {', '.join(kernels.values())}")


def _summary(cls: type) -> str:
    """The first sentence of the pattern's file."""
    text = " ".join((inspect.getdoc(sys.modules[cls.__module__]) or "").replace("``", "").split())
    return text.partition(". ")[0].removesuffix(".")


def _parameters(pattern: Any) -> list[Any]:
    """Values in the order of ``patterns list``, but the block size, which is the layer's."""
    return [value for key, value in dataclasses.asdict(pattern).items() if key != "block_size"]


def _show_layers(file: HeadFile, length: int) -> None:
    form = "MInference's form" if file.source == "minference" else "own form"
    print(f"{form}, {len(file.layers)} layers" + (f", for {file.model}" if file.model else ""))
    for key, value in file.provenance.items():
        print(f"{key}: {value}")
    for note in file.notes:
        print(f"note: {note}")
    if file.min_seq_len is not None:
        print(f"for chunks that end at {file.min_seq_len} tokens or more (min_seq_len)")
    print("layer  block  density  heads")
    known: list[float] = []
    for number, heads in enumerate(file.layers):
        if heads is None:
            print(f"{number:5}      -        -  left out")
            continue
        groups = Counter(_written(pattern) for pattern in heads).most_common()
        densities = [density(pattern, length) for pattern in heads]
        text = ", ".join(f"{count} x {written}" for written, count in groups)
        print(f"{number:5}  {heads[0].block_size:5}  {_mean(densities):>7}  {text}")
        known += [value for value in densities if value is not None]
    if known and len(known) == sum(len(heads or ()) for heads in file.layers):
        print(f"all heads: {_mean(known)} of causal attention at {length} tokens, by budget")


def _show_heads(heads: tuple[DynamicPattern, ...] | None, length: int) -> None:
    if heads is None:
        print("left out")
        return
    print(" head  density  pattern")
    for number, pattern in enumerate(heads):
        values = " ".join(f"{key}={value}" for key, value in dataclasses.asdict(pattern).items())  # type: ignore[call-overload]
        print(f"{number:5}  {_mean([density(pattern, length)]):>7}  {pattern.name} {values}")


def density(pattern: DynamicPattern, length: int) -> float | None:
    """Share of causal attention over ``length`` tokens that a pattern's budget allows; None: the prompt decides."""
    if pattern.budget is None:
        return None
    growing = min(length, pattern.budget)
    pairs = growing * (growing + 1) // 2 + (length - growing) * growing
    return pairs / (length * (length + 1) // 2)


def _mean(densities: list[float] | list[float | None]) -> str:
    values = [value for value in densities if value is not None]
    return f"{sum(values) / len(values):.4f}" if len(values) == len(densities) else "-"


def _written(pattern: DynamicPattern) -> str:
    """E.g. ``vertical_slash 1000/6096``."""
    values = ("-" if value is None else str(value) for value in _parameters(pattern))
    return f"{pattern.name} {'/'.join(values)}".rstrip()


def _need_matplotlib() -> None:
    try:
        # May be missing: the extra plot.
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("--plot: matplotlib is not installed; pip install 'vllm-trimix[plot]'") from None


def plot(file: HeadFile, path: Path) -> None:
    """Draws layers x heads, coloured by pattern, stronger with its budget.

    Each is marked with its budget in thousands of keys, or with the share of attention that it must hold.
    """
    # Heavy, and may be missing: the extra plot; torch.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    from vllm_trimix.patterns.registry import PATTERNS

    used = [pattern for heads in file.layers for pattern in heads or ()]
    largest = max((pattern.budget for pattern in used if pattern.budget and pattern.name != "dense"), default=1)
    width = max(len(heads or ()) for heads in file.layers)
    figure = Figure(figsize=(2.4 + 0.34 * width, 1.6 + 0.22 * len(file.layers)), layout="constrained")
    axes = figure.add_subplot()
    for layer, heads in enumerate(file.layers):
        for head, pattern in enumerate(heads or ()):
            corner = (head - 0.5, layer - 0.5)
            strength = min(1.0, 0.25 + 0.75 * ((pattern.budget or largest) / largest) ** 0.5)
            colour = (_COLOURS[pattern.name], strength)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=0.5))
            axes.text(head, layer, _mark(pattern), ha="center", va="center", fontsize=6)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(len(file.layers) - 0.5, -0.5)
    axes.set_xticks(range(0, width, max(1, width // 16)))
    axes.set_yticks(range(0, len(file.layers), max(1, len(file.layers) // 16)))
    axes.set_xlabel("query head (number: thousands of keys a row, or share of attention)")
    axes.set_ylabel("layer")
    names = {pattern.name for pattern in used}
    patches = [Patch(color=_COLOURS[name], label=name) for name in PATTERNS if name in names]
    figure.legend(handles=patches, loc="outside upper center", ncols=max(1, len(patches)), frameon=False)
    figure.savefig(path, dpi=120)


def _mark(pattern: DynamicPattern) -> str:
    if pattern.name == "dense":
        return "all"
    if pattern.budget is None:
        return f"{_parameters(pattern)[0]:g}"
    return f"{pattern.budget / 1000:.2g}k" if pattern.budget < 10_000 else f"{pattern.budget / 1000:.0f}k"
