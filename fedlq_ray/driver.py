"""The driver: an actor that runs the rounds, tracks them, and streams their records to who started it."""

from fedlq_ray.startup import make_importable  # before what a file of the user's could hide

# isort: split
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from fedlq_ray import rundir
from fedlq_ray.checkpoint import Snapshot
from fedlq_ray.hosting import ORDINARY_BYTES, RayHost, actor_bytes, choose
from fedlq_ray.identity import identity
from fedlq_ray.rounds import Outcome, run
from fedlq_ray.serial import SerialHost
from fedlq_ray.storage import Saver, checkpoints, latest
from fedlq_ray.strategies import make
from fedlq_ray.task import Task, Workplace
from fedlq_ray.tracking import Tracker, Tracking

Event = dict[str, Any]


def drive(
    task: Task, given: Any, host: Any, tracking: Tracking | None, stopped: Callable[[], bool], folder: Path
) -> Iterator[Event]:
    """Run the rounds on a host, from the last checkpoint where there is one; keep the journal, and track.

    Yields:
        {"resumed": round, "records": [...], "faults": [...]} first where it goes on from a checkpoint, {"record": ...}
        for each round, {"warning": ...} for each client that is skipped, once, and for a checkpoint that could not be
        written, and at last {"weights", "completed", "timing", "tracked"}.
    """
    place, config = Workplace(task), task.config
    strategy = make(place.setting, given)
    whose = identity(task, strategy)
    outcome = Outcome(place.initial_weights())
    where = checkpoints(folder, config)
    written = rundir.journal(folder)
    before, faults = latest(where, len(written), partial(rundir.checksum, folder))
    records = written[: before["round"] if before else 0]
    if before or faults:
        yield {"resumed": len(records), "records": records, "faults": faults}
    tracker = Tracker(tracking, config, records) if tracking else None
    status, told, heard = "FAILED", set[int](), True
    try:
        with rundir.Journal(folder, records) as journal:
            saver = Saver(where, config.checkpoint, host.recall, journal.sync)

            def keep(snapshot: Snapshot) -> None:
                saver.offer(snapshot | {"identity": whose, "journal": journal.checksum()})

            try:
                for record in run(task, strategy, host, outcome, stopped, before, keep):
                    journal.write(record)
                    if tracker:
                        tracker.log(record)
                    yield {"record": record}
                    for client in record["skipped"]:
                        if client not in told:
                            told.add(client)
                            yield {"warning": f"skipped, as clients.on_failure has it: {outcome.skipped[client]}"}
                    if saver.failure:
                        yield {"warning": saver.failure}
                        saver.failure = None
            finally:
                saver.finish(outcome.completed)
            if saver.failure:
                yield {"warning": saver.failure}
        status = "FINISHED" if outcome.completed else "KILLED"
    except (KeyboardInterrupt, GeneratorExit):  # a second interrupt, here or in who listens
        status, heard = "KILLED", False
        raise
    finally:
        tracked = tracker.finish(status, wait=heard) if tracker else None
    yield {
        "weights": outcome.weights.numpy(),
        "completed": outcome.completed,
        "timing": outcome.timing,
        "tracked": tracked,
    }


@ray.remote(num_cpus=0)
class Driver:
    """Two calls at a time: the rounds, and the word to stop, or the question whether it lives."""

    def __init__(self, folder: str) -> None:
        make_importable(folder)
        torch.set_num_threads(1)
        self.stopping = False

    def run(self, task: Task, given: Any, tracking: Tracking | None, folder: Path) -> Iterator[Event]:
        started = time.perf_counter()
        kind, why = choose(task.config.clients, actor_bytes(task))
        host = RayHost(task, kind)
        if host.not_forked:
            why += f"; {host.not_forked} are processes of {ORDINARY_BYTES / 1e6:.0f} MB: the fork server did not start"
        yield {"hosting": kind, "why": why, "actors": host.count, "startup_s": time.perf_counter() - started}
        yield from drive(task, given, host, tracking, lambda: self.stopping, folder)

    def alive(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        """End after the payload that is being folded."""
        self.stopping = True


def drive_serially(
    task: Task, given: Any, tracking: Tracking | None, stopped: Callable[[], bool], folder: Path
) -> Iterator[Event]:
    """The same without Ray."""
    yield {"hosting": "serial", "why": "as configured", "actors": 0, "startup_s": 0.0}
    yield from drive(task, given, SerialHost(task), tracking, stopped, folder)
