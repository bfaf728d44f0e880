"""Pictures of committed results, one a folder: python experiments/figures.py [quantizers significance ...]"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fedlq_ray.plots import COLOURS, MUTED, name_ends, save

HERE = Path(__file__).parent
MARKS = "os^Dvx"
NAMED = (  # schemes that the picture of the front names; the others overlap
    "fedavg", "float16", "uniform-2", "uniform-4", "eden-1", "ef-signsgd", "fedpaq", "adaquantfl", "dadaquant",
    "ecsq-0.25", "fedlq", "fedlq-rd",
)  # fmt: skip


def results(file: str) -> Any:
    return json.loads((HERE / file).read_text(encoding="utf-8"))


def panels(count: int, width: float = 5.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def series(axis: Any, lines: dict[str, list[tuple[float, float, float]]]) -> list[tuple[float, float, str, str]]:
    """Lines of (x, y, spread), and where their names go."""
    ends = []
    for index, (name, points) in enumerate(lines.items()):
        x, y, spread = np.array(sorted(points)).T
        colour = COLOURS[index % len(COLOURS)]
        axis.errorbar(
            x, y, spread, color=colour, marker=MARKS[index % len(MARKS)], markersize=4, capsize=2, linewidth=1.4
        )
        ends.append((float(x[-1]), float(y[-1]), name, colour))
    return ends


def quantizers() -> None:
    """Normalised error at real bytes, Gaussian and updates, of the schemes that have several rates."""
    families = {
        "min-max": "MinMax,", "QSGD, Elias": "QsgdElias, max", "EDEN, unbiased": "Eden, unbiased",
        "EDEN, least error": "Eden, least error", "ECSQ": "Ecsq,", "stochastic step": "StochasticStep,",
    }  # fmt: skip
    rows = results("quantizers/results.json")["rows"]
    figure, axes = panels(2)
    for axis, source in zip(axes, ("Gaussian", "update"), strict=True):
        lines = {
            name: [
                (row["bits"], row["error"], row["error_sd"])
                for row in rows
                if row["quantizer"].startswith(start) and row["source"] == source and row["bits"] < 4.5
            ]
            for name, start in families.items()
        }
        axis.set(xscale="log", yscale="log", xlabel="bits per parameter, all of the payload", title=source)
        if source == "Gaussian":
            rates = np.geomspace(0.09, 4.2)
            axis.plot(rates, 4**-rates, color=MUTED, linestyle=":", linewidth=1)
            axis.text(0.1, 0.4, "R(D)", color=MUTED)
        axis.set_ylim(3e-4, 100)
        name_ends(axis, series(axis, {name: points for name, points in lines.items() if points}))
    axes[0].set_ylabel("squared error over the vector's square")
    save(figure, HERE / "quantizers/errors.png")


def significance() -> None:
    """How each metric ranks layers and levels, against the truth."""
    rows = results("significance/results.json")["spearman"]
    names = [name for name in rows if "truth" not in name] + ["half of the truth"]
    figure, axes = panels(2, 5.5, 4.2)
    for axis, payload in zip(axes, ("update", "model"), strict=True):
        for index, (kind, label) in enumerate((("all", "all layers and levels"), ("level", "layers, at one level"))):
            found = {name: rows[name][f"{payload}, {kind}"] for name in names}
            dots(axis, found, [COLOURS[index]] * len(names), MARKS[index], 0.3 * index - 0.15, label)
        axis.set(
            xlabel="rank correlation with the true rise of the loss", title=f"payload {payload}", xlim=(-0.6, 1.05)
        )
    axes[1].legend(loc="upper left", fontsize=8)
    save(figure, HERE / "significance/correlations.png")


def low_bits() -> None:
    """Final accuracy against bits per parameter: schemes by the name before their rate."""
    figure, axes = panels(2)
    for axis, payload in zip(axes, ("model", "update"), strict=True):
        lines: dict[str, list[tuple[float, float, float]]] = {}
        rows = {row["run"]: row for row in results(f"low_bits/{payload}.json")["rows"]}
        if payload == "model":  # at the better of its rates
            rows |= {row["run"]: row for row in results("low_bits/model_uniform.json")["rows"]}
        for row in rows.values():
            name, _, rate = row["run"].rpartition("-")
            if name:
                point = (float(rate), 100 * row["final_accuracy"], 100 * row["final_accuracy_sd"])
                lines.setdefault(name, []).append(point)
            else:
                axis.axhline(100 * row["final_accuracy"], color=MUTED, linestyle=":", linewidth=1)
                axis.text(0.1, 100 * row["final_accuracy"], "fp32", color=MUTED, va="bottom")
        axis.set(xlabel="bits per parameter", title=f"payload {payload}")
        if payload == "update":
            axis.set_xscale("log")
        name_ends(axis, series(axis, lines))
    axes[0].set_ylabel("accuracy after 40 rounds, %")
    save(figure, HERE / "low_bits/accuracy.png")


def ablation() -> None:
    """Simulated seconds to 82 % and final accuracy of each row of FedLQ-RD's, and final accuracy of FedLQ's."""
    rd, lq = (results(f"ablation/{name}.json")["rows"] for name in ("fedlq_rd", "fedlq"))
    timed = [row for row in rd if row["targets"]["0.82"]["mean"] is not None]
    figure, axes = panels(3, 4.6, 4.6)
    dots(axes[0], {row["run"]: (row["targets"]["0.82"]["mean"], row["targets"]["0.82"]["sd"]) for row in timed})
    logarithmic(axes[0])
    axes[0].set(xlabel="simulated s to 82 %", title="FedLQ-RD, thin links")
    for axis, rows, title in ((axes[1], rd, "FedLQ-RD, thin links"), (axes[2], lq, "FedLQ, payload model, 1.5 bits")):
        dots(axis, {row["run"]: (100 * row["final_accuracy"], 100 * row["final_accuracy_sd"]) for row in rows})
        axis.set(xlabel="final accuracy, %", title=title)
    for axis in axes:
        axis.axvline(axis.lines[0].get_xdata()[0], color=MUTED, linewidth=0.8, linestyle=":")
    save(figure, HERE / "ablation/ablation.png")


def dots(
    axis: Any,
    found: dict[str, Sequence[float]],
    colours: Sequence[str] = (),
    mark: str = "o",
    shift: float = 0.0,
    label: str | None = None,
) -> None:
    """A row for each name, from the top: a mean, and its spread as a line."""
    for at, (mean, spread) in enumerate(found.values()):
        colour = colours[at] if colours else COLOURS[0]
        axis.errorbar(
            mean, at + shift, xerr=spread, color=colour, marker=mark, markersize=5, elinewidth=1,
            label=None if at else label,
        )  # fmt: skip
    axis.set_yticks(range(len(found)), list(found), fontsize=8)
    axis.set_ylim(len(found) - 0.4, -0.6)


def logarithmic(axis: Any) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def time_to_accuracy() -> None:
    """Seconds to the second target in each population."""
    figure, axes = panels(3, 4.4, 6.5)
    files = [results(f"time_to_accuracy/{name}.json")["rows"] for name in ("fashion_mnist", "others")]
    for axis, where in zip(axes, ("mixed", "thin", "mobile"), strict=True):
        times = {
            row["run"].split("@")[0]: (row["targets"]["0.86"]["mean"], row["targets"]["0.86"]["sd"])
            for rows in reversed(files)
            for row in rows
            if row["run"].endswith(f"@{where}") and row["targets"]["0.86"]["mean"]
        }
        order = sorted(times, key=lambda name: times[name][0])
        colours = [
            COLOURS[2] if name.startswith("fedlq") else MUTED if name == "limit" else COLOURS[0] for name in order
        ]
        dots(axis, {name: times[name] for name in order}, colours)
        logarithmic(axis)
        axis.set(xlabel="simulated s to 86 %", title=f"{where}, uploads billed")
    save(figure, HERE / "time_to_accuracy/fashion_mnist.png")


def front() -> None:
    """Seconds against megabytes to two targets in each population; a line joins the schemes that no other one beats in
    both."""
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 8.4), layout="constrained", sharex=True)
    files = [results(f"time_to_accuracy/{name}.json")["rows"] for name in ("others", "fashion_mnist")]
    for line, target in zip(axes, ("0.833", "0.86"), strict=True):
        for axis, where in zip(line, ("mixed", "thin", "mobile"), strict=True):
            found = {
                row["run"].split("@")[0]: (row["targets"][target]["mb"], row["targets"][target]["mean"])
                for rows in files
                for row in rows
                if row["run"].endswith(f"@{where}") and row["targets"][target]["mean"]
            }
            free = found.pop("limit")[1]
            for name, (megabytes, seconds) in found.items():
                ours = name in ("fedlq", "fedlq-rd")
                axis.plot(megabytes, seconds, "o", markersize=6 if ours else 4, color=COLOURS[2 if ours else 0])
                if name in NAMED:
                    spot = (4, -8) if name in ("dadaquant", "fedlq") else (4, 3)  # below, where another name is above
                    axis.annotate(name, (megabytes, seconds), spot, textcoords="offset points", fontsize=7)
            best = [
                p for p in sorted(found.values()) if all(q == p or q[0] > p[0] or q[1] > p[1] for q in found.values())
            ]
            axis.plot(*zip(*best, strict=True), color=MUTED, linewidth=0.8, zorder=0)
            axis.axhline(free, color=MUTED, linestyle=":", linewidth=1)
            axis.text(
                0.99,
                free,
                "limit",
                color=MUTED,
                fontsize=7,
                va="bottom",
                ha="right",
                transform=axis.get_yaxis_transform(),
            )
            axis.set(xscale="log", yscale="log", title=f"{where}, to {float(target):.1%}")
            axis.grid(alpha=0.2, which="both")
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("MB of uploads")
    for axis in axes[:, 0]:
        axis.set_ylabel("simulated s")
    save(figure, HERE / "time_to_accuracy/front.png")


DRAWN = {draw.__name__: draw for draw in (quantizers, significance, low_bits, ablation, time_to_accuracy, front)}

if __name__ == "__main__":
    for name in sys.argv[1:] or DRAWN:
        DRAWN[name]()
