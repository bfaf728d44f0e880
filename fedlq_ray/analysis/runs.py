"""Finds runs to compare: in their folders, a folder of runs, or MLflow. Runs that differ only in seed form one row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedlq_ray.config.load import WITHOUT_EFFECT, digest, flat
from fedlq_ray.errors import ConfigError
from fedlq_ray.runs import rundir
from fedlq_ray.sweeps.sweep import Finished, Outcome
from fedlq_ray.tracking import log as tracking

# If runs differ in one of these, a table compares more than their schemes.
_COMMON = ("data.", "model.", "clients.", "network.bill", "rounds", "evaluate_on", "target")


def find(sources: Sequence[str], uri: str | None, scratch: Path) -> Outcome:
    """Returns the runs that `sources` name, by label.

    Args:
        sources: folders of runs, or folders that contain them; with `uri`, also MLflow's run ids or an experiment's
            name.
        uri: MLflow's tracking store or server.
        scratch: a folder for downloads from MLflow.
    Raises:
        ConfigError: a source does not exist or holds no run, or two runs have equal settings but different results.
    """
    folders: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            folders += _in(path)
        elif uri is None:
            raise ConfigError(f"{source}: no such folder; for a run id or an experiment of MLflow, give --tracking-uri")
        else:
            folders += tracking.fetch(uri, source, scratch)
    read = [(folder, rundir.read(folder)) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    return Outcome(_labelled([Finished(run.config, run.records, run.summary, folder) for folder, run in read]))


def _in(folder: Path) -> list[Path]:
    """Returns the folder if it is a run, else the runs in it, except those that a sweep set aside."""
    if (folder / "config.yaml").is_file():
        return [folder]
    found = sorted(f.parent for f in folder.glob("*/config.yaml") if ".unfinished-" not in f.parent.name)
    if not found:
        raise ConfigError(f"{folder}: holds no run (no config.yaml in it, nor in its folders)")
    return found


def _labelled(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    groups: dict[str, dict[int, Finished]] = {}
    for run in runs:
        seeds = groups.setdefault(digest(run.config, without=["seed"]), {})
        other = seeds.setdefault(run.config.seed, run)
        if other.summary and run.summary and other.summary["weights_sha256"] != run.summary["weights_sha256"]:
            raise ConfigError(
                f"{other.folder} and {run.folder} have the same settings and seed, but different results: their models "
                "or data were given as objects, or their versions differ; compare only one of them"
            )
        if run.summary and not other.summary:
            seeds[run.config.seed] = run
    kept = [[seeds[seed] for seed in sorted(seeds)] for seeds in groups.values()]
    labels = next(made for make in _NAMES if (made := _distinct(kept, make)))
    return dict(zip(labels, kept, strict=True))


def _distinct(groups: Sequence[Sequence[Finished]], make: Callable[[Finished, Any], str | None]) -> list[str] | None:
    """Returns one label per group, if `make` gives each group a single label and no two groups share one; else None."""
    told = [flat(runs[0].config) for runs in groups]
    paths = dict.fromkeys(path for one in told for path in one)
    differing = [p for p in paths if _matters(p) and len({str(one[p]) for one in told if p in one}) > 1]
    made = [{make(run, differing) for run in runs} for runs in groups]
    labels = [label for names in made for label in names if label]
    return labels if len(labels) == len(set(labels)) == len(groups) and all(len(m) == 1 for m in made) else None


def _by_folder(run: Finished, differing: Sequence[str]) -> str | None:
    """The name that a sweep gives a run: its folder's name without the seed."""
    name, seed = run.folder.name, f"-{run.config.seed}"
    return name.removesuffix(seed) if name.endswith(seed) and name != run.config.name + seed else None


def _by_name(run: Finished, differing: Sequence[str]) -> str | None:
    return run.config.name


def _by_settings(run: Finished, differing: Sequence[str]) -> str | None:
    """The strategy, and the other settings that differ between the groups."""
    settings = flat(run.config)
    return " ".join(
        [run.config.strategy.name]
        + [f"{path}={settings[path]}" for path in differing if path != "strategy.name" and path in settings]
    )


_NAMES = (_by_folder, _by_name, _by_settings)


def _matters(path: str) -> bool:
    return path != "seed" and path not in WITHOUT_EFFECT


def population(label: str) -> str:
    """Returns the population in a run's label, such as thin in eden-1@thin; "" if there is none."""
    return label.rpartition("@")[2] if "@" in label else ""


def by_population(labels: Iterable[str]) -> dict[str, list[str]]:
    """Groups labels by population, in their order."""
    found: dict[str, list[str]] = {}
    for label in labels:
        found.setdefault(population(label), []).append(label)
    return found


def unlike(outcome: Outcome) -> dict[str, list[str]]:
    """Returns the values of settings that are not part of a scheme but differ between runs of a population."""
    found: dict[str, list[str]] = {}
    for labels in by_population(outcome.runs).values():
        told = [flat(outcome.runs[label][0].config) for label in labels]
        for path in filter(lambda path: path.startswith(_COMMON) and _matters(path), told[0]):
            values = list(dict.fromkeys(str(one[path]) for one in told))
            if len(values) > 1:
                found[path] = values
    return found


def parameters(runs: Sequence[Finished]) -> int | None:
    """Number of parameters (and float buffers) of the runs' model; None if no run has saved it."""
    for run in runs:
        if (run.folder / "model.safetensors").exists():
            return sum(_sizes(run.folder / "model.safetensors"))
    return None


def _sizes(file: Path) -> Iterator[int]:
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118, not a mapping
            piece, size = tensors.get_slice(name), 1
            for length in piece.get_shape():
                size *= length
            if piece.get_dtype().startswith(("F", "BF")):
                yield size
