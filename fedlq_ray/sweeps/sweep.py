"""Several runs of one comparison: `base` settings, `runs` of overrides, `seeds`, and `tune`.

`tune` names settings and the values to try. Every run gets the values that do best for it on held-out training
samples, with a separate seed. So each scheme gets the same effort, and the test set chooses nothing. `tuning` has
settings for these trials only, such as `rounds=60`. If a run still diverges with the best values, the next best replace
them for all its seeds.

`populations` names groups of settings, such as those of the clients' links. Every run is repeated under each: eden-1
becomes eden-1@mixed and eden-1@thin. If they change only the clock of a scheme that ignores time, it trains once.
`targets` are accuracies whose time the table reports, in addition to `target`.
"""

import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from fedlq_ray.config.load import UNREADABLE, Config, digest, merge, plain, read, unreadable
from fedlq_ray.errors import ConfigError, DivergedError, FedLQError
from fedlq_ray.federation.record import Record
from fedlq_ray.files import expand
from fedlq_ray.problems import goal_of
from fedlq_ray.runs import rundir, storage
from fedlq_ray.sweeps import reclock
from fedlq_ray.tracking import stores
from fedlq_ray.tracking.log import now_ms

KEYS = ("base", "tune", "tuning", "runs", "populations", "seeds", "targets")


@dataclass(frozen=True)
class Comparison:
    """The checked contents of a sweep.

    Attributes:
        runs: one configuration per seed, by run name.
        tuning: the trials of each run, by the settings tried (`train.lr=0.1`); empty without `tune`.
    """

    name: str
    runs: dict[str, list[Config]]
    tuning: dict[str, dict[str, Config]]
    tries: dict[str, list[str]]
    targets: tuple[float, ...] = ()


class Finished(NamedTuple):
    """One run: its settings, records, summary (None if it failed) and folder."""

    config: Config
    records: list[Record]
    summary: dict[str, Any] | None
    folder: Path
    diverged: bool = False


@dataclass(frozen=True)
class Outcome:
    """Runs to compare, by name, one per seed; and the settings that tuning chose for each name."""

    runs: dict[str, list[Finished]]
    tuned: dict[str, str] = field(default_factory=dict)
    targets: tuple[float, ...] = ()

    @property
    def failed(self) -> int:
        """Runs without a summary."""
        return sum(run.summary is None for runs in self.runs.values() for run in runs)


Start = Callable[[Sequence[Config], str], Iterable[tuple[Config, FedLQError | None]]]


def load(path: str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Comparison:
    """Reads a sweep's file and checks all its configurations before any of them runs; arguments as for `check`.

    Raises:
        ConfigError: the file or one of its configurations is wrong.
    """
    try:
        tree = plain(OmegaConf.create(read(path, under="base", named=("runs", "populations"))))
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file") from exc
    except UNREADABLE as exc:
        raise unreadable(path, exc) from exc
    return check(tree, str(path), overrides, only)


def check(tree: Any, path: str, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Comparison:
    """Check a sweep: all its configurations, before any of them runs.

    Args:
        tree: the keys of a sweep's file.
        path: where they come from, for messages; its stem is the default name.
        only: the names of the runs to keep, RUN or RUN@POPULATION; none: all.
    Raises:
        ConfigError: a key or one of the configurations is wrong.
    """
    if (
        not isinstance(tree, Mapping)
        or set(tree) - set(KEYS)
        or not isinstance(tree.get("runs"), dict)
        or not tree["runs"]
    ):
        raise ConfigError(f"{path}: a sweep has {', '.join(KEYS)}; runs is required: a list of key=value for each name")
    tune = tree.get("tune") or {}
    lists = {key: tree.get(key) or [] for key in ("seeds", "tuning")}
    if not all(isinstance(found, list) for found in lists.values()):
        raise ConfigError(f"{path}: seeds and tuning are lists, such as seeds: [0, 1, 2]")
    if not all(type(seed) is int and seed >= 0 for seed in lists["seeds"]):
        raise ConfigError(f"{path}: seeds are whole numbers from 0, such as [0, 1, 2]")
    if not isinstance(tree.get("base") or {}, dict):
        raise ConfigError(f"{path}: base holds settings by name, such as base: {{rounds: 50}}")
    if not all(isinstance(changes, list | None) for changes in tree["runs"].values()):
        raise ConfigError(f"{path}: each of runs is a list of key=value, such as fedlq: [strategy.name=fedlq]")
    if not isinstance(tune, dict) or not all(isinstance(values, list) and values for values in tune.values()):
        raise ConfigError(f"{path}: tune is a list of values for each setting, such as train.lr: [0.03, 0.1]")
    tuning_alone = [str(setting) for setting in lists["tuning"]]
    populations, targets = tree.get("populations") or {}, tree.get("targets") or []
    if not isinstance(populations, dict) or not all(isinstance(s, list | None) for s in populations.values()):
        raise ConfigError(f"{path}: populations are a list of key=value for each name")
    if not isinstance(targets, list) or not all(isinstance(t, float | int) and 0 < t <= 1 for t in targets):
        raise ConfigError(f"{path}: targets are accuracies, such as [0.8, 0.85]")
    base = tree.get("base") or {}
    name = str(base.get("name", Path(path).stem))
    seeds = lists["seeds"] or [0]

    def config(label: str, *settings: str) -> Config:
        own_name = f"{name}-{label}".replace("@", "-")
        return _with(base, [f"name={own_name}", *settings, *overrides], f"{path}, run {label}")

    runs, tuning = {}, {}
    each = [[f"{key}={as_text(value)}" for value in values] for key, values in tune.items()]
    tries = {" ".join(tried): list(tried) for tried in itertools.product(*each)} if tune else {}
    for label, own in _chosen(tree["runs"], populations, only, path).items():
        runs[label] = [config(label, *own, f"seed={seed}") for seed in seeds]
        apart = [*tuning_alone, f"seed={max(seeds) + 1}", "evaluate_on=holdout"]
        tuning[label] = {name: config(label, *own, *tried, *apart) for name, tried in tries.items()}
    stops = [c.target for configs in runs.values() for c in configs if c.stop_at_target and c.target]
    if stops and targets and max(targets) > min(stops):
        raise ConfigError(f"{path}: targets exceed target={min(stops):g}, at which stop_at_target ends runs")
    return Comparison(name, runs, tuning, tries, tuple(float(target) for target in targets))


def _chosen(
    runs: Mapping[Any, Any], populations: Mapping[Any, Any], only: Sequence[str], path: str
) -> dict[str, list[str]]:
    """The settings of each run that `only` names, RUN or RUN@POPULATION; of all, if it names none."""
    multiplied = _multiplied(runs, populations)
    if missing := sorted(set(only) - set(map(str, runs)) - set(multiplied)):
        also = f", each with @{', @'.join(map(str, populations))}" if populations else ""
        raise ConfigError(f"{path}: has no run {', '.join(missing)}; it has {', '.join(map(str, runs))}{also}")
    return {label: own for label, own in multiplied.items() if not only or {label, label.partition("@")[0]} & set(only)}


def _multiplied(runs: Mapping[Any, Any], populations: Mapping[Any, Any]) -> dict[str, list[str]]:
    """The settings of each run under each population, grouped by run."""
    own = {str(label): [str(change) for change in changes or []] for label, changes in runs.items()}
    if not populations:
        return own
    return {
        f"{label}@{name}": [*changes, *(str(change) for change in common or [])]
        for label, changes in own.items()
        for name, common in populations.items()
    }


def as_text(value: Any) -> str:
    """A value as text for key=value."""
    return value if isinstance(value, str) else json.dumps(value)


def _with(base: Mapping[str, Any], settings: Sequence[str], source: str) -> Config:
    """`base` with key=value settings; later ones win."""
    return merge(base, settings, source=source)


def run(comparison: Comparison, out: Path, start: Start, tell: Callable[[str], None]) -> Outcome:
    """Tunes, then runs what is not finished in `out`. A run that fails is reported, and the others continue.

    Args:
        start: called with configurations and the name of the MLflow parent. It runs each configuration as given, or
            resumes it if its folder holds an unfinished run; it yields each as it ends, and why it failed.
        tell: called with a line for each failure, each choice of tuning, and variables of MLflow.
    Raises:
        ConfigError: a run's tracking settings cannot be used.
    """
    out = Path(expand(str(out), "out"))
    configs = [config for configs in comparison.runs.values() for config in configs]
    configs += [config for tries in comparison.tuning.values() for config in tries.values()]
    for config in {repr(config.tracking): config for config in configs}.values():
        stores.require(config.tracking)
        for line in stores.heard(config.tracking):
            tell(line)
    parent = _parent(comparison, out)

    def finish(wanted: Mapping[Path, Config]) -> dict[Path, Finished]:
        return _finish(wanted, out, start, parent, tell)

    trials = {
        (label, settings): (out / "tune" / label / settings, config)
        for label, tries in comparison.tuning.items()
        for settings, config in tries.items()
    }
    tried = finish(dict(trials.values()))
    left = {
        label: _best_first({s: tried[trials[label, s][0]] for s in comparison.tuning[label]})
        for label in comparison.runs
    }
    results: dict[str, list[Finished]] = {}
    tuned: dict[str, str] = {}
    while left:
        wanted: dict[str, dict[Path, Config]] = {}
        for label, usable in left.items():
            while len(usable) > 1 and (out / "diverged" / label / usable[0]).exists():
                usable.pop(0)
            if usable[0]:
                tuned[label] = usable[0]
                tell(f"{label}: {usable[0]} did best on held-out training samples")
            wanted[label] = {
                out / f"{label}-{c.seed}": _with(c.model_dump(mode="json"), comparison.tries.get(usable[0], []), label)
                for c in comparison.runs[label]
            }
        done = finish({folder: config for own in wanted.values() for folder, config in own.items()})
        for label, own in wanted.items():
            results[label] = [done[folder] for folder in own]
            settings = left[label].pop(0)
            if not left[label] or not any(run.diverged for run in results[label]):
                del left[label]
                continue
            aside = out / "diverged" / label / settings
            aside.mkdir(parents=True)
            for folder in own:
                if folder.exists():
                    rundir.move(folder, aside / folder.name)
    return Outcome({label: results[label] for label in comparison.runs}, tuned, comparison.targets)


def _parent(comparison: Comparison, out: Path) -> str:
    """The MLflow parent of the sweep's runs: that of the runs already in `out`, else a new one."""
    folders = [out / f"{label}-{config.seed}" for label, configs in comparison.runs.items() for config in configs]
    folders += [out / "tune" / label / tried for label, tries in comparison.tuning.items() for tried in tries]
    for file in (folder / "tracking.json" for folder in folders):
        with suppress(OSError, ValueError, LookupError, TypeError):  # missing or damaged
            found = json.loads(file.read_text(encoding="utf-8"))["parent"]
            if isinstance(found, str):
                return found
    return f"{uuid.uuid4().hex}/{comparison.name}"


def _best_first(tried: Mapping[str, Finished]) -> list[str]:
    """Settings whose trial finished, best first. Without tuning: one empty entry, which changes nothing."""
    usable = [settings for settings, run in tried.items() if run.summary] or list(tried)[:1] or [""]
    return sorted(usable, key=lambda settings: _merit(tried[settings]) if tried else (), reverse=True)


def _finish(
    wanted: Mapping[Path, Config], out: Path, start: Start, parent: str, tell: Callable[[str], None]
) -> dict[Path, Finished]:
    """The runs' results by folder; finished runs are only read.

    Of runs that differ only in their clock, one trains, and the others are reclocked from it.
    """
    diverged: set[Path] = set()
    left = dict(wanted)
    while left:
        finished = reclock.sources(out)
        now: dict[str, Path] = {}
        for folder, config in list(left.items()):
            key = reclock.key(config) if reclock.reclockable(config) else str(folder)
            if _is_finished(folder, config):
                del left[folder]
            elif key in finished:
                _make_way(folder)
                reclock.write(config.model_copy(update={"out": str(folder)}), finished[key], parent)
                tell(f"{folder}: trains like {finished[key]}, so only its times are recomputed")
                del left[folder]
            else:
                now.setdefault(key, folder)
        for folder in now.values():
            if not (folder / "config.yaml").exists():
                _make_way(folder)
        started = [left.pop(folder).model_copy(update={"out": str(folder)}) for folder in now.values()]
        for config, failure in start(started, parent):
            if failure:
                tell(f"{config.out}: failed: {failure}")
                if isinstance(failure, DivergedError):
                    diverged.add(Path(str(config.out)))
    # A run may fail before its folder exists.
    found = {folder: rundir.read(folder) for folder in wanted if (folder / "config.yaml").exists()}
    return {
        folder: Finished(config, found[folder].records, found[folder].summary, folder, folder in diverged)
        if folder in found
        else Finished(config, [], None, folder, folder in diverged)
        for folder, config in wanted.items()
    }


def _is_finished(folder: Path, config: Config) -> bool:
    if not (folder / "config.yaml").exists():
        return False
    found = rundir.read(folder)
    if digest(found.config) != digest(config):
        raise ConfigError(f"{folder}: holds a run with other settings; give another --out, or remove it")
    if found.summary:
        storage.clear(folder, found.config)  # if the run was killed before it did so
    return found.summary is not None


def _make_way(folder: Path) -> None:
    """Moves aside an unfinished folder that nothing can resume from."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.unfinished-{now_ms()}"))


def _merit(run: Finished) -> tuple[float, ...]:
    """The objective of tuning: to reach the target soonest, or else the best final value of the main metric.

    A single evaluation may be 2 points off if clients differ much, so the final value is a mean of the last five.
    """
    if run.summary is None:
        return (-1.0,)
    goal = goal_of(run.config.problem, run.summary)
    final = goal.merit(fmean([r.main for r in run.records if r.main is not None][-5:]))
    reached = run.summary["time_to_target_s"]
    return (1.0, -reached, final) if reached is not None else (0.0, 0.0, final)
