"""Several runs of one comparison, one after another: `base` settings, `runs` of overrides, `seeds`."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from fedlq_ray import rundir
from fedlq_ray.analysis import plots
from fedlq_ray.config import Config, digest, parse
from fedlq_ray.errors import ConfigError
from fedlq_ray.tracking import now_ms


@dataclass(frozen=True)
class Comparison:
    """The configurations of a sweep, by run's name."""

    name: str
    runs: dict[str, list[Config]]


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> Comparison:
    """Read and check a sweep: all its configurations, before any of them runs.

    Raises:
        ConfigError: the file or one of its configurations is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file") from exc
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as exc:
        raise ConfigError(f"{path}: {' '.join(str(exc).split())}") from exc
    if not isinstance(tree, Mapping) or set(tree) - {"base", "runs", "seeds"} or not isinstance(tree.get("runs"), dict):
        raise ConfigError(f"{path}: a sweep has `base`, `runs` (a name and a list of key=value each) and `seeds`")
    base = dict(tree.get("base") or {})
    name = str(base.get("name", Path(path).stem))
    runs: dict[str, list[Config]] = {}
    for label, changes in tree["runs"].items():
        runs[str(label)] = []
        for seed in tree.get("seeds") or [0]:
            own = [f"name={name}-{label}", f"seed={seed}", *(changes or []), *overrides]
            merged = OmegaConf.merge(OmegaConf.create(base), OmegaConf.from_dotlist([str(o) for o in own]))
            runs[str(label)].append(parse(OmegaConf.to_container(merged, resolve=True), source=f"{path}, run {label}"))
    return Comparison(name, runs)


def run(
    comparison: Comparison, out: Path, start: Callable[[str, Config, str], Any]
) -> dict[str, list[tuple[Config, list[Any], dict[str, Any]]]]:
    """Run what is not finished in `out` yet; gives each run's (configuration, records, summary), a seed each.

    Args:
        start: called with a label, a configuration and the name of the MLflow parent; runs it.
    """
    parent = f"{out.resolve()}/{comparison.name}"
    results: dict[str, list[Any]] = {}
    for label, configs in comparison.runs.items():
        results[label] = []
        for config in configs:
            folder = out / f"{label}-{config.seed}"
            if (folder / "summary.json").exists():
                was, records, summary, _ = rundir.read(folder)
                if digest(was) != digest(config):
                    raise ConfigError(f"{folder}: holds a run with other settings; give another --out, or remove it")
            else:
                if folder.exists():  # cut short before: kept aside, and run anew
                    folder.rename(folder.with_name(f"{folder.name}.unfinished-{now_ms()}"))
                start(label, config.model_copy(update={"out": str(folder)}), parent)
                _, records, summary, _ = rundir.read(folder)
            results[label].append((config, records, summary))
    return results


def rows(results: Mapping[str, list[tuple[Config, list[Any], dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row a run: means over seeds and their sample standard deviations; speed-up over the run called fedavg."""

    def mean(values: list[Any]) -> float | None:
        return statistics.fmean(values) if all(v is not None for v in values) else None

    table = []
    for label, runs in results.items():
        summaries = [summary for _, _, summary in runs]
        accuracies = [s["final_accuracy"] for s in summaries]
        bits = 8 * sum(s["uplink_bytes"] for s in summaries)
        table.append(
            {
                "run": label,
                "seeds": len(summaries),
                "final_accuracy": mean(accuracies),
                "final_accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "time_to_target_s": mean([s["time_to_target_s"] for s in summaries]),
                "uplink_mb_to_target": mean(
                    [s["uplink_bytes_to_target"] and s["uplink_bytes_to_target"] / 1e6 for s in summaries]
                ),
                "sim_time_s": mean([s["sim_time_s"] for s in summaries]),
                "uplink_mb": bits / 8e6 / len(summaries),
            }
        )
    base = next((row["time_to_target_s"] for row in table if row["run"] == "fedavg"), None)
    for row in table:
        own = row["time_to_target_s"]
        row["speed_up"] = base / own if base and own else None
    return table


def render(table: list[dict[str, Any]], target: float | None, bill: str) -> Table:
    """The rows as a table for a terminal."""
    billed = "uploads" if bill == "upload" else "uploads and downloads"
    goal = "no target" if target is None else f"target {target:.1%}"
    shown = Table(title=f"{goal}; the clock bills {billed}; mean over seeds")
    for heading in ("run", "final accuracy", "s to target", "MB to target", "speed-up", "MB in all"):
        shown.add_column(heading, justify="left" if heading == "run" else "right")

    def cell(value: float | None, form: str) -> str:
        return "not reached" if value is None else format(value, form)

    for row in table:
        spread = f" ± {100 * row['final_accuracy_sd']:.2f}" if row["final_accuracy_sd"] is not None else ""
        shown.add_row(
            row["run"],
            f"{100 * row['final_accuracy']:.2f}{spread} %",
            cell(row["time_to_target_s"], ".2f"),
            cell(row["uplink_mb_to_target"], ".2f"),
            "–" if row["speed_up"] is None else f"{row['speed_up']:.2f} x",
            f"{row['uplink_mb']:.2f}",
        )
    return shown


def plot(results: Mapping[str, list[tuple[Config, list[Any], dict[str, Any]]]], file: Path) -> None:
    """Accuracy against time and bytes: the first seed of each run."""
    config = next(iter(results.values()))[0][0]
    first = {label: runs[0][1] for label, runs in results.items()}
    plots.accuracy(first, config.target_accuracy, config.network.bill, file)
