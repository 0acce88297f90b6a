"""Draws docs/figures/mask.png: which keys each query sees, dense and triangle, from the pattern's own definition.

python docs/figures/draw_mask.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from vllm_trimix.patterns.triangle import Triangle

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Small enough to see single keys; the defaults are 8, 512 and 128 of tens of thousands.
PROMPT, PATTERN = 64, Triangle(n_init=4, n_local=10, last_n=8)
HIDDEN, STREAMING, LAST = "#f2f2f2", "#3b6fb6", "#e08e2b"


def main() -> None:
    positions = torch.arange(PROMPT)
    causal = positions[:, None] >= positions
    visible = PATTERN.mask(positions, positions, PROMPT)
    last = causal & (positions[:, None] >= PROMPT - PATTERN.last_n)
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.3), dpi=130)
    panels = (
        ("shallow layers: dense", causal.int(), f"{int(causal.sum())} pairs"),
        ("deep layers: triangle", visible.int() + (visible & last).int(), f"{int(visible.sum())} pairs"),
    )
    colours = matplotlib.colors.ListedColormap([HIDDEN, STREAMING, LAST])
    for axis, (title, image, pairs) in zip(axes, panels, strict=True):
        axis.imshow(image, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
        axis.set_title(f"{title} ({pairs})", fontsize=10)
        axis.set_xlabel("key position")
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel("query position")
    notes = (
        ("sinks\n(n_init)", (1.5, 40), (12, 36)),
        ("local window\n(n_local)", (36, 40), (43, 22)),
        ("last rows\n(last_n)", (24, 60), (14, 47)),
    )
    for text, point, at in notes:
        axes[1].annotate(
            text, point, at, fontsize=9, ha="center", va="center", arrowprops={"arrowstyle": "->", "lw": 0.8}
        )
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("mask.png"))


if __name__ == "__main__":
    main()
