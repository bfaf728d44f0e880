"""A run's folder: config.yaml first, rounds.jsonl round by round, the rest at the end, complete or absent."""

import csv
import hashlib
import io
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save

from fedlq_ray.config.load import Config, digest, load_run, to_yaml
from fedlq_ray.data.partition import label_counts
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.profiles import Profile
from fedlq_ray.federation.record import Record
from fedlq_ray.federation.task import Task
from fedlq_ray.files import expand, locked, make_folder, write_durably
from fedlq_ray.models import FlatModel
from fedlq_ray.problems import Goal
from fedlq_ray.runs import provenance
from fedlq_ray.tracking import stores
from fedlq_ray.tracking.log import Tracking, now_ms

PROFILE_COLUMNS = [field.name for field in fields(Profile)]


def create(config: Config) -> Path:
    """Creates a folder with config.yaml. It may exist if a process was killed while writing that file there.

    Raises:
        ConfigError: `out` already holds a run or other files, or cannot be created.
    """
    settings = to_yaml(config)
    try:
        if config.out is not None:
            folder = Path(expand(config.out, "out"))
            if (folder / "summary.json").exists():
                raise ConfigError(f"out: {folder} holds a finished run; name another, or remove it")
            if folder.exists() and not (folder / "config.yaml").exists() and not _is_empty(folder):
                raise ConfigError(f"out: {folder} is there already; name another, or remove it")
            make_folder(folder, exist_ok=True)
        else:
            stem, number = f"runs/{config.name}-{config.seed}", 1
            while True:
                folder = Path(stem if number == 1 else f"{stem}-{number}")
                try:
                    make_folder(folder)
                    break
                except FileExistsError:
                    number += 1
        with locked(folder):
            if (folder / "config.yaml").exists():
                raise ConfigError(f"out: {folder} holds an unfinished run; resume it: fedlq resume {folder}")
            write_durably(folder / "config.yaml", settings)
    except OSError as exc:
        raise ConfigError(f"out: {folder}: {exc.strerror}") from exc
    return folder


def _is_empty(folder: Path) -> bool:
    """Whether a folder is empty, apart from a lock and partly written files."""
    return folder.is_dir() and all(f.name == ".lock" or f.match(".*.part") for f in folder.iterdir())


def describe_clients(folder: Path, task: Task) -> None:
    """Writes clients.csv, with one row per client: its profile, its samples, its samples per label if samples have
    labels, and its name if the data names clients."""
    strata = task.problem.strata(task.data.y_train)
    labels = [] if strata is None else [f"label_{label}" for label in range(task.data.num_classes)]
    counts = np.zeros((len(task.shards), 0), np.int64)
    if strata is not None:
        counts = label_counts(strata, task.shards, task.data.num_classes)
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(["client", *PROFILE_COLUMNS, "samples", "held_out", *labels, *(["name"] if task.names else [])])
    for client, (profile, shard, held) in enumerate(zip(task.profiles, task.shards, task.held, strict=True)):
        name = [task.names[client]] if task.names else []
        table.writerow([client, *astuple(profile), len(shard), len(held), *counts[client].tolist(), *name])
    write_durably(folder / "clients.csv", file.getvalue())


def describe_test_clients(folder: Path, task: Task, of_clients: Mapping[str, float]) -> None:
    """Writes test_clients.csv, with one row per client of the test samples: its id, its samples, and the main metric of
    the final model on them. Writes nothing if test samples have no clients."""
    if task.test_clients is None or not of_clients:
        return
    names, counts = np.unique(task.test_clients, return_counts=True)
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(["client", "samples", task.problem.goal.metric])
    table.writerows([str(name), int(count), of_clients[str(name)]] for name, count in zip(names, counts, strict=True))
    write_durably(folder / "test_clients.csv", file.getvalue())


def require_trackable(config: Config, before: "Run | None" = None) -> None:
    """Requires that a run can be tracked.

    Args:
        before: the run that resumes. With the same settings, its tracking stays where it was.
    Raises:
        ConfigError: the run's tracking settings cannot be used.
    """
    if before and before.tracking and before.config.tracking == config.tracking:
        stores.require_usable(before.tracking.uri, before.tracking.experiment)
    else:
        stores.require(config.tracking)


def track(folder: Path, task: Task, parent: str | None, tags: Mapping[str, str] | None = None) -> Tracking | None:
    """Where this run is tracked, stored in tracking.json; None if tracking is off."""
    settings = task.config.tracking
    if settings.uri is None:
        return None
    made_by = {**provenance.tags(), **(tags or {})}
    key, started_ms = uuid.uuid4().hex, now_ms()
    tracking = Tracking(settings.uri, settings.experiment, key, started_ms, parent, made_by, _dataset(task))
    return note(folder, tracking)


def track_again(folder: Path, task: Task, before: "Run", parent: str | None) -> Tracking | None:
    """Like `track`, for a resumed run: it keeps its place, or moves with its settings, as the same tracked run."""
    settings = task.config.tracking
    if before.tracking is None or settings.uri is None:
        return track(folder, task, parent)
    if settings == before.config.tracking:
        return before.tracking
    return note(folder, replace(before.tracking, uri=settings.uri, experiment=settings.experiment))


def note(folder: Path, tracking: Tracking) -> Tracking:
    """Stores where a run is tracked in tracking.json, with the address as a user writes it; returns it absolute."""
    noted = asdict(tracking) | {"uri": stores.kept(tracking.uri, folder)}
    write_durably(folder / "tracking.json", json.dumps(noted, indent=1))
    return replace(tracking, uri=stores.absolute(tracking.uri))


def move(folder: Path, to: Path) -> None:
    """Renames a run's folder and updates the path to its store."""
    folder.rename(to)
    if (file := to / "tracking.json").exists():
        noted = json.loads(file.read_text(encoding="utf-8"))
        noted["uri"] = stores.kept(noted["uri"], to, folder)
        write_durably(file, json.dumps(noted, indent=1))


def redirect(folder: Path, uri: str | None, experiment: str | None) -> None:
    """Changes the store or experiment in a run's tracking.json; None keeps the present value."""
    changed = {"uri": stores.kept(uri, folder) if uri else None, "experiment": experiment}
    noted = json.loads((folder / "tracking.json").read_text(encoding="utf-8"))
    noted |= {name: value for name, value in changed.items() if value}
    write_durably(folder / "tracking.json", json.dumps(noted, indent=1))


def _dataset(task: Task) -> dict[str, str]:
    """The data as MLflow describes a run's input."""
    data, config = task.data, task.config.data
    profile = {
        "num_train": len(data.y_train),
        "num_test": len(data.y_test),
        "num_classes": data.num_classes,
        "input_shape": list(data.input_shape),
        "partition": config.partition,
    }
    if data.vocabulary:
        shape = task.problem.output_shape(data.y_train[:1], data.num_classes)[1:]
        profile |= {"vocabulary": data.vocabulary, "output_shape": list(shape)}
    return {
        "name": data.name,
        "digest": task.data_digest,
        "source_type": "local",
        "source": config.path or data.name,
        "profile": json.dumps(profile),
    }


def sha256(weights: NDArray[np.float32]) -> str:
    """SHA-256 of the final weights, in hex."""
    return hashlib.sha256(weights.astype("<f4").tobytes()).hexdigest()


def summarise(
    config: Config, records: list[Record], weights_sha256: str, goal: Goal = Goal(), under_way: int = 0
) -> dict[str, Any]:
    """The summary of a completed run; bytes and times count from the first round.

    Args:
        goal: what the main metric is, if it is not accuracy.
        under_way: clients whose flights had not ended.
    """
    values = [r.main for r in records if r.main is not None]
    reached = next((r for r in records if goal.reaches(r.main, config.target)), None)
    return {
        f"final_{goal.metric}": values[-1] if values else None,
        f"best_{goal.metric}": goal.best(values),
        "sim_time_s": records[-1].sim_time_s,
        "uplink_bytes": sum(r.uplink_bytes for r in records),
        "downlink_bytes": sum(r.downlink_bytes for r in records),
        "time_to_target_s": reached.sim_time_s if reached else None,
        "uplink_bytes_to_target": sum(r.uplink_bytes for r in records if r.round <= reached.round) if reached else None,
        "rounds": len(records),
        "weights_sha256": weights_sha256,
        "config_sha256": digest(config),
        "bill": config.network.bill,
        **({} if goal == Goal() else {"goal": asdict(goal)}),
        **({} if config.synchronous else {"wasted_bytes": sum(r.wasted_bytes or 0 for r in records)}),
        **({} if config.synchronous else {"under_way": under_way}),
    }


def save_model(folder: Path, model: FlatModel) -> None:
    """model.safetensors: an ordinary state_dict."""
    write_durably(folder / "model.safetensors", save(model.state_dict()))


def _lines(folder: Path) -> list[bytes]:
    file = folder / "rounds.jsonl"
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def rounds(folder: Path) -> int:
    """The number of rounds in rounds.jsonl, without parsing them."""
    return len(_lines(folder))


def checksum(folder: Path, rounds: int) -> str:
    """SHA-256 (hex) of the first `rounds` lines of rounds.jsonl."""
    return hashlib.sha256(b"".join(line + b"\n" for line in _lines(folder)[:rounds])).hexdigest()


def journal(folder: Path, start: int = 0) -> list[Record]:
    """The complete records of rounds.jsonl. A record is incomplete if its process was killed while writing it.

    Args:
        start: first round to read; earlier ones are not checked.
    """
    records: list[Record] = []
    for number, line in enumerate(_lines(folder)[start:], start):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or record.get("round") != number:
            break
        records.append(Record.from_json(record))
    return records


class Journal:
    """Writes rounds.jsonl, one line per round."""

    def __init__(self, folder: Path, rounds: int) -> None:
        """Keeps the first `rounds` lines unchanged and drops the others."""
        self.file = folder / "rounds.jsonl"
        lines = b"".join(line + b"\n" for line in _lines(folder)[:rounds])
        write_durably(self.file, lines)
        self._sum = hashlib.sha256(lines)

    def __enter__(self) -> "Journal":
        self._stream = self.file.open("a", encoding="utf-8")
        return self

    def __exit__(self, *exc: object) -> None:
        with self._stream:
            self.sync()

    def write(self, record: Record) -> None:
        line = _line(record)
        self._put(line)
        self._sum.update(line.encode())

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def checksum(self) -> str:
        """The `checksum` of all lines so far."""
        return self._sum.hexdigest()

    def sync(self) -> None:
        """Returns when everything written is on the disk."""
        os.fsync(self._stream.fileno())


def _line(record: Record) -> str:
    return json.dumps(record.to_json(), allow_nan=False) + "\n"


class Run(NamedTuple):
    """The contents of a run's folder: summary is None if it did not finish, tracking is None if it was off."""

    config: Config
    records: list[Record]
    summary: dict[str, Any] | None
    tracking: Tracking | None
    status: str


def settings(folder: str | Path) -> Path:
    """The configuration file of a run's folder.

    Raises:
        ConfigError: the folder holds no run.
    """
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder}: holds no run (no config.yaml); fedlq run ... out={folder} begins one")
    return file


def read(folder: str | Path) -> Run:
    """Reads a run from its folder; `status` is MLflow's status for how it ended.

    Raises:
        ConfigError: the folder holds no run.
    """
    folder, file = Path(folder), settings(folder)

    def parsed(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else None

    try:
        summary, tracking, timing = parsed("summary.json"), parsed("tracking.json"), parsed("timing.json")
        records = journal(folder)
        if summary and summary["rounds"] != len(records):
            raise ValueError(f"rounds.jsonl has {len(records)} whole rounds of {summary['rounds']}")
        return Run(
            load_run(file),
            records,
            summary,
            Tracking(**tracking | {"uri": stores.absolute(tracking["uri"], folder)}) if tracking else None,
            # A run that was killed at once could not write its status.
            "FINISHED" if summary else (timing or {}).get("status", "FAILED"),
        )
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise ConfigError(f"{folder}: is damaged: {exc}") from exc
