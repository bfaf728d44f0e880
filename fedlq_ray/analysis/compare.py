"""Compares runs: one row for runs that differ only in seed, relative to a reference, with confidence intervals."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student

from fedlq_ray import plots
from fedlq_ray.analysis.runs import by_population, parameters, population
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.metrics import METRICS
from fedlq_ray.federation.record import Record
from fedlq_ray.runs import provenance
from fedlq_ray.sweeps.sweep import Finished, Outcome

CONFIDENCE = 0.95
Row = dict[str, Any]


def time_to(records: Iterable[Record], target: float) -> tuple[float, float, float] | None:
    """Simulated seconds, uplink and downlink MB until a run first reaches an accuracy; None if it never does."""
    sent = received = 0
    for record in records:
        sent, received = sent + record.uplink_bytes, received + record.downlink_bytes
        if record.accuracy is not None and record.accuracy >= target:
            return record.sim_time_s, sent / 1e6, received / 1e6
    return None


class Interval(NamedTuple):
    """A mean over seeds and its confidence interval; low and high are None for one seed."""

    mean: float
    low: float | None
    high: float | None


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval (`CONFIDENCE`) of the mean of independent values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    reach = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - reach, mean + reach)


def gain(own: Mapping[int, float | None], base: Mapping[int, float | None]) -> Interval | None:
    """The mean of own - base, paired by seed; None if the seeds differ, or if one lacks the value."""
    if own.keys() != base.keys() or not own:
        return None
    pairs = [(own[seed], base[seed]) for seed in own]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return interval(differences) if len(differences) == len(pairs) else None


def speed_up(own: Mapping[int, float | None], base: Mapping[int, float | None]) -> Interval | None:
    """The geometric mean of base / own, paired by seed as in `gain`; its interval is that of the logarithms."""
    logs = [{seed: value and -math.log(value) for seed, value in times.items()} for times in (own, base)]
    found = gain(*logs)
    if found is None:
        return None
    mean, low, high = found
    return Interval(math.exp(mean), None if low is None else math.exp(low), None if high is None else math.exp(high))


def rows(outcome: Outcome, reference: str | None = None) -> list[Row]:
    """Returns one row per run: means over seeds and their sample standard deviations.

    Accuracies and bytes are means over the runs that did not fail; a target counts if all seeds reached it.
    accuracy_gain, speed_up: relative to the reference of the same population, with the bounds of their intervals;
    to_limit: time in multiples of that of the run named limit; front: no run of the population has more accuracy and
    fewer bytes, or is better in one of them and equal in the other.

    Args:
        reference: a run's name without its population; by default fedavg, or the first run if there is no fedavg.
    Raises:
        ConfigError: no run has the name `reference`.
    """
    table = [_row(label, runs, outcome) for label, runs in outcome.runs.items()]
    labels = [row["run"] for row in table]
    names = list(dict.fromkeys(label.removesuffix(f"@{population(label)}") for label in labels))
    if reference is not None and reference not in names:
        raise ConfigError(f"--reference: there is no run {reference}; the runs are {', '.join(names)}")
    reference = reference or ("fedavg" if "fedavg" in names else names[0])
    times = {label: _by_seed(outcome.runs[label], "time_to_target_s") for label in labels}
    accuracies = {label: _by_seed(outcome.runs[label], "final_accuracy") for label in labels}
    for row in table:
        label, where = row["run"], population(row["run"])
        base, limit = (f"{name}@{where}" if where else name for name in (reference, "limit"))
        won = gain(accuracies[label], accuracies[base]) if base in labels else None
        faster = speed_up(times[label], times[base]) if base in labels else None
        row["reference"] = base
        for key, found in (("accuracy_gain", won), ("speed_up", faster)):
            row[key], row[f"{key}_low"], row[f"{key}_high"] = found or (None, None, None)
        least = next((other["time_to_target_s"] for other in table if other["run"] == limit), None)
        row["to_limit"] = row["time_to_target_s"] / least if least and row["time_to_target_s"] else None
        row["front"] = _undominated(row, [other for other in table if population(other["run"]) == where])
    return table


def _row(label: str, runs: Sequence[Finished], outcome: Outcome) -> Row:
    done = [run.summary for run in runs if run.summary is not None]
    values: dict[str, float | None] = {}
    for metric in METRICS:
        if metric.of_run:
            found = done if len(done) == len(runs) or not metric.of_all else []
            known = [None if (value := metric.of_run(summary)) is None else value / metric.per for summary in found]
            values |= {metric.name: _mean(known), f"{metric.name}_sd": _spread(known)}
    return {
        "run": label,
        "tuned": outcome.tuned.get(label),
        "seeds": len(runs),
        "failed": len(runs) - len(done),
        **values,
        "targets": {f"{target:g}": _reached(runs, target) for target in outcome.targets},
        "bits_per_parameter": _bits(runs),
        "by_seed": [
            {"seed": run.config.seed}
            | {k: (run.summary or {}).get(k) for k in ("final_accuracy", "time_to_target_s", "uplink_bytes")}
            for run in runs
        ],
    }


def _mean(values: list[Any]) -> float | None:
    return statistics.fmean(values) if values and None not in values else None


def _spread(values: list[Any]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 and None not in values else None


def _by_seed(runs: Sequence[Finished], key: str) -> dict[int, float | None]:
    return {run.config.seed: run.summary[key] if run.summary else None for run in runs}


def _reached(runs: Sequence[Finished], target: float) -> dict[str, Any]:
    """Seconds and MB to an accuracy over the seeds, if all reached it, and the number of seeds that did."""
    found = [time_to(run.records, target) if run.summary else None for run in runs]
    seconds, sent, received = ([one and one[i] for one in found] for i in range(3))
    return {
        "mean": _mean(seconds),
        "sd": _spread(seconds),
        "mb": _mean(sent),
        "downlink_mb": _mean(received),
        "reached": sum(one is not None for one in found),
    }


def _bits(runs: Sequence[Finished]) -> float | None:
    """Bits per parameter over all payloads, headers included; None if no model was saved, or nothing was sent."""
    size, records = parameters(runs), [record for run in runs for record in run.records]
    payloads = sum(len(record.answered) for record in records)
    return 8 * sum(r.uplink_bytes for r in records) / (payloads * size) if size and payloads else None


def _undominated(row: Row, among: Sequence[Row]) -> bool:
    def figures(one: Row) -> tuple[float, float] | None:
        known = one["final_accuracy"] is not None and one["uplink_mb"] is not None
        return (one["final_accuracy"], -one["uplink_mb"]) if known else None

    own = figures(row)
    others = [other for other in map(figures, among) if other is not None]
    return own is not None and not any(o != own and o[0] >= own[0] and o[1] >= own[1] for o in others)


def plot(outcome: Outcome, file: Path) -> list[Path]:
    """Plots accuracy against time and bytes; one picture per population, such as accuracy@thin.png."""
    made = []
    for where, labels in by_population(outcome.runs).items():
        config = outcome.runs[labels[0]][0].config
        lines = {label.removesuffix(f"@{where}"): [run.records for run in outcome.runs[label]] for label in labels}
        made.append(file.with_stem(f"{file.stem}@{where}") if where else file)
        plots.save(plots.accuracy(lines, config.target_accuracy, config.network.bill), made[-1])
    return made


def save(table: Sequence[Row], source: str, command: str, file: Path) -> None:
    """Saves the rows as JSON with their origin: the sweep's own text, the command, commit, versions and machine."""
    made_by = {"command": command, **provenance.made_by(), "sweep": source}
    file.write_text(json.dumps(made_by | {"rows": list(table)}, indent=1) + "\n", encoding="utf-8")
