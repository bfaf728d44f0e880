"""Compares runs: one row for runs that differ only in seed, relative to a reference, with confidence intervals."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student

from fedlq_ray import plots
from fedlq_ray.analysis import budget
from fedlq_ray.analysis.runs import by_population, parameters, population
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.metrics import METRICS
from fedlq_ray.federation.record import Record
from fedlq_ray.problems import Goal, goal_of
from fedlq_ray.runs import provenance
from fedlq_ray.sweeps.sweep import Finished, Outcome

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """A mean over seeds and its standard deviation (of the sample; None for one seed). None where a seed lacks it."""

    mean: float | None
    sd: float | None

    @staticmethod
    def of(values: Sequence[float | None]) -> "Spread":
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return Spread(None, None)
        return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


class Interval(NamedTuple):
    """A mean over seeds and its confidence interval; low and high are None for one seed."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and self.low * self.high > 0


class Quality(NamedTuple):
    """Quality-under-Budget: the main metric at the largest budget that a run and its reference reach with every seed.

    Attributes:
        budget: in MB of uploads, or in simulated seconds.
        mean: over seeds; None if the budget ends before the first evaluation of one.
        gain: over the reference, paired by seed; None if the reference has no value.
    """

    budget: float
    mean: float | None
    gain: Interval | None


class Reached(NamedTuple):
    """How runs came to a target: simulated seconds and MB, if all seeds reached it, and how many did."""

    seconds: Spread
    mb: float | None
    downlink_mb: float | None
    seeds: int

    def to_json(self) -> dict[str, float | None]:
        return {
            "mean": self.seconds.mean,
            "sd": self.seconds.sd,
            "mb": self.mb,
            "downlink_mb": self.downlink_mb,
            "reached": self.seeds,
        }


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only, and how they compare with the reference of their population.

    Attributes:
        tuned: the settings that tuning chose, as key=value.
        failed: how many of the seeds have no result.
        values: by the names of METRICS, for those of a whole run.
        targets: by accuracy, as text.
        by_seed: of each run: its seed, final accuracy, seconds to the target, and uplink bytes.
        reference: its name; it is in the table only if the population has it.
        accuracy_gain, speed_up: over the reference; None if the reference or a value is missing.
        qualities: by the names of budget.AXES; only those that are known.
        mb_saving: uplink MB to the target of the reference over its own.
        to_limit: time to the target in multiples of that of the run named limit.
        gap_closed: the share of the time to the target that the limit saves over the reference, and that it saves too.
        goal: the main metric.
        front: no run of the population has more accuracy and fewer bytes, or is better in one and equal in the other.
    """

    run: str
    tuned: str | None
    seeds: int
    failed: int
    values: Mapping[str, Spread]
    targets: Mapping[str, Reached]
    bits_per_parameter: float | None
    by_seed: Sequence[Mapping[str, float | None]]
    reference: str = ""
    accuracy_gain: Interval | None = None
    speed_up: Interval | None = None
    qualities: Mapping[str, Quality] = field(default_factory=dict)
    mb_saving: Interval | None = None
    to_limit: float | None = None
    gap_closed: Interval | None = None
    front: bool = False
    goal: Goal = Goal()

    @property
    def final(self) -> str:
        """The name of the main metric's last value."""
        return f"final_{self.goal.metric}"

    @property
    def population(self) -> str:
        return population(self.run)

    @property
    def name(self) -> str:
        """The run's name without its population."""
        return self.run.removesuffix(f"@{self.population}")

    def mean(self, metric: str) -> float | None:
        return self.values[metric].mean

    def to_json(self) -> dict[str, Any]:
        """A flat mapping, as in table.json."""
        own: dict[str, Any] = {"run": self.run, "tuned": self.tuned, "seeds": self.seeds, "failed": self.failed}
        for name, (mean, sd) in self.values.items():
            own |= {name: mean, f"{name}_sd": sd}
        own["targets"] = {target: reached.to_json() for target, reached in self.targets.items()}
        own |= {"bits_per_parameter": self.bits_per_parameter, "by_seed": list(self.by_seed)}
        own["reference"] = self.reference
        for name in budget.AXES:
            own[name], own[f"{self.goal.metric}_at_{name}"], _ = self.qualities.get(name) or (None, None, None)
        gains = {f"gain_at_{name}": one.gain if (one := self.qualities.get(name)) else None for name in budget.AXES}
        gains = {"accuracy_gain": self.accuracy_gain, "speed_up": self.speed_up, **gains}
        for name, found in (gains | {"mb_saving": self.mb_saving, "gap_closed": self.gap_closed}).items():
            own[name], own[f"{name}_low"], own[f"{name}_high"] = found or (None, None, None)
        return own | {"to_limit": self.to_limit, "front": self.front}


def time_to(records: Iterable[Record], target: float, goal: Goal = Goal()) -> tuple[float, float, float] | None:
    """Simulated seconds, uplink and downlink MB until a run first reaches a target; None if it never does."""
    sent = received = 0
    for record in records:
        sent, received = sent + record.uplink_bytes, received + record.downlink_bytes
        if goal.reaches(record.main, target):
            return record.sim_time_s, sent / 1e6, received / 1e6
    return None


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


def gap_closed(
    own: Mapping[int, float | None], base: Mapping[int, float | None], least: Mapping[int, float | None]
) -> Interval | None:
    """The mean of (base - own) / (base - least), paired by seed as in `gain`; None unless least is below base."""
    if not own or not own.keys() == base.keys() == least.keys():
        return None
    shares = []
    for seed, value in own.items():
        top, floor = base[seed], least[seed]
        if value is None or top is None or floor is None or floor >= top:
            return None
        shares.append((top - value) / (top - floor))
    return interval(shares)


def qualities(own: Sequence[Finished], base: Sequence[Finished]) -> dict[str, Quality]:
    """Quality-under-Budget of runs, compared with those of the reference."""
    found = {}
    for name, axis in budget.AXES.items():
        most = budget.largest([run.records for run in (*own, *base) if run.summary], axis)
        if most is None:
            continue
        mine, theirs = (
            {r.config.seed: budget.quality(r.records, axis, most) if r.summary else None for r in runs}
            for runs in (own, base)
        )
        found[name] = Quality(most, Spread.of(list(mine.values())).mean, gain(mine, theirs))
    return found


def rows(outcome: Outcome, reference: str | None = None) -> list[Row]:
    """Returns one row per run. Accuracies and bytes are means over the seeds that did not fail.

    Args:
        reference: a run's name without its population; by default fedavg, or the first run if there is no fedavg.
    Raises:
        ConfigError: no run has the name `reference`.
    """
    table = [_row(label, runs, outcome) for label, runs in outcome.runs.items()]
    labels = [row.run for row in table]
    names = list(dict.fromkeys(row.name for row in table))
    if reference is not None and reference not in names:
        raise ConfigError(f"--reference: there is no run {reference}; the runs are {', '.join(names)}")
    reference = reference or ("fedavg" if "fedavg" in names else names[0])
    times, sent = (
        {label: _by_seed(outcome.runs[label], key) for label in labels}
        for key in ("time_to_target_s", "uplink_bytes_to_target")
    )
    finals = {row.run: _by_seed(outcome.runs[row.run], row.final) for row in table}

    def compared(row: Row) -> Row:
        where = row.population
        base, limit = (f"{name}@{where}" if where else name for name in (reference, "limit"))
        own, least = (
            next((r.mean("time_to_target_s") for r in table if r.run == run), None) for run in (row.run, limit)
        )
        return replace(
            row,
            reference=base,
            accuracy_gain=gain(finals[row.run], finals[base]) if base in labels else None,
            speed_up=speed_up(times[row.run], times[base]) if base in labels else None,
            qualities=qualities(outcome.runs[row.run], outcome.runs[base]) if base in labels else {},
            mb_saving=speed_up(sent[row.run], sent[base]) if base in labels else None,
            to_limit=own / least if own and least else None,
            gap_closed=gap_closed(times[row.run], times[base], times[limit]) if {base, limit} <= {*labels} else None,
            front=_undominated(row, [other for other in table if other.population == where]),
        )

    return [compared(row) for row in table]


def _row(label: str, runs: Sequence[Finished], outcome: Outcome) -> Row:
    done = [run.summary for run in runs if run.summary is not None]
    goal = next((_goal(run) for run in runs if run.summary is not None), _goal(runs[0]))
    values = {}
    for metric in METRICS:
        if metric.of_run:
            found = done if len(done) == len(runs) or not metric.of_all else []
            known = [None if (value := metric.of_run(summary)) is None else value / metric.per for summary in found]
            values[metric.name] = Spread.of(known)
        if metric.of_records:
            whole = [metric.of_records(run.records) for run in runs if run.summary is not None and run.records]
            values[metric.name] = Spread.of(whole)
    if goal != Goal():
        values[f"final_{goal.metric}"] = Spread.of([summary.get(f"final_{goal.metric}") for summary in done])
    return Row(
        run=label,
        tuned=outcome.tuned.get(label),
        seeds=len(runs),
        failed=len(runs) - len(done),
        values=values,
        targets={f"{target:g}": _reached(runs, target) for target in outcome.targets},
        bits_per_parameter=_bits(runs),
        goal=goal,
        by_seed=[
            {"seed": run.config.seed}
            | {k: (run.summary or {}).get(k) for k in (f"final_{goal.metric}", "time_to_target_s", "uplink_bytes")}
            for run in runs
        ],
    )


def _by_seed(runs: Sequence[Finished], key: str) -> dict[int, float | None]:
    return {run.config.seed: run.summary[key] if run.summary else None for run in runs}


def _goal(run: Finished) -> Goal:
    return goal_of(run.config.problem, run.summary)


def _reached(runs: Sequence[Finished], target: float) -> Reached:
    found = [time_to(run.records, target, _goal(run)) if run.summary else None for run in runs]
    seconds, sent, received = (Spread.of([one and one[i] for one in found]) for i in range(3))
    return Reached(seconds, sent.mean, received.mean, sum(one is not None for one in found))


def _bits(runs: Sequence[Finished]) -> float | None:
    """Bits per parameter over all payloads that arrived, headers included; None if no model was saved, or none did."""
    size, records = parameters(runs), [record for run in runs for record in run.records]
    payloads = sum(len(record.answered) for record in records)
    flights = (zip(r.client_uplink_bytes, r.client_end, strict=False) for r in records)
    lost = sum(sent for each in flights for sent, how in each if how != "arrived")
    sent = sum(r.uplink_bytes for r in records) - lost
    return 8 * sent / (payloads * size) if size and payloads else None


def _undominated(row: Row, among: Sequence[Row]) -> bool:
    def figures(one: Row) -> tuple[float, float] | None:
        final, mb = one.mean(one.final), one.mean("uplink_mb")
        return None if final is None or mb is None else (one.goal.merit(final), -mb)

    own = figures(row)
    others = [other for other in map(figures, among) if other is not None]
    return own is not None and not any(o != own and o[0] >= own[0] and o[1] >= own[1] for o in others)


def plot(outcome: Outcome, file: Path) -> list[Path]:
    """Plots accuracy against time and bytes; one picture per population, such as accuracy@thin.png."""
    made = []
    for where, labels in by_population(outcome.runs).items():
        config, goal = outcome.runs[labels[0]][0].config, _goal(outcome.runs[labels[0]][0])
        lines = {label.removesuffix(f"@{where}"): [run.records for run in outcome.runs[label]] for label in labels}
        made.append(file.with_stem(f"{file.stem}@{where}") if where else file)
        plots.save(plots.accuracy(lines, config.target, config.network.bill, goal=goal), made[-1])
    return made


def save(table: Sequence[Row], source: str, command: str, file: Path) -> None:
    """Saves the rows as JSON with their origin: the sweep's own text, the command, commit, versions and machine."""
    made_by = {"command": command, **provenance.made_by(), "sweep": source}
    file.write_text(json.dumps(made_by | {"rows": [row.to_json() for row in table]}, indent=1) + "\n", encoding="utf-8")
