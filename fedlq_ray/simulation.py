"""From a Config to a Result: wires the parts, owns no logic."""

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedlq_ray import provenance, raysession, rundir, storage, stores, tracking
from fedlq_ray.config import Config, digest, load, parse, to_yaml
from fedlq_ray.device import reproducible, require_gpu
from fedlq_ray.errors import ConfigError, FedLQError
from fedlq_ray.files import expand, locked, write_durably
from fedlq_ray.identity import identity, require_same
from fedlq_ray.interrupts import Interrupts
from fedlq_ray.parts import require_picklable
from fedlq_ray.strategies import make
from fedlq_ray.strategies.budgets import require_rate
from fedlq_ray.task import Task, Workplace, prepare

Event = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        history: a row a round, with the keys of rounds.jsonl.
        summary: that of summary.json.
        weights: the final flat vector (d,) float32; model.safetensors has it as a state_dict.
        path: the run's folder.
    """

    history: pd.DataFrame
    summary: dict[str, Any]
    weights: NDArray[np.float32]
    path: Path

    def plot(self) -> Any:
        """Accuracy against simulated time and traffic: a matplotlib figure."""
        from fedlq_ray.analysis import notebook

        return notebook.plot(self.path)

    def _repr_html_(self) -> str:
        from fedlq_ray.analysis import notebook

        return notebook.html(self.path)


def simulate(
    config: Config | Mapping[str, Any] | None = None,
    *,
    model: Any = None,
    data: Any = None,
    strategy: Any = None,
    quantizer: Any = None,
    watch: Callable[[Event], None] | None = None,
    parent: str | None = None,
) -> Result:
    """Run one experiment.

    Args:
        config: the settings, or a dict of them; None for the defaults.
        model: a torch.nn.Module, which is copied with its weights, or a factory of one; goes before `model.name`.
        data: a Dataset, the four arrays (x_train, y_train, x_test, y_test), or a mapping of them.
        strategy: a Strategy, a factory that may take `setting`, or a name.
        quantizer: an object with the methods of `Quantizer`, a factory that may take `bits`, or a name.
        watch: called with each event: {"started": [sentences]}, {"hosting", ...}, {"record": ...}, {"weights": ...}.
        parent: a comparison that this run belongs to, for MLflow: any text; what follows the last / is its name.
    Raises:
        ConfigError: the user's input is wrong; nothing was written.
        FedLQError: the run failed; the folder has the results so far.
    """
    config = config if isinstance(config, Config) else parse({} if config is None else config)
    rundir.require_trackable(config)
    task = prepare(config, model=model, data=data, quantizer=quantizer)
    _require_host(task, strategy)
    place = Workplace(task)
    make(place.setting, strategy)  # a wrong strategy is told before anything is written
    if config.network.downlink_bits is not None:
        require_rate(place.setting, config.network.downlink_bits, "network.downlink_bits")
    folder = rundir.create(config)
    with locked(folder), _told(folder):
        rundir.describe_clients(folder, task)
        track = rundir.track(folder, task, parent)
        return _carry_out(task, strategy, folder, track, watch)


def resume(
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: Any = None,
    data: Any = None,
    strategy: Any = None,
    quantizer: Any = None,
    watch: Callable[[Event], None] | None = None,
    parent: str | None = None,
) -> Result:
    """Go on with a run that did not finish, from its last checkpoint: what it gives is what it would have given.

    Args:
        folder: the run's.
        overrides: key=value settings: more `rounds`, or what cannot change a result, such as clients.hosting.
        model, data, strategy, quantizer: as they were given to `simulate`.
        watch: as for `simulate`; hears of {"resumed": round, ...} too.
        parent: as it was given to `simulate`, for a run that was killed before it was noted.
    Raises:
        ConfigError: no such run, or it is finished, or running, or what it is of has changed (nothing was written).
        CheckpointError: there are checkpoints, and none can be used.
        FedLQError: the run failed again.
    """
    folder = Path(expand(str(folder), "folder"))
    found = rundir.read(folder)
    if found.summary:
        with _told(folder):
            storage.clear(folder, found.config)  # if it was killed before it did
        raise ConfigError(f"{folder}: the run is finished, after {found.summary['rounds']} rounds")
    config = load(folder / "config.yaml", overrides).model_copy(update={"out": str(folder)})
    if digest(config, without=["rounds"]) != digest(found.config, without=["rounds"]):
        raise ConfigError(f"{folder}: a resumed run may only have more rounds, or other hosting")
    if config.rounds < found.config.rounds:
        raise ConfigError(f"rounds: {folder} was to have {found.config.rounds}; a resumed run may have more, not fewer")
    rundir.require_trackable(config, found)
    task = prepare(config, model=model, data=data, quantizer=quantizer)
    _require_host(task, strategy)
    now = identity(task, make(Workplace(task).setting, strategy))
    with locked(folder), _told(folder):
        where = storage.checkpoints(folder, config)
        saved, _ = storage.latest(where, len(found.records), partial(rundir.checksum, folder))
        require_same(saved.get("identity", {}) if saved else {}, now, folder)  # versions before kept none
        write_durably(folder / "config.yaml", to_yaml(config))
        if not (folder / "clients.csv").exists():
            rundir.describe_clients(folder, task)
        track = rundir.track_again(folder, task, found, parent)
        return _carry_out(task, strategy, folder, track, watch)


def _require_host(task: Task, strategy: Any) -> None:
    """Refuse a run on a Ray that cannot be joined, with parts that cannot travel, or on a GPU that is not here.

    Ray's actors look for their GPUs when they start.
    """
    if task.config.clients.hosting != "serial":
        raysession.require_address()
        require_picklable({"model.name": task.module, "strategy.quantizer": task.quantizer, "strategy.name": strategy})
    elif task.config.train.device == "cuda":
        require_gpu()


def run_or_resume(config: Config, *, watch: Callable[[Event], None] | None = None, parent: str | None = None) -> Result:
    """`resume` where the folder that the configuration names holds a run that was cut short, else `simulate`."""
    if config.out is not None and (Path(expand(config.out, "out")) / "config.yaml").exists():
        return resume(config.out, watch=watch, parent=parent)
    return simulate(config, watch=watch, parent=parent)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """A full disk and its like as one message: what was written before is whole."""
    try:
        yield
    except BrokenPipeError:  # of the output, not of a file
        raise
    except OSError as exc:
        raise FedLQError(f"{exc.filename or folder}: {exc.strerror or exc}; go on with: fedlq resume {folder}") from exc


def _carry_out(
    task: Task,
    strategy: Any,
    folder: Path,
    track: tracking.Tracking | None,
    watch: Callable[[Event], None] | None,
) -> Result:
    """Run in a folder that is ready, from its last checkpoint where it has one."""
    config = task.config
    records: list[dict[str, Any]] = []
    last: Event = {}
    timing: Event = {"made_by": provenance.made_by()}
    status, hurry = "FAILED", False
    interrupts = Interrupts()
    if watch:
        with interrupts.showing():
            watch({"started": [task.data.description, *stores.heard(config.tracking)]})
    host = _serial if config.clients.hosting == "serial" else raysession.events
    try:
        for event in host(task, strategy, track, interrupts, folder.resolve()):
            if "record" in event:
                records.append(event["record"])
            elif "resumed" in event:
                records[:] = event["records"]
                for fault in event["faults"]:
                    warnings.warn(f"{fault}; going on from the one before", stacklevel=3)
            elif "restarted" in event:
                records.clear()
            elif "warning" in event:
                warnings.warn(event["warning"], stacklevel=3)
            elif "weights" in event:
                last = event
            elif "hosting" in event:
                timing |= event
            if watch:
                with interrupts.showing():
                    watch(event)
        status = "FINISHED" if last.get("completed") else "KILLED"
    except KeyboardInterrupt:
        status, hurry = "KILLED", True
        raise
    finally:
        if not last and track and (fault := tracking.mark(track, config, records, status, hurry)):
            warnings.warn(f"MLflow has no status of this run ({fault}); fedlq sync {folder} sets it", stacklevel=3)
        timing |= last.get("timing", {}) | {"status": status}
        with contextlib.suppress(OSError):  # what else went wrong is told
            write_durably(folder / "timing.json", json.dumps(timing, indent=1))
    weights = np.array(last["weights"])
    flat = task.flat_model()
    flat.load(torch.from_numpy(weights))
    rundir.save_model(folder, flat)
    if track and last["tracked"]:
        warnings.warn(
            f"MLflow at {track.uri} failed ({last['tracked']}); log the run later: fedlq sync {folder}",
            stacklevel=3,
        )
    if status == "KILLED":
        interrupts.pass_on()
    summary = rundir.summarise(config, records, rundir.sha256(weights))
    write_durably(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    storage.clear(folder, config)
    if track and not last["tracked"]:
        _attach(folder, track, config, records, copy.deepcopy(task.module))
    return Result(pd.DataFrame(records), summary, weights, folder)


def _attach(folder: Path, track: tracking.Tracking, config: Config, records: list[Any], module: Any) -> None:
    """Put the run's files and model into MLflow."""
    try:
        tracking.attach(track, config, records, folder, module)
    except Exception as exc:  # telemetry: the run itself is done and kept
        warnings.warn(f"MLflow lacks this run's files ({exc}); fedlq sync {folder} adds them", stacklevel=3)


def _serial(task: Task, strategy: Any, track: Any, interrupts: Interrupts, folder: Path) -> Iterator[Event]:
    from fedlq_ray.driver import drive_serially

    with reproducible(task.config.train.device), interrupts:
        yield from drive_serially(task, strategy, track, lambda: interrupts.received is not None, folder)
