"""From a Config to a Result: wires the parts, owns no logic."""

import contextlib
import copy
import json
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedlq_ray import forkserver, provenance, rundir, storage, stores, tracking
from fedlq_ray.config import Config, digest, load, to_yaml
from fedlq_ray.device import reproducible, require_gpu
from fedlq_ray.errors import ConfigError, FedLQError
from fedlq_ray.files import expand, locked, write_durably
from fedlq_ray.identity import identity, require_same
from fedlq_ray.models import FlatModel
from fedlq_ray.strategies import make
from fedlq_ray.strategies.budgets import require_rate
from fedlq_ray.task import Task, Workplace, prepare

Event = dict[str, Any]
_RESTARTS = 3  # of a driver that dies, without a round more than before


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


class Terminated(KeyboardInterrupt):
    """SIGTERM came: as an interrupt, with another exit code."""


def simulate(
    config: Config | None = None,
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
        config: the settings; None for the defaults.
        model: a factory of a torch.nn.Module; goes before `model.name`.
        data: a Dataset, the four arrays (x_train, y_train, x_test, y_test), or a mapping of them.
        strategy: a Strategy, or a factory that may take `setting`.
        quantizer: an object with the methods of `Quantizer`.
        watch: called with each event: {"started": [sentences]}, {"hosting", ...}, {"record": ...}, {"weights": ...}.
        parent: a comparison that this run belongs to, for MLflow: any text; what follows the last / is its name.
    Raises:
        ConfigError: the user's input is wrong; nothing was written.
        FedLQError: the run failed; the folder has the results so far.
    """
    config = config or Config()
    rundir.require_trackable(config)
    task = prepare(config, model=model, data=data, quantizer=quantizer)
    _require_device(config)
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
    _require_device(config)
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


def _require_device(config: Config) -> None:
    """Refuse a run in this process on a GPU that it does not have; Ray's actors look for theirs when they start."""
    if config.clients.hosting == "serial" and config.train.device == "cuda":
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
    if watch:
        watch({"started": stores.heard(config.tracking)})
    records: list[dict[str, Any]] = []
    last: Event = {}
    timing: Event = {"made_by": provenance.made_by()}
    status, hurry = "FAILED", False
    interrupts = Interrupts()
    host = _serial if config.clients.hosting == "serial" else _on_ray
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
    flat = FlatModel(copy.deepcopy(task.module))
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


class Interrupts:
    """SIGINT and SIGTERM as a wish: the first is only noted, and the run ends at the next payload; a second ends all.

    To be entered after ray.init, which sets handlers of its own; without effect outside of the main thread.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def pass_on(self) -> None:
        """What was noted, as an exception."""
        if self.received is not None:
            raise Terminated if self.received == signal.SIGTERM else KeyboardInterrupt

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _serial(task: Task, strategy: Any, track: Any, interrupts: Interrupts, folder: Path) -> Iterator[Event]:
    from fedlq_ray.driver import drive_serially

    with reproducible(task.config.train.device), interrupts:
        yield from drive_serially(task, strategy, track, lambda: interrupts.received is not None, folder)


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine; twice is once.

    Raises:
        FedLQError: neither is possible.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as exc:  # ValueError, ConnectionError, RuntimeError, and what else a system raises
        where = os.environ.get("RAY_ADDRESS")
        hint = f"is there a cluster at RAY_ADDRESS={where}?" if where else "is there room in /dev/shm and in /tmp?"
        raise FedLQError(f"Ray did not start: {next(iter(str(exc).splitlines()), repr(exc))}; {hint}") from exc


def _on_ray(task: Task, strategy: Any, track: Any, interrupts: Interrupts, folder: Path) -> Iterator[Event]:
    """The driver actor's events; a driver that dies, or loses what it needs, is started again from the checkpoint."""
    import ray
    from ray.exceptions import (
        ObjectStoreFullError,
        OutOfDiskError,
        OutOfMemoryError,
        RayActorError,
        RayError,
        RayTaskError,
    )

    start_ray()
    with interrupts:
        left, furthest, shared = _RESTARTS, -1, None
        while True:
            try:
                shared = shared or ray.put(task)
                for event in _driven(shared, strategy, track, interrupts, folder, task.config.clients.timeout_s):
                    if "record" in event and event["record"]["round"] > furthest:
                        left, furthest = _RESTARTS, event["record"]["round"]
                    yield event
                return
            except RayTaskError as exc:
                cause = exc.cause
                if isinstance(cause, FedLQError | OSError):
                    raise cause from None
                if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
                    raise _full(cause, folder) from None
                fault = f"the driver failed: {cause!r}"
                if not isinstance(cause, RayError) or not left:
                    raise FedLQError(fault) from None
            except (RayActorError, OutOfMemoryError) as exc:
                fault = f"the driver actor died: {str(exc).splitlines()[0]}"
                if not left:
                    raise FedLQError(fault) from None
            except (ObjectStoreFullError, OutOfDiskError) as exc:
                raise _full(exc, folder) from exc
            except RayError as exc:
                raise FedLQError(f"Ray: {str(exc).splitlines()[0]}") from exc
            left -= 1
            yield {"restarted": fault}


def _full(exc: Exception, folder: Path) -> FedLQError:
    """What to do where Ray has no room for an object; to begin again at once would not help."""
    return FedLQError(
        f"Ray's object store has no room ({type(exc).__name__}: {str(exc).splitlines()[0]}): free /dev/shm, and disk "
        f"in Ray's temporary folder, or take a smaller model or cohort; go on with: fedlq resume {folder}"
    )


def _driven(
    task: Any, strategy: Any, track: Any, interrupts: Interrupts, folder: Path, timeout_s: float
) -> Iterator[Event]:
    """One driver actor's events. It is forked, as clients' are, and lives on this node: the run's folder is here.

    Where it does not answer for `timeout_s`, it is ended for good: one that woke up later would write to the folder.
    """
    import ray
    from ray.exceptions import RayActorError

    from fedlq_ray.driver import Driver
    from fedlq_ray.placement import options

    here = options(ray.get_runtime_context().get_node_id(), forkserver.command())
    driver = Driver.options(max_concurrency=2, **here).remote(os.getcwd())  # type: ignore[attr-defined]
    stream = driver.run.options(num_returns="streaming").remote(task, strategy, track, folder)
    told, pid, asked = False, None, time.monotonic()
    alive = driver.alive.remote()
    try:
        while True:
            if interrupts.received is not None and not told:
                told = True
                driver.stop.remote()
                yield {"stopping": True}
            if ray.wait([stream], timeout=0.2)[0]:
                try:
                    yield ray.get(next(stream))
                except StopIteration:
                    return
            elif ray.wait([alive], timeout=0)[0]:
                if time.monotonic() - asked > timeout_s / 4 or pid is None:
                    pid, asked, alive = ray.get(alive), time.monotonic(), driver.alive.remote()
            elif pid and time.monotonic() - asked > timeout_s:
                with contextlib.suppress(OSError):  # it is gone
                    os.kill(pid, signal.SIGKILL)
                raise RayActorError(error_msg=f"it said nothing for {timeout_s:g} s")
    finally:
        ray.kill(driver)
