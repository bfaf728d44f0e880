"""The driver: an actor that runs the rounds, tracks them, and streams their records to who started it."""

import time
from collections.abc import Iterator
from typing import Any

import ray
import torch

from fedlq_ray.hosting import RayHost, choose
from fedlq_ray.parts import make_importable
from fedlq_ray.rounds import Outcome, run
from fedlq_ray.serial import SerialHost
from fedlq_ray.strategies import make
from fedlq_ray.task import Task, Workplace
from fedlq_ray.tracking import Tracker, Tracking

Event = dict[str, Any]


def drive(task: Task, given: Any, host: Any, tracking: Tracking | None, stopped: Any) -> Iterator[Event]:
    """Run the rounds on a host, and track them.

    Yields:
        {"record": ...} for each round, and at last {"weights", "completed", "timing", "tracked"}.
    """
    place = Workplace(task)
    strategy = make(place.setting, given)
    outcome = Outcome(place.model.vector.clone())
    tracker = Tracker(tracking, task.config) if tracking else None
    status = "FAILED"
    try:
        for record in run(task, strategy, host, outcome, stopped):
            if tracker:
                tracker.log(record)
            yield {"record": record}
        status = "FINISHED" if outcome.completed else "KILLED"
    finally:
        tracked = tracker.finish(status) if tracker else None
    yield {
        "weights": outcome.weights.numpy(),
        "completed": outcome.completed,
        "timing": outcome.timing,
        "tracked": tracked,
    }


@ray.remote(num_cpus=0)
class Driver:
    """Two calls at a time: the rounds, and the word to stop."""

    def __init__(self, folder: str) -> None:
        make_importable(folder)
        torch.set_num_threads(1)
        self.stopping = False

    def run(self, task: Task, given: Any, tracking: Tracking | None) -> Iterator[Event]:
        started = time.perf_counter()
        kind, why = choose(task.config.clients)
        host = RayHost(task, kind)
        yield {"hosting": kind, "why": why, "actors": host.count, "startup_s": time.perf_counter() - started}
        yield from drive(task, given, host, tracking, lambda: self.stopping)

    def stop(self) -> None:
        """End after the payload that is being folded."""
        self.stopping = True


def drive_serially(task: Task, given: Any, tracking: Tracking | None, stopped: Any) -> Iterator[Event]:
    """The same without Ray."""
    yield {"hosting": "serial", "why": "as configured", "actors": 0, "startup_s": 0.0}
    yield from drive(task, given, SerialHost(task), tracking, stopped)
