"""Recomputes the simulated times of finished runs for other links, instead of training again.

A scheme that ignores time trains the same with any links of its clients, so only its clock changes.
"""

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedlq_ray.config import parts
from fedlq_ray.config.load import Config, digest
from fedlq_ray.config.sections import affects
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.accounting import clock
from fedlq_ray.federation.clock import round_time
from fedlq_ray.federation.record import Record
from fedlq_ray.federation.selections import SELECTIONS
from fedlq_ray.federation.task import Task, prepare
from fedlq_ray.files import write_durably
from fedlq_ray.runs import rundir
from fedlq_ray.strategies import STRATEGIES
from fedlq_ray.tracking import log as tracking


def key(config: Config) -> str:
    """A digest that is equal for runs that differ only in their clock."""
    return digest(config, without=affects(config, "clock"))


def reclockable(config: Config) -> bool:
    """Whether training is independent of the clock."""
    if config.network.bandwidth is not None:  # the clock of a round depends on those before it
        return False
    selection = parts.find("clients.selection", config.clients.selection, SELECTIONS)
    if not config.synchronous or getattr(selection, "__dict__", {}).get("timeless") is not True:
        return False
    if (
        config.train.adaptive_work > 1 or getattr(config.strategy, "budget", None) == "deadline"
    ):  # late clients may be left out
        return False
    down = config.network.downlink_bits
    if down is not None and down < config.network.downlink_cap_bits:  # faster links get a more exact model
        return False
    name = config.strategy.name
    if name in STRATEGIES:
        return bool(getattr(STRATEGIES[name], "timeless", False))
    # A user's class must declare it itself: an inherited value may not hold for its own plans.
    own = parts.find("strategy.name", name, STRATEGIES)
    return getattr(own, "__dict__", {}).get("timeless") is True


def sources(out: Path) -> dict[str, Path]:
    """The finished runs in a sweep's folder, by `key`."""
    found: dict[str, Path] = {}
    for summary in sorted(out.rglob("summary.json")):
        try:
            run = rundir.read(summary.parent)
        except ConfigError:  # not of this sweep, or reported when its own run is reached
            continue
        if run.records and run.records[0].client_samples:  # older versions did not record it
            found.setdefault(key(run.config), summary.parent)
    return found


def clocked(task: Task, records: Sequence[Record]) -> list[Record]:
    """The records with the simulated times of `task`'s clients."""
    made, sim_time_s = [], 0.0
    for record in records:
        times = clock(
            task,
            record.round,
            record.cohort,
            record.client_samples,
            record.client_uplink_bytes,
            record.client_downlink_bytes,
        )
        sim_time_s += round_time(times)
        made.append(
            replace(
                record,
                client_download_s=[t.download_s for t in times],
                client_compute_s=[t.compute_s for t in times],
                client_upload_s=[t.upload_s for t in times],
                sim_time_s=sim_time_s,
            )
        )
    return made


def write(config: Config, source: Path, parent: str | None) -> None:
    """Writes a run's folder as training would, from the folder of a finished run with the same `key`."""
    task, trained = prepare(config), rundir.read(source)
    if trained.summary is None:
        raise ConfigError(f"{source}: is not finished")
    folder = rundir.create(config)
    rundir.describe_clients(folder, task)
    origin = os.path.relpath(source, folder)
    track = rundir.track(folder, task, parent, {"fedlq.reclocked_from": origin})
    records = clocked(task, trained.records)
    write_durably(folder / "rounds.jsonl", "".join(json.dumps(r.to_json(), allow_nan=False) + "\n" for r in records))
    for name in ("model.safetensors", "test_clients.csv", *(["payloads.bin"] if config.payloads else [])):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    write_durably(folder / "timing.json", json.dumps({"reclocked_from": origin, "status": "FINISHED"}, indent=1))
    summary = rundir.summarise(config, records, trained.summary["weights_sha256"], task.problem.goal)
    write_durably(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    if track:
        try:
            tracking.sync(track, config, records, "FINISHED", folder, task.module)
        except Exception as exc:  # telemetry only: the run itself is finished and saved
            warnings.warn(f"MLflow at {track.uri} failed ({exc}); log the run later: fedlq sync {folder}", stacklevel=2)
