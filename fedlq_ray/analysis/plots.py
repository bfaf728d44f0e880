"""Pictures of runs, by matplotlib, in colours that the colour-blind can tell apart (Okabe and Ito)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Panel:
    """A table (layers, levels), and where it tells more than noise (everywhere, by default)."""

    title: str
    values: np.ndarray[Any, Any]
    seen: np.ndarray[Any, Any] | None = None


def layers(
    panels: Sequence[Sequence[Panel]], names: Sequence[str], levels: Sequence[int], title: str, file: Path
) -> None:
    """Heat maps in rows, with their figures written in. Colours go by rank in a map, as scales differ much; what is
    only noise has none."""
    rows, columns = len(panels), len(panels[0])
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(1.6 + max(0.55 * len(levels), 2.2) * columns, 0.8 + (0.7 + max(0.26 * len(names), 1)) * rows),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axis, panel in zip(grid.flat, (panel for row in panels for panel in row), strict=True):
        seen = np.ones(panel.values.shape, bool) if panel.seen is None else panel.seen
        ranks = np.full(panel.values.shape, np.nan)
        ranks[seen] = np.argsort(np.argsort(panel.values[seen])) / max(1, seen.sum() - 1)
        axis.imshow(np.ma.masked_invalid(ranks), aspect="auto", cmap="viridis", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(panel.values):
            shade = "0.6" if not seen[row, column] else "white" if ranks[row, column] < 0.6 else "black"
            axis.text(column, row, short(float(value)), ha="center", va="center", color=shade, fontsize=7)
        axis.set_title(panel.title, fontsize=9)
        axis.set_xticks(range(len(levels)), [str(b) for b in levels])
        axis.set_yticks(range(len(names)), list(names), fontsize=8)
        axis.tick_params(length=0)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("level, bits a parameter", fontsize=9)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def short(value: float) -> str:
    """Two digits, in the fewest characters."""
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.2g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"
