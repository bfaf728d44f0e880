"""Figures of runs, drawn by matplotlib in colours that colour-blind readers can distinguish (Okabe and Ito)."""

import csv
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.record import Record
from fedlq_ray.problems import Goal

Records = Sequence[Record]
Array = np.ndarray[Any, Any]
# Okabe and Ito's order, darkened to a contrast of 4.5 on white; a run also has its own dash and a name.
COLOURS = ("#0072B2", "#B84A00", "#00795A", "#A3478B", "#7A6200", "#3A3A3A")
MUTED = "#666666"  # contrast 5.7 on white
STEPS = {"download": "#8C8C8C", "compute": "#B58900", "upload": "#4B3F8F"}  # steps of a client's round
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 2)), (0, (3, 3)))
AXES = {
    "time": "simulated time, s ({bill})",
    "bytes": "uplink traffic of all clients, MB",
    "round": "round",
}


def accuracy(
    runs: Mapping[str, Sequence[Records]],
    target: float | None,
    bill: str,
    against: Sequence[str] = ("time", "bytes"),
    goal: Goal = Goal(),
) -> Figure:
    """Plots the main metric against keys of `AXES`, one panel each: the mean of a run's seeds, and a band over them."""
    figure, axes = plt.subplots(
        1, len(against), figsize=(5 * len(against), 4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, key in zip(axes[0], against, strict=True):
        draw_accuracy(axis, runs, target, bill, key, goal)
    axes[0, 0].set_ylabel(f"test {goal.label}")
    return figure


def draw_accuracy(
    axis: Any,
    runs: Mapping[str, Sequence[Records]],
    target: float | None,
    bill: str,
    against: str,
    goal: Goal = Goal(),
) -> None:
    """Draws one panel of `accuracy`."""
    ends, scale = [], goal.scale
    for index, (name, seeds) in enumerate(runs.items()):
        # From the seventh run on, colours repeat with another dash.
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[(index + index // len(COLOURS)) % len(DASHES)]
        series = [line for line in (seen(records, against) for records in seeds) if len(line[0])]
        if not series:
            continue
        first, last = max(xs[0] for xs, _ in series), min(xs[-1] for xs, _ in series)
        grid = np.unique(np.concatenate([xs for xs, _ in series]))
        grid = grid[(grid >= first) & (grid <= last)]
        if not len(grid):  # the seeds' ranges do not overlap
            grid = series[0][0]
        found = scale * np.array([along(line, grid) for line in series])
        if len(series) > 1:
            axis.fill_between(grid, found.min(0), found.max(0), color=colour, alpha=0.18, linewidth=0)
        axis.plot(grid, found.mean(0), color=colour, linestyle=dash, linewidth=1.8)
        ends.append((float(grid[-1]), float(found.mean(0)[-1]), name, colour))
    axis.set(xlabel=AXES[against].format(bill="uploads billed" if bill == "upload" else "both directions billed"))
    if against == "round":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if target is not None:
        axis.axhline(scale * target, color=MUTED, linestyle=":", linewidth=1)
        transform = axis.get_yaxis_transform()
        named = f"target {scale * target:g}{' %' if goal.percent else ''}"
        axis.text(0.01, scale * target, named, color=MUTED, va="bottom", transform=transform)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    name_ends(axis, ends)


def seen(records: Records, against: str) -> tuple[Array, Array]:
    """Returns the positions on an axis at which a run was evaluated, and the main metric there."""
    sent = np.cumsum([r.uplink_bytes for r in records]) / 1e6
    at = {"time": [r.sim_time_s for r in records], "bytes": sent, "round": [r.round + 1 for r in records]}
    evaluated = [i for i, r in enumerate(records) if r.main is not None]
    return np.asarray(at[against], float)[evaluated], np.array([records[i].main for i in evaluated], float)


def along(line: tuple[Array, Array], positions: Any) -> Any:
    """The main metric at positions of a line that `seen` returned: linear between two evaluations."""
    return np.interp(positions, *line)


def test_clients(folder: Path, goal: Goal) -> list[float]:
    """The main metric of each client of a run's test samples (test_clients.csv), the worst first; empty if there are
    none, or one is not finite."""
    file = folder / "test_clients.csv"
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as table:
        values = [float(row[goal.metric]) for row in csv.DictReader(table)]
    return sorted(values, key=goal.merit) if all(map(math.isfinite, values)) else []


def by_client(values: Sequence[float], goal: Goal = Goal()) -> Figure:
    """Plots the main metric per client of the test samples, the worst first."""
    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    draw_clients(axis, {"": values}, goal)
    return figure


def draw_clients(axis: Any, runs: Mapping[str, Sequence[float]], goal: Goal = Goal()) -> None:
    """Draws each run's values per client, the worst first, with a dotted line at their mean and a thick one at the mean
    of the worst tenth; a single run's are named."""
    ends = []
    for index, (name, values) in enumerate(runs.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[(index + index // len(COLOURS)) % len(DASHES)]
        ordered = goal.scale * np.array(sorted(values, key=goal.merit))
        share = 100 * np.arange(len(ordered) + 1) / len(ordered)
        axis.stairs(ordered, share, baseline=None, color=colour, linestyle=dash, linewidth=1.8)
        worst = goal.worst(values)
        mean, low = goal.scale * float(np.mean(values)), goal.scale * float(np.mean(worst))
        axis.hlines(mean, 0, 100, color=colour, linestyle=":", linewidth=1)
        axis.hlines(low, 0, 100 * len(worst) / len(values), color=colour, linewidth=4)
        if len(runs) == 1:
            unit = " %" if goal.percent else ""
            for x, y, text in ((100, mean, f"mean {mean:.3g}{unit}"), (12, low, f"worst tenth {low:.3g}{unit}")):
                side = "right" if x == 100 else "left"
                axis.text(x, y, text, color=MUTED, ha=side, va="bottom" if x == 100 else "center")
        else:
            ends.append((100.0, float(ordered[-1]), name, colour))
    axis.axvspan(0, 10, color=MUTED, alpha=0.12, linewidth=0)
    axis.set(xlabel="clients of the test samples, worst first, %", ylabel=f"test {goal.label}", xlim=(0, 100))
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    name_ends(axis, ends)


def name_ends(axis: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes names next to the ends (x, y, name, colour) of lines, moved up or down so that they do not overlap."""
    axis.get_xlim(), axis.get_ylim()  # querying the limits makes the scales final
    size = float(plt.rcParams["font.size"])
    ends = sorted(ends, key=lambda end: end[1])
    spots = np.array([axis.transData.transform(end[:2]) * 72 / axis.figure.dpi for end in ends])  # in points
    widths = [0.65 * size * len(name) for *_, name, _ in ends]
    heights = spots[:, 1].copy() if ends else spots
    near = [  # pairs of names, the lower first, that would overlap at the same height
        (low, high)
        for low, high in itertools.combinations(range(len(ends)), 2)
        if spots[low, 0] < spots[high, 0] + widths[high] and spots[high, 0] < spots[low, 0] + widths[low]
    ]
    for _ in range(200):
        for low, high in near:
            push = max(0.0, 1.3 * size - (heights[high] - heights[low])) / 2
            heights[low], heights[high] = heights[low] - push, heights[high] + push
    for (x, y, name, colour), (_, before), at in zip(ends, spots, heights, strict=True):
        up = (6, at - before)
        axis.annotate(
            name, (x, y), up, textcoords="offset points", color=colour, va="center", annotation_clip=False, zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip


def require_file(file: Path) -> None:
    """Raises ConfigError if a figure cannot be written to this file."""
    known = plt.gcf().canvas.get_supported_filetypes()
    plt.close()
    if file.suffix[1:] not in known:
        raise ConfigError(f"--out: {file}: must end in .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise ConfigError(f"--out: {file.parent}: no such folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"--out: {file}: cannot be written")


def save(figure: Figure, file: Path, dpi: int = 120) -> None:
    """Saves the figure to a file and closes it."""
    figure.savefig(file, dpi=dpi)
    plt.close(figure)


def labels(counts: Sequence[Sequence[int]], file: Path) -> None:
    """Plots the number of samples of each class on each client: (clients, classes)."""
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    image = axis.imshow(np.array(counts).T, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(xlabel="client", ylabel="class", title="training samples by client and class")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="samples")
    save(figure, file, dpi=100)


@dataclass(frozen=True)
class Panel:
    """A table (layers, levels), and a mask of its significant cells (all, by default)."""

    title: str
    values: np.ndarray[Any, Any]
    seen: np.ndarray[Any, Any] | None = None


def layers(
    panels: Sequence[Sequence[Panel]], names: Sequence[str], levels: Sequence[int], title: str, file: Path
) -> None:
    """Draws rows of heat maps with their values as text. Colours show the rank within a map, because scales differ
    widely; cells that are only noise have no colour."""
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
    figure.supxlabel("level, bits per parameter", fontsize=9)
    save(figure, file, dpi=100)


def short(value: float) -> str:
    """Formats a value with two digits in the fewest characters."""
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.2g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"
