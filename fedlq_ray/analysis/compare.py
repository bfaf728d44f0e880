"""What a sweep comes to: a table, a picture, and a small file that says how to make both again."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedlq_ray import provenance
from fedlq_ray.analysis import plots
from fedlq_ray.sweep import Outcome


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """A row a run: means over seeds and their sample standard deviations; speed-up over the run called fedavg.

    Accuracies and bytes are means over the runs that did not fail; a target counts where all seeds reached it.
    """

    def mean(values: list[Any]) -> float | None:
        return statistics.fmean(values) if values and None not in values else None

    def spread(values: list[Any]) -> float | None:
        return statistics.stdev(values) if len(values) > 1 and None not in values else None

    table: list[dict[str, Any]] = []
    for label, runs in outcome.runs.items():
        done = [run.summary for run in runs if run.summary is not None]
        accuracies = [s["final_accuracy"] for s in done]
        whole = len(done) == len(runs)
        seconds = [s["time_to_target_s"] for s in done] if whole else []
        sent = [s["uplink_bytes_to_target"] and s["uplink_bytes_to_target"] / 1e6 for s in done] if whole else []
        row = {
            "run": label,
            "tuned": outcome.tuned.get(label),
            "seeds": len(runs),
            "failed": len(runs) - len(done),
            "final_accuracy": mean(accuracies),
            "final_accuracy_sd": spread(accuracies),
            "time_to_target_s": mean(seconds),
            "time_to_target_s_sd": spread(seconds),
            "uplink_mb_to_target": mean(sent),
            "uplink_mb": mean([s["uplink_bytes"] / 1e6 for s in done]),
            "by_seed": [
                {"seed": run.config.seed}
                | {k: (run.summary or {}).get(k) for k in ("final_accuracy", "time_to_target_s", "uplink_bytes")}
                for run in runs
            ],
        }
        table.append(row)
    base = next((row["time_to_target_s"] for row in table if row["run"] == "fedavg"), None)
    for row in table:
        own = row["time_to_target_s"]
        row["speed_up"] = base / own if base and own else None
    return table


def render(table: Sequence[dict[str, Any]], target: float | None, bill: str) -> Table:
    """The rows as a table for a terminal; columns that would say nothing are left out."""
    seeds = max(row["seeds"] for row in table)
    billed = "uploads" if bill == "upload" else "uploads and downloads"
    averaged = f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed"
    shown = Table(
        title=f"the clock bills {billed}; {averaged}",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title_justify="left",
    )

    def column(heading: str, cells: list[str], justify: Any = "right") -> None:
        shown.add_column(heading, justify=justify, no_wrap=True)
        columns.append(cells)

    def figures(key: str, scale: float = 1, least: int = 0, missing: str = "–") -> list[str]:
        texts = []
        for row in table:
            spread, value = row.get(f"{key}_sd"), row[key]
            if value is None:
                texts.append(missing)
                continue
            # Three significant digits at least, and the spread to the same place.
            places = max(least, 2 - math.floor(math.log10(abs(scale * value) or 1)))
            text = f"{scale * value:.{places}f}"
            texts.append(text if spread is None else f"{text} ± {scale * spread:.{places}f}")
        return texts

    columns: list[list[str]] = []
    column("run", [row["run"] for row in table], "left")
    column("accuracy, %", figures("final_accuracy", 100, least=2))
    if target is not None:
        column(f"s to {target:.4g}", figures("time_to_target_s", missing="not reached"))
        column(f"MB to {target:.4g}", figures("uplink_mb_to_target", missing="not reached"))
        column("speed-up", figures("speed_up"))
    column("MB in all", figures("uplink_mb"))
    if any(row["failed"] for row in table):
        column("failed", [f"{row['failed']} of {row['seeds']}" for row in table])
    for cells in zip(*columns, strict=True):
        shown.add_row(*cells)
    return shown


def plot(outcome: Outcome, file: Path) -> None:
    """Accuracy against time and bytes, a line a seed."""
    config = next(iter(outcome.runs.values()))[0].config
    lines = {label: [run.records for run in runs] for label, runs in outcome.runs.items()}
    plots.accuracy(lines, config.target_accuracy, config.network.bill, file)


def save(table: Sequence[dict[str, Any]], source: str, command: str, file: Path) -> None:
    """The rows as JSON, with what made them: the sweep's own text, the command, the commit, versions and machine."""
    made_by = {
        "command": command,
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "sweep": source,
    }
    file.write_text(json.dumps(made_by | {"rows": list(table)}, indent=1) + "\n")
