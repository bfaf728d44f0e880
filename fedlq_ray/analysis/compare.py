"""What a sweep comes to: a table, a picture, and a small file that says how to make both again."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedlq_ray import provenance
from fedlq_ray.analysis import plots
from fedlq_ray.sweep import Finished, Outcome


def population(label: str) -> str:
    """The population that a run's label names, as in eden-1@thin; "" for none."""
    return label.rpartition("@")[2] if "@" in label else ""


def by_population(labels: Iterable[str]) -> dict[str, list[str]]:
    """The labels of each population, in their order."""
    found: dict[str, list[str]] = {}
    for label in labels:
        found.setdefault(population(label), []).append(label)
    return found


def time_to(records: Iterable[Mapping[str, Any]], target: float) -> tuple[float, float, float] | None:
    """Simulated seconds, uplink and downlink MB until a run is first seen at an accuracy; None where it never is."""
    sent = received = 0
    for record in records:
        sent, received = sent + record["uplink_bytes"], received + record["downlink_bytes"]
        if record["accuracy"] is not None and record["accuracy"] >= target:
            return record["sim_time_s"], sent / 1e6, received / 1e6
    return None


def _mean(values: list[Any]) -> float | None:
    return statistics.fmean(values) if values and None not in values else None


def _spread(values: list[Any]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 and None not in values else None


def _reached(runs: Sequence[Finished], target: float) -> dict[str, Any]:
    """The seeds' seconds and MB to an accuracy, if all reached it, and how many did."""
    found = [time_to(run.records, target) if run.summary else None for run in runs]
    seconds, sent, received = ([one and one[i] for one in found] for i in range(3))
    return {
        "mean": _mean(seconds),
        "sd": _spread(seconds),
        "mb": _mean(sent),
        "downlink_mb": _mean(received),
        "reached": sum(one is not None for one in found),
    }


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """A row a run: means over seeds and their sample standard deviations.

    Accuracies and bytes are means over the runs that did not fail; a target counts where all seeds reached it.
    speed_up: over the run called fedavg, of the same population; to_limit: time in multiples of the run's called limit.
    """
    table: list[dict[str, Any]] = []
    for label, runs in outcome.runs.items():
        done = [run.summary for run in runs if run.summary is not None]
        accuracies = [s["final_accuracy"] for s in done]
        whole = len(done) == len(runs)
        seconds = [s["time_to_target_s"] for s in done] if whole else []
        sent = [s["uplink_bytes_to_target"] and s["uplink_bytes_to_target"] / 1e6 for s in done] if whole else []
        row: dict[str, Any] = {
            "run": label,
            "tuned": outcome.tuned.get(label),
            "seeds": len(runs),
            "failed": len(runs) - len(done),
            "final_accuracy": _mean(accuracies),
            "final_accuracy_sd": _spread(accuracies),
            "time_to_target_s": _mean(seconds),
            "time_to_target_s_sd": _spread(seconds),
            "uplink_mb_to_target": _mean(sent),
            "targets": {f"{target:g}": _reached(runs, target) for target in outcome.targets},
            "uplink_mb": _mean([s["uplink_bytes"] / 1e6 for s in done]),
            "by_seed": [
                {"seed": run.config.seed}
                | {k: (run.summary or {}).get(k) for k in ("final_accuracy", "time_to_target_s", "uplink_bytes")}
                for run in runs
            ],
        }
        table.append(row)
    times = {row["run"]: row["time_to_target_s"] for row in table}
    for row in table:
        own, where = row["time_to_target_s"], population(row["run"])
        base, limit = (times.get(f"{name}@{where}" if where else name) for name in ("fedavg", "limit"))
        row["speed_up"] = base / own if base and own else None
        row["to_limit"] = own / limit if limit and own else None
    return table


def render(table: Sequence[dict[str, Any]], target: float | None, bill: str) -> Table:
    """The rows of one population as a table for a terminal; columns that would say nothing are left out."""
    seeds = max(row["seeds"] for row in table)
    billed = "uploads" if bill == "upload" else "uploads and downloads"
    averaged = f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed"
    where = population(table[0]["run"])
    shown = Table(
        title=f"{where and f'{where}: '}the clock bills {billed}; {averaged}",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title_justify="left",
    )

    def column(heading: str, cells: list[str], justify: Any = "right") -> None:
        shown.add_column(heading, justify=justify, no_wrap=True)
        columns.append(cells)

    def figure(value: float | None, spread: float | None, scale: float = 1, least: int = 0, missing: str = "–") -> str:
        if value is None:
            return missing
        # Three significant digits at least, and the spread to the same place.
        places = max(least, 2 - math.floor(math.log10(abs(scale * value) or 1)))
        text = f"{scale * value:.{places}f}"
        return text if spread is None else f"{text} ± {scale * spread:.{places}f}"

    def figures(key: str, missing: str = "–") -> list[str]:
        return [figure(row[key], row.get(f"{key}_sd"), missing=missing) for row in table]

    columns: list[list[str]] = []
    column("run", [row["run"].removesuffix(f"@{where}") for row in table], "left")
    accuracies = [figure(row["final_accuracy"], row["final_accuracy_sd"], 100, least=2) for row in table]
    column("accuracy, %", accuracies)
    if target is not None:
        column(f"s to {target:.4g}", figures("time_to_target_s", missing="not reached"))
        column(f"MB to {target:.4g}", figures("uplink_mb_to_target", missing="not reached"))
        column("speed-up", figures("speed_up"))
        if any(row["to_limit"] is not None for row in table):
            column("times limit", figures("to_limit"))
    for other in table[0]["targets"]:
        if target is not None and float(other) == target:
            continue
        found = [row["targets"][other] for row in table]
        missing = [f"by {one['reached']} of {seeds}" if one["reached"] else "not reached" for one in found]
        column(f"s to {other}", [figure(f["mean"], f["sd"], missing=m) for f, m in zip(found, missing, strict=True)])
        column(f"MB to {other}", [figure(one["mb"], None) for one in found])
    column("MB in all", figures("uplink_mb"))
    if any(row["failed"] for row in table):
        column("failed", [f"{row['failed']} of {row['seeds']}" for row in table])
    for cells in zip(*columns, strict=True):
        shown.add_row(*cells)
    return shown


def plot(outcome: Outcome, file: Path) -> list[Path]:
    """Accuracy against time and bytes, a line a seed; a picture a population, such as accuracy@thin.png."""
    made = []
    for where, labels in by_population(outcome.runs).items():
        config = outcome.runs[labels[0]][0].config
        lines = {label: [run.records for run in outcome.runs[label]] for label in labels}
        made.append(file.with_stem(f"{file.stem}@{where}") if where else file)
        plots.accuracy(lines, config.target_accuracy, config.network.bill, made[-1])
    return made


def save(table: Sequence[dict[str, Any]], source: str, command: str, file: Path) -> None:
    """The rows as JSON, with what made them: the sweep's own text, the command, the commit, versions and machine."""
    made_by = {"command": command, **provenance.made_by(), "sweep": source}
    file.write_text(json.dumps(made_by | {"rows": list(table)}, indent=1) + "\n")
