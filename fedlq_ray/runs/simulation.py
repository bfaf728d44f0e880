"""From a Config to an Outcome: connects the parts and has no logic of its own."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedlq_ray.config.load import Config, digest, load_run, parse, to_yaml
from fedlq_ray.config.parts import require_picklable
from fedlq_ray.errors import ConfigError, FedLQError
from fedlq_ray.federation.cohorts import require_deadline
from fedlq_ray.federation.events import Ended, Event, Hosting, Prepared, Restarted, Resumed, RoundDone, Warned
from fedlq_ray.federation.record import Record
from fedlq_ray.federation.selections import selection_of
from fedlq_ray.federation.task import Parts, Task, Worker, prepare
from fedlq_ray.files import expand, locked, write_durably
from fedlq_ray.hosts.ray import session
from fedlq_ray.runs import provenance, rundir, storage, supervise
from fedlq_ray.runs.ceiling import ceiling
from fedlq_ray.runs.identity import identity, require_same
from fedlq_ray.runs.interrupts import Interrupts
from fedlq_ray.strategies import GivenStrategy, make
from fedlq_ray.strategies.budgets import require_rate
from fedlq_ray.tracking import log as tracking
from fedlq_ray.tracking import stores
from fedlq_ray.training.device import emulates_bfloat16, reproducible, require_gpu


class Outcome(NamedTuple):
    """A run's result: records, summary.json's contents, the final flat vector (d,) float32, and the run's folder."""

    records: list[Record]
    summary: dict[str, Any]
    weights: NDArray[np.float32]
    path: Path


def simulate(
    config: Config | Mapping[str, Any] | None = None,
    parts: Parts = Parts(),
    *,
    watch: Callable[[Event], None] | None = None,
    parent: str | None = None,
) -> Outcome:
    """See `fedlq_ray.simulate`."""
    config = config if isinstance(config, Config) else parse({} if config is None else config)
    if config.clients.hosting != "serial":
        session.anticipate()
    rundir.require_trackable(config)
    task = checked(config, parts)
    folder = rundir.create(config)
    with locked(folder), _told(folder):
        rundir.describe_clients(folder, task)
        track = rundir.track(folder, task, parent)
        return _carry_out(task, parts.strategy, folder, track, watch)


def resume(
    folder: str | Path,
    overrides: Sequence[str] = (),
    parts: Parts = Parts(),
    *,
    watch: Callable[[Event], None] | None = None,
    parent: str | None = None,
) -> Outcome:
    """See `fedlq_ray.resume`."""
    folder = Path(expand(str(folder), "folder"))
    found = rundir.read(folder)
    if found.summary:
        with _told(folder):
            storage.clear(folder, found.config)  # if the run was killed before it did so
        raise ConfigError(f"{folder}: the run is finished, after {found.summary['rounds']} rounds")
    config = load_run(folder / "config.yaml", overrides).model_copy(update={"out": str(folder)})
    if digest(config, without=["rounds"]) != digest(found.config, without=["rounds"]):
        raise ConfigError(f"{folder}: a resumed run may only have more rounds, or other hosting")
    if config.rounds < found.config.rounds:
        raise ConfigError(
            f"rounds: {folder} has {found.config.rounds} rounds configured; a resumed run may have more, not fewer"
        )
    rundir.require_trackable(config, found)
    task = prepare(config, parts)
    _require_host(task, parts.strategy)
    now = identity(task, make(Worker(task).context, parts.strategy))
    with locked(folder), _told(folder):
        where = storage.checkpoints(folder, config)
        saved, _ = storage.latest(where, len(found.records), partial(rundir.checksum, folder))
        require_same(saved.get("identity", {}) if saved else {}, now, folder)  # earlier versions stored none
        write_durably(folder / "config.yaml", to_yaml(config))
        if not (folder / "clients.csv").exists():
            rundir.describe_clients(folder, task)
        track = rundir.track_again(folder, task, found, parent)
        return _carry_out(task, parts.strategy, folder, track, watch)


def checked(config: Config, parts: Parts) -> Task:
    """The task of a run, with everything checked before anything is written.

    Raises:
        ConfigError: the user's input is wrong.
    """
    task = prepare(config, parts)
    require_deadline(task)
    selection_of(task)
    _require_host(task, parts.strategy)
    worker = Worker(task)
    make(worker.context, parts.strategy)
    if config.network.downlink_bits is not None:
        require_rate(worker.context, config.network.downlink_bits, "network.downlink_bits")
    return task


def _require_host(task: Task, strategy: GivenStrategy | None) -> None:
    """Rejects a run if Ray cannot be joined, its parts cannot be pickled, or its GPU does not exist here.

    Ray's actors check for GPUs when they start.
    """
    if task.config.clients.hosting != "serial":
        session.require_address()
        require_picklable(
            {
                "model.name": task.module,
                "strategy.quantizer": task.quantizer,
                "strategy.name": strategy,
                "problem": task.problem,
                "train.local": task.local,
            }
        )
    elif task.config.train.device == "cuda":
        require_gpu()


def run_or_resume(
    config: Config, *, watch: Callable[[Event], None] | None = None, parent: str | None = None
) -> Outcome:
    """`resume` if the configured folder holds an interrupted run, else `simulate`."""
    if config.out is not None and (Path(expand(config.out, "out")) / "config.yaml").exists():
        return resume(config.out, watch=watch, parent=parent)
    return simulate(config, watch=watch, parent=parent)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turns a full disk and similar errors into one message; earlier files are complete."""
    try:
        yield
    except BrokenPipeError:  # from the output, not from a file
        raise
    except OSError as exc:
        raise FedLQError(
            f"{exc.filename or folder}: {exc.strerror or exc}; resume with: fedlq resume {folder}"
        ) from exc


def _ceiling(task: Task) -> str | None:
    """What compression can gain in this run, for people; None if it is not known."""
    try:
        return ceiling(task).line
    except FedLQError:
        return None


def _warn_if_slow(config: Config) -> None:
    if config.train.precision == "bfloat16" and config.train.device == "cpu" and emulates_bfloat16():
        message = "train.precision=bfloat16: this processor has no instructions for it; float32 is faster here"
        warnings.warn(message, stacklevel=4)


def _carry_out(
    task: Task,
    strategy: GivenStrategy | None,
    folder: Path,
    track: tracking.Tracking | None,
    watch: Callable[[Event], None] | None,
) -> Outcome:
    """Runs in a prepared folder, from its last checkpoint if it has one."""
    config = task.config
    records: list[Record] = []
    outcome: Outcome | None = None
    timing: dict[str, Any] = {"made_by": provenance.made_by()}
    status, hurry = "FAILED", False
    interrupts = Interrupts()
    if watch:
        with interrupts.showing():
            watch(Prepared([*task.notes, *stores.heard(config.tracking)], _ceiling(task)))
    _warn_if_slow(config)
    host = _serial if config.clients.hosting == "serial" else supervise.events
    try:
        for event in host(task, strategy, track, interrupts, folder.resolve()):
            match event:
                case RoundDone(record):
                    records.append(record)
                case Resumed(before, faults):
                    records[:] = before
                    for fault in faults:
                        warnings.warn(f"{fault}; resuming from an earlier one", stacklevel=3)
                case Restarted():
                    records.clear()
                case Warned(message):
                    warnings.warn(message, stacklevel=3)
                case Ended(tracked=fault):
                    outcome = _finish(task, folder, records, event, timing)
                    if track and fault:
                        late = f"MLflow at {track.uri} failed ({fault}); log it later: fedlq sync {folder}"
                        warnings.warn(late, stacklevel=3)
                case Hosting(kind, why, actors, startup_s):
                    timing |= {"hosting": kind, "why": why, "actors": actors, "startup_s": startup_s}
            if watch:
                with interrupts.showing():
                    watch(event)
    except KeyboardInterrupt:
        status, hurry = "KILLED", True
        raise
    finally:
        if outcome is None:
            if track and (fault := tracking.mark(track, config, records, status, hurry)):
                warnings.warn(f"MLflow has no status of this run ({fault}); fedlq sync {folder} sets it", stacklevel=3)
            with contextlib.suppress(OSError):  # the original error is reported
                _time(folder, timing, status)
    assert outcome is not None  # a host that does not finish raises
    if not outcome.summary:
        interrupts.pass_on()
    return outcome


def _finish(task: Task, folder: Path, records: list[Record], ended: Ended, timing: dict[str, Any]) -> Outcome:
    """Writes the files of a run whose rounds are over; if it is completed, removes its checkpoints."""
    _time(folder, timing | ended.timing, "FINISHED" if ended.completed else "KILLED")
    weights = np.array(ended.weights)
    flat = task.flat_model()
    flat.load(torch.from_numpy(weights))
    rundir.save_model(folder, flat)
    summary: dict[str, Any] = {}
    if ended.completed:
        rundir.describe_test_clients(folder, task, ended.of_clients)
        summary = rundir.summarise(task.config, records, rundir.sha256(weights), task.problem.goal, ended.under_way)
        write_durably(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        storage.clear(folder, task.config)
    return Outcome(records, summary, weights, folder)


def _time(folder: Path, timing: Mapping[str, Any], status: str) -> None:
    write_durably(folder / "timing.json", json.dumps({**timing, "status": status}, indent=1))


def _serial(
    task: Task, strategy: GivenStrategy | None, track: tracking.Tracking | None, interrupts: Interrupts, folder: Path
) -> Iterator[Event]:
    from fedlq_ray.runs.driver import attach, drive_serially

    ended: Event | None = None
    with reproducible(task.config.train.device), interrupts:
        for ended in drive_serially(task, strategy, track, lambda: interrupts.received is not None, folder):
            yield ended
    if track and isinstance(ended, Ended) and ended.completed and not ended.tracked:
        yield from attach(task, track, folder)
