"""Pictures of runs, by matplotlib, in colours that the colour-blind can tell apart (Okabe and Ito)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

Records = Sequence[Mapping[str, Any]]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def accuracy(runs: Mapping[str, Sequence[Records]], target: float | None, bill: str, file: Path) -> None:
    """Accuracy against simulated time and against megabytes sent: a colour a run, a line a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for (name, seeds), colour in zip(runs.items(), COLOURS * 100, strict=False):
        for index, records in enumerate(seeds):
            sent = np.cumsum([r["uplink_bytes"] for r in records]) / 1e6
            seen = [i for i, r in enumerate(records) if r["accuracy"] is not None]
            values = [records[i]["accuracy"] for i in seen]
            style: dict[str, Any] = {"color": colour, "label": None if index else name, "alpha": 0.4 if index else 1}
            axes[0].plot([records[i]["sim_time_s"] for i in seen], values, **style)
            axes[1].plot(sent[seen], values, **style)
    billed = "uploads billed" if bill == "upload" else "uploads and downloads billed"
    axes[0].set(xlabel=f"simulated time, s ({billed})", ylabel="test accuracy", xscale="log")
    axes[1].set(xlabel="uplink traffic, MB (all clients)", xscale="log")
    for axis in axes:
        if target is not None:
            axis.axhline(target, color="0.6", linestyle=":", linewidth=1)
            axis.text(
                0.01, target, f"target {target:g}", color="0.4", va="bottom", transform=axis.get_yaxis_transform()
            )
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def labels(counts: Sequence[Sequence[int]], file: Path) -> None:
    """How many samples of each class each client has: (clients, classes)."""
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    image = axis.imshow(np.array(counts).T, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(xlabel="client", ylabel="class", title="training samples by client and class")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="samples")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def layers(values: np.ndarray[Any, Any], names: Sequence[str], levels: Sequence[int], title: str, file: Path) -> None:
    """A table (layers, levels) as a heat map, with its figures written in; colours by rank, as scales differ much."""
    figure, axis = plt.subplots(figsize=(1.6 + 0.9 * len(levels), 1.4 + 0.45 * len(names)), layout="constrained")
    ranks = np.argsort(np.argsort(values, axis=None)).reshape(values.shape)
    axis.imshow(ranks, aspect="auto", cmap="viridis")
    for (row, column), value in np.ndenumerate(values):
        shade = "white" if ranks[row, column] < ranks.size * 0.6 else "black"
        axis.text(column, row, f"{value:.2g}", ha="center", va="center", color=shade, fontsize=8)
    axis.set(title=title, xlabel="level, bits a parameter")
    axis.set_xticks(range(len(levels)), [str(b) for b in levels])
    axis.set_yticks(range(len(names)), list(names))
    figure.savefig(file, dpi=120)
    plt.close(figure)
