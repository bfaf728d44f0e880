"""Several runs of one comparison, one after another: `base` settings, `runs` of overrides, `seeds`, and `tune`.

`tune` names settings and the values to try. Every run gets the values that do best for it on held-out training
samples, on a seed of its own: the same effort for each scheme, and the test set chooses nothing. `tuning` has settings
of those trials alone, such as `rounds=60`. Where a run diverges with them in spite of that, the next best take their
place for all its seeds.

`populations` names settings, such as those of the clients' links, that every run is repeated under: eden-1 becomes
eden-1@mixed and eden-1@thin. Where they move only the clock of a scheme that ignores time, it trains once. `targets`
are accuracies that the table tells the time to, beside `target_accuracy`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlq_ray import reclock, rundir
from fedlq_ray.config import Config, digest, parse
from fedlq_ray.errors import ConfigError, DivergedError, FedLQError
from fedlq_ray.tracking import now_ms

KEYS = ("base", "tune", "tuning", "runs", "populations", "seeds", "targets")


@dataclass(frozen=True)
class Comparison:
    """What a sweep runs, checked.

    Attributes:
        runs: a configuration for each seed, by run's name.
        tuning: what is tried for each run, by the settings that are tried (`train.lr=0.1`); empty without `tune`.
    """

    name: str
    runs: dict[str, list[Config]]
    tuning: dict[str, dict[str, Config]]
    targets: tuple[float, ...] = ()


class Finished(NamedTuple):
    """One run: its settings, its records, its summary, None where it failed, and its folder."""

    config: Config
    records: list[dict[str, Any]]
    summary: dict[str, Any] | None
    folder: Path
    diverged: bool = False


@dataclass(frozen=True)
class Outcome:
    """Runs to compare: by name, a seed each; for each name the settings that tuning chose."""

    runs: dict[str, list[Finished]]
    tuned: dict[str, str] = field(default_factory=dict)
    targets: tuple[float, ...] = ()

    @property
    def failed(self) -> int:
        """Runs without a summary."""
        return sum(run.summary is None for runs in self.runs.values() for run in runs)


Start = Callable[[Config, str], Any]


def load(path: str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Comparison:
    """Read and check a sweep: all its configurations, before any of them runs.

    Args:
        only: the runs to keep, by name; none: all.
    Raises:
        ConfigError: the file or one of its configurations is wrong.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file") from exc
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as exc:
        raise ConfigError(f"{path}: {' '.join(str(exc).split())}") from exc
    if not isinstance(tree, Mapping) or set(tree) - set(KEYS) or not isinstance(tree.get("runs"), dict):
        raise ConfigError(f"{path}: a sweep has {', '.join(KEYS)}; runs is needed: a name and a list of key=value each")
    tune = tree.get("tune") or {}
    if not isinstance(tune, dict) or not all(isinstance(values, list) and values for values in tune.values()):
        raise ConfigError(f"{path}: tune is a list of values for each setting, such as train.lr: [0.03, 0.1]")
    tuning_alone = [str(setting) for setting in tree.get("tuning") or []]
    populations, targets = tree.get("populations") or {}, tree.get("targets") or []
    if not isinstance(populations, dict) or not all(isinstance(s, list | None) for s in populations.values()):
        raise ConfigError(f"{path}: populations are a name and a list of key=value each")
    if not isinstance(targets, list) or not all(isinstance(t, float | int) and 0 < t <= 1 for t in targets):
        raise ConfigError(f"{path}: targets are accuracies, such as [0.8, 0.85]")
    base = tree.get("base") or {}
    name = str(base.get("name", Path(path).stem))
    seeds = tree.get("seeds") or [0]

    def config(label: str, *settings: str) -> Config:
        own_name = f"{name}-{label}".replace("@", "-")
        return _with(base, [f"name={own_name}", *settings, *overrides], f"{path}, run {label}")

    missing = sorted(set(only) - {str(label) for label in tree["runs"]})
    if missing:
        raise ConfigError(f"{path}: has no run {', '.join(missing)}; it has {', '.join(map(str, tree['runs']))}")
    chosen = {label: own for label, own in tree["runs"].items() if not only or str(label) in only}
    runs, tuning = {}, {}
    for label, own in _multiplied(chosen, populations).items():
        runs[label] = [config(label, *own, f"seed={seed}") for seed in seeds]
        tries = [[f"{key}={value}" for value in values] for key, values in tune.items()]
        apart = [*tuning_alone, f"seed={max(seeds) + 1}", "evaluate_on=holdout"]
        tuning[label] = (
            {" ".join(tried): config(label, *own, *tried, *apart) for tried in itertools.product(*tries)}
            if tune
            else {}
        )
    stops = [c.target_accuracy for configs in runs.values() for c in configs if c.stop_at_target and c.target_accuracy]
    if stops and targets and max(targets) > min(stops):
        raise ConfigError(f"{path}: targets are beyond target_accuracy={min(stops):g}, where stop_at_target ends runs")
    return Comparison(name, runs, tuning, tuple(float(target) for target in targets))


def _multiplied(runs: Mapping[Any, Any], populations: Mapping[Any, Any]) -> dict[str, list[str]]:
    """The settings of each run under each population, those of a run one after another."""
    own = {str(label): [str(change) for change in changes or []] for label, changes in runs.items()}
    if not populations:
        return own
    return {
        f"{label}@{name}": [*changes, *(str(change) for change in common or [])]
        for label, changes in own.items()
        for name, common in populations.items()
    }


def _with(base: Mapping[str, Any], settings: Sequence[str], source: str) -> Config:
    """`base` with key=value settings, of which a later one wins."""
    tree = OmegaConf.merge(OmegaConf.create(dict(base)), OmegaConf.from_dotlist(list(settings)))
    return parse(OmegaConf.to_container(tree, resolve=True), source=source)


def run(comparison: Comparison, out: Path, start: Start, tell: Callable[[str], None]) -> Outcome:
    """Tune, then run what is not finished in `out` yet; a run that fails is told, and the others go on.

    Args:
        start: called with a configuration and the name of the MLflow parent; runs it, with nothing but what it says,
            or goes on with it where its folder holds an unfinished run.
        tell: called with a line about what failed, and about what tuning chose.
    """
    parent = f"{out.resolve()}/{comparison.name}"
    finished = reclock.sources(out)
    results: dict[str, list[Finished]] = {}
    tuned: dict[str, str] = {}
    for label, configs in comparison.runs.items():
        tried = {
            settings: _once(config, out / "tune" / label / settings, start, parent, tell, finished)
            for settings, config in comparison.tuning[label].items()
        }
        usable = [settings for settings, run in tried.items() if run.summary] or list(tried)[:1] or [""]
        for settings in sorted(usable, key=lambda settings: _merit(tried[settings]) if tried else (), reverse=True):
            if settings:
                tuned[label] = settings
                tell(f"{label}: {settings} did best on held-out training samples")
            usable.remove(settings)
            aside = out / "diverged" / label / settings
            if usable and aside.exists():
                continue
            chosen = [_with(config.model_dump(mode="json"), settings.split(), label) for config in configs]
            results[label] = [_once(c, out / f"{label}-{c.seed}", start, parent, tell, finished) for c in chosen]
            if not usable or not any(run.diverged for run in results[label]):
                break
            aside.mkdir(parents=True)
            for config in chosen:
                (out / f"{label}-{config.seed}").rename(aside / f"{label}-{config.seed}")
            finished = reclock.sources(out)
    return Outcome(results, tuned, comparison.targets)


def _once(
    config: Config, folder: Path, start: Start, parent: str, tell: Callable[[str], None], finished: dict[str, Path]
) -> Finished:
    """A run's result: from its folder where it is finished, or from that of one that only the clock sets apart."""
    source = finished.get(reclock.key(config)) if reclock.reclockable(config) else None
    if (folder / "config.yaml").exists():
        found = rundir.read(folder)
        if digest(found.config) != digest(config):
            raise ConfigError(f"{folder}: holds a run with other settings; give another --out, or remove it")
        if found.summary:
            return Finished(config, found.records, found.summary, folder)
    if folder.exists() and (source or not (folder / "config.yaml").exists()):  # cut short, and nothing to go on from
        folder.rename(folder.with_name(f"{folder.name}.unfinished-{now_ms()}"))
    here, diverged = config.model_copy(update={"out": str(folder)}), False
    try:
        if source:
            reclock.write(here, source, parent)
            tell(f"{folder}: trains as {source} did, so that its bytes are only clocked anew")
        else:
            start(here, parent)
    except ConfigError:
        raise
    except FedLQError as exc:
        tell(f"{folder}: failed: {exc}")
        diverged = isinstance(exc, DivergedError)
    found = rundir.read(folder)
    if found.summary:
        finished.setdefault(reclock.key(config), folder)
    return Finished(config, found.records, found.summary, folder, diverged)


def _merit(run: Finished) -> tuple[float, ...]:
    """What tuning looks for: reached the target, soonest; without one, or missing it, the accuracy at the end.

    A single evaluation may be 2 points off where clients differ much: the end is the last five.
    """
    if run.summary is None:
        return (-1.0,)
    accuracy = fmean([r["accuracy"] for r in run.records if r["accuracy"] is not None][-5:])
    reached = run.summary["time_to_target_s"]
    return (1.0, -reached, accuracy) if reached is not None else (0.0, 0.0, accuracy)
