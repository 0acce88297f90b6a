"""Which share of dense attention's keys each pattern reads on real texts, layer by layer.

    python -m benchmarks.real_models.density MODEL --length 8192 --layers 0-29 --documents FILE... --output DIR

The texts' passages are those of ``vllm-trimix eval agreement --documents``; what is counted are the blocks and keys
that the kernels would load. Each layer of a passage is kept once it is measured. Beside it stands the error of the
layer's output, as ``vllm-trimix search`` measures it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.environment import environment
from benchmarks.real_models.patterns import HEADS, patterns
from vllm_trimix.config.head_files import read_head_file
from vllm_trimix.config.layers import parse_layers
from vllm_trimix.evaluation.passages import samples
from vllm_trimix.evaluation.suite import Context
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.registry import describe, make_pattern
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing.saved import Saved
from vllm_trimix.searching.measure import Measured
from vllm_trimix.searching.model import measure_prompt

RESULT = "density.json"
Choice = Mapping[int, Sequence[DynamicPattern]]
"""Layer -> a pattern for each query head."""


@dataclass(frozen=True)
class Settings:
    """What decides the figures of a passage.

    Attributes:
        model: Folder.
        candidates: Patterns, as ``make_pattern`` reads them.
        layers: Layers.
        chunk: Tokens of a chunk of the prompt.
        passage: Hash of its tokens.
    """

    model: str
    candidates: tuple[dict[str, Any], ...]
    layers: tuple[int, ...]
    chunk: int
    passage: str


def measured(model: Any, passage: Sequence[int], settings: Settings, saved: Saved) -> dict[int, Measured]:
    """Every layer's figures on a passage; those that are there are not measured again."""
    left = [layer for layer in settings.layers if str(layer) not in saved]
    if left:
        candidates = [make_pattern(entry, where="candidates") for entry in settings.candidates]
        measure_prompt(
            model,
            passage,
            candidates=candidates,
            layers=left,
            last_n=Triangle.last_n,
            chunk=settings.chunk,
            done=lambda layer, found: saved.put(str(layer), found),
        )
    return {layer: Measured(**saved.results[str(layer)]) for layer in settings.layers}


def by_layer(
    found: Sequence[Mapping[int, Measured]],
    candidates: Sequence[DynamicPattern],
    compared: Mapping[str, DynamicPattern],
    heads: Choice | None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Layer -> pattern -> mean ``density`` of its heads, and the layer's mean ``error``, over all passages.

    Args:
        found: Figures of each passage by layer.
        candidates: The patterns that were measured.
        compared: Patterns that all heads have, by name.
        heads: A head file's choice; None where there is none.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for layer in found[0]:
        figures = [passage[layer] for passage in found]
        count = len(figures[0].density)
        chosen = {name: [pattern] * count for name, pattern in compared.items()}
        if heads is not None:
            chosen[HEADS] = list(heads[layer])
        table[str(layer)] = {}
        for name, row in chosen.items():
            numbers = [candidates.index(pattern) for pattern in row]
            density = [statistics.fmean(one.density[h][n] for h, n in enumerate(numbers)) for one in figures]
            # Heads' errors add up like independent ones.
            error = [math.hypot(*(one.error[h][n] for h, n in enumerate(numbers))) for one in figures]
            table[str(layer)][name] = {"density": statistics.fmean(density), "error": statistics.fmean(error)}
    return table


def run(args: argparse.Namespace) -> Path:
    """Measures all passages; returns the file with the means.

    Raises:
        ValueError: No such layer, texts that are too short, a head file of another model.
        OSError: What can't be read or written.
    """
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    layers = parse_layers(args.layers, num_layers=model.config.num_hidden_layers, where="--layers")
    heads: Choice | None = None
    if args.heads is not None:
        file = read_head_file(str(args.heads), where="--heads")
        named = {layer: file.layers[layer] if layer < len(file.layers) else None for layer in layers}
        heads = {layer: row for layer, row in named.items() if row is not None}
        if len(heads) < len(layers):
            raise ValueError(f"--heads: {args.heads} has no pattern for some of the layers {args.layers}; search them")
    compared = {name: make_pattern(entry, where=name) for name, entry in patterns(args.length).items()}
    of_heads = [pattern for row in (heads or {}).values() for pattern in row]
    candidates = tuple(dict.fromkeys([*compared.values(), *of_heads]))
    context = Context(AutoTokenizer.from_pretrained(args.model), documents=tuple(args.documents))
    args.output.mkdir(parents=True, exist_ok=True)
    found = []
    for sample in samples(context, "prompts", args.length, args.samples):
        digest = hashlib.sha256(json.dumps(sample.prompt).encode()).hexdigest()[:16]
        entries = tuple(describe(pattern) for pattern in candidates)
        settings = Settings(args.model, entries, layers, args.chunk, digest)
        saved = Saved(args.output / f"passage-{sample.index}.json", settings, what="measurement")
        found.append(measured(model, sample.prompt, settings, saved))
        print(f"real-models: passage {sample.index + 1} of {args.samples}", flush=True)
    result = {
        "model": Path(args.model).name,
        "length": args.length,
        "passages": len(found),
        "chunk": args.chunk,
        "environment": environment(),
        "layers": by_layer(found, candidates, compared, heads),
    }
    path: Path = args.output / RESULT
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models.density", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model's folder")
    add("--length", type=int, required=True, metavar="N", help="tokens of passage and continuation")
    add("--samples", type=int, default=4, metavar="K", help="passages (default: %(default)s)")
    add("--layers", required=True, metavar="LAYERS", help="layers with full attention, e.g. 0-29")
    add("--chunk", type=int, default=2048, metavar="N", help="tokens of a chunk of the prompt (default: %(default)s)")
    add("--heads", type=Path, metavar="FILE", help="a head file of vllm-trimix search, to be measured as well")
    add("--documents", type=Path, nargs="+", required=True, metavar="FILE", help="long texts")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    args = parser.parse_args(argv)
    try:
        print(f"real-models: {run(args)}")
    except (OSError, ValueError) as error:
        print(f"real-models: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
