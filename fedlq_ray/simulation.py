"""From a Config to a Result: wires the parts, owns no logic."""

import copy
import getpass
import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedlq_ray import provenance, rundir, tracking
from fedlq_ray.config import Config
from fedlq_ray.errors import FedLQError
from fedlq_ray.models import FlatModel
from fedlq_ray.strategies import make
from fedlq_ray.strategies.budgets import require_rate
from fedlq_ray.task import Task, Workplace, prepare

Event = dict[str, Any]
_GRACE_S = 20.0  # that an interrupted driver has to tell what it has


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
        watch: called with each event: {"hosting", ...}, {"record": ...}, {"stopping": True}, {"weights": ...}.
        parent: a comparison that this run belongs to, for MLflow.
    Raises:
        ConfigError: the user's input is wrong; nothing was written.
        FedLQError: the run failed; the folder has the results so far.
    """
    config = config or Config()
    task = prepare(config, model=model, data=data, quantizer=quantizer)
    place = Workplace(task)
    make(place.setting, strategy)  # a wrong strategy is told before anything is written
    if config.network.downlink_bits is not None:
        require_rate(place.setting, config.network.downlink_bits, "network.downlink_bits")
    folder = rundir.create(config)
    rundir.describe_clients(folder, task)
    track = rundir.track(folder, config, parent, tags(), dataset(task))
    records: list[dict[str, Any]] = []
    last: Event = {}
    timing: Event = {}
    status = "FAILED"
    interrupts = Interrupts()
    host = _serial if config.clients.hosting == "serial" else _on_ray
    try:
        with (folder / "rounds.jsonl").open("w") as journal:
            for event in host(task, strategy, track, interrupts):
                if "record" in event:
                    records.append(event["record"])
                    journal.write(json.dumps(event["record"], allow_nan=False) + "\n")
                    journal.flush()
                elif "weights" in event:
                    last = event
                elif "hosting" in event:
                    timing |= event
                if watch:
                    watch(event)
        status = "FINISHED" if last.get("completed") else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if not last:
            _mark(folder, track, config, records, status)
        timing |= last.get("timing", {}) | {"status": status}
        rundir.write_whole(folder / "timing.json", json.dumps(timing, indent=1))
    weights = np.array(last["weights"])
    flat = FlatModel(copy.deepcopy(task.module))
    flat.load(torch.from_numpy(weights))
    rundir.save_model(folder, flat)
    if last.get("tracked"):
        warnings.warn(
            f"MLflow at {config.tracking.uri} failed ({last['tracked']}); log the run later: fedlq sync {folder}",
            stacklevel=2,
        )
    if status == "KILLED":
        raise Terminated if interrupts.received == signal.SIGTERM else KeyboardInterrupt
    summary = rundir.summarise(config, records, rundir.sha256(weights))
    rundir.write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    if track and not last["tracked"]:
        _attach(folder, track, config, records)
    return Result(pd.DataFrame(records), summary, weights, folder)


def _mark(folder: Path, track: Any, config: Config, records: list[Any], status: str) -> None:
    """A run whose driver is gone gets its status in MLflow from here."""
    if track is None:
        return
    try:
        tracking.sync(track, config, records, status, None)
    except Exception as exc:  # telemetry: the run's own error is what the user must see
        warnings.warn(f"MLflow has no status of this run ({exc}); fedlq sync {folder} sets it", stacklevel=2)


def _attach(folder: Path, track: tracking.Tracking, config: Config, records: list[Any]) -> None:
    """Put the run's files into MLflow."""
    try:
        tracking.attach(track, config, records, folder)
    except Exception as exc:  # telemetry: the run itself is done and kept
        warnings.warn(f"MLflow lacks this run's files ({exc}); fedlq sync {folder} adds them", stacklevel=3)


def dataset(task: Task) -> dict[str, str]:
    """The data, as MLflow describes a run's input."""
    data, config = task.data, task.config.data
    profile = {
        "num_train": len(data.y_train),
        "num_test": len(data.y_test),
        "num_classes": data.num_classes,
        "input_shape": list(data.input_shape),
        "partition": config.partition,
    }
    return {
        "name": data.name,
        "digest": data.digest(),
        "source_type": "local",
        "source": config.path or data.name,
        "profile": json.dumps(profile),
    }


def tags() -> dict[str, str]:
    """What made a result, for MLflow."""
    made_by = {f"version.{name}": found for name, found in provenance.versions().items()}
    made_by |= {"mlflow.source.name": "fedlq", "mlflow.source.type": "LOCAL", "mlflow.user": getpass.getuser()}
    commit = provenance.commit()
    return made_by | ({"mlflow.source.git.commit": commit} if commit else {})


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

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _serial(task: Task, strategy: Any, track: Any, interrupts: Interrupts) -> Iterator[Event]:
    from fedlq_ray.driver import drive_serially

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with interrupts:
            yield from drive_serially(task, strategy, track, lambda: interrupts.received is not None)
    finally:
        torch.set_num_threads(threads)


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine; twice is once."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)


def _on_ray(task: Task, strategy: Any, track: Any, interrupts: Interrupts) -> Iterator[Event]:
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError

    from fedlq_ray.driver import Driver

    start_ray()
    with interrupts:
        driver = Driver.options(max_concurrency=2).remote(os.getcwd())  # type: ignore[attr-defined]
        stream = driver.run.options(num_returns="streaming").remote(ray.put(task), strategy, track)
        told = False
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
        except RayTaskError as exc:
            cause = exc.cause
            raise (cause if isinstance(cause, FedLQError) else FedLQError(f"the driver failed: {cause!r}")) from None
        except RayActorError as exc:
            raise FedLQError(f"the driver actor died: {str(exc).splitlines()[0]}") from None
        except RayError as exc:
            raise FedLQError(f"Ray: {str(exc).splitlines()[0]}") from exc
        finally:
            ray.kill(driver)
