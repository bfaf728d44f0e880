"""Follows a run of another process from its folder or from MLflow, as the events that `simulate` emits."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlq_ray.config.load import Config, load
from fedlq_ray.errors import ConfigError, first_line
from fedlq_ray.federation.events import Closed, Event, Restarted, RoundDone
from fedlq_ray.federation.record import Record
from fedlq_ray.files import is_locked
from fedlq_ray.problems import goal_of
from fedlq_ray.runs import rundir
from fedlq_ray.tracking import stores


def folder(path: Path, every_s: float = 1.0) -> tuple[Config, Iterator[Event]]:
    """Returns the settings of a run, and its events until it ends: RoundDone, and finally Closed.

    Raises:
        ConfigError: the folder holds no run.
    """
    return rundir.read(path).config, _from_folder(path, every_s)


def _from_folder(path: Path, every_s: float) -> Iterator[Event]:
    told = 0
    while True:
        running = is_locked(path)  # checked first, so that the last records are read below
        told, events = news(path, told)
        yield from events
        if not running:
            yield Closed(rundir.read(path).status)
            return
        time.sleep(every_s)


def news(path: Path, told: int) -> tuple[int, list[Event]]:
    """Returns the number of rounds in a run's folder, and the events since it had `told` rounds."""
    back: list[Event] = []
    if (rounds := rundir.rounds(path)) < told:
        back, told = [Restarted(f"the run went back to round {rounds}")], 0
    records = rundir.journal(path, told)
    return told + len(records), [*back, *(RoundDone(record) for record in records)]


def mlflow(uri: str, run_id: str, every_s: float = 2.0) -> tuple[Config, Iterator[Event]]:
    """As `folder`, from the metrics of a run in MLflow.

    Raises:
        ConfigError: the run does not exist, is not a run of fedlq, or MLflow does not answer.
    """
    stores.require_readable(uri, "--tracking-uri")
    try:
        client = stores.connect(uri)
        with tempfile.TemporaryDirectory() as scratch:
            config = load(client.download_artifacts(run_id, "config.yaml", scratch))
    except Exception as exc:  # MLflow raises many kinds
        raise ConfigError(f"{run_id}: no run of fedlq in {uri}: {first_line(exc)}") from exc
    return config, _from_mlflow(client, run_id, every_s, goal_of(config.problem).metric)


def _evaluated(metric: str, value: float | None) -> dict[str, Any]:
    """The fields of a record for a value of the main metric."""
    if metric == "accuracy":
        return {metric: value}
    return {} if value is None else {"metrics": {metric: value}}


def _from_mlflow(client: Any, run_id: str, every_s: float, metric: str) -> Iterator[Event]:
    told, sent, wasted = -1, 0.0, 0.0
    while True:
        status = client.get_run(run_id).info.status
        found = {
            name: {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}
            for name in ("sim_time_s", "uplink_mb", "wasted_mb", metric)
        }
        # A round's metrics are logged in one batch, so a step with the first metric has all of them.
        for step in sorted(step for step in found["sim_time_s"] if step > told):
            uplink, lost = found["uplink_mb"].get(step, sent), found["wasted_mb"].get(step)
            yield RoundDone(
                Record.from_json(
                    {
                        "round": step,
                        "sim_time_s": found["sim_time_s"][step],
                        "uplink_bytes": round((uplink - sent) * 1e6),
                        "wasted_bytes": None if lost is None else round((lost - wasted) * 1e6),
                        **_evaluated(metric, found[metric].get(step)),
                    }
                )
            )
            told, sent, wasted = step, uplink, lost or 0.0
        if status != "RUNNING":
            yield Closed(status)
            return
        time.sleep(every_s)
