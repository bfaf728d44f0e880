"""The driver as an actor of Ray."""

from fedlq_ray.startup import make_importable  # first: a user's file could hide later imports

# isort: split
import os
import time
from collections.abc import Iterator
from pathlib import Path

import ray
import torch

from fedlq_ray.federation.events import Event, Hosting
from fedlq_ray.federation.task import Task
from fedlq_ray.hosts.ray.choose import ORDINARY_BYTES, actor_bytes, choose
from fedlq_ray.hosts.ray.hosting import RayHost
from fedlq_ray.hosts.ray.pool import Pool
from fedlq_ray.runs.driver import attach, drive
from fedlq_ray.strategies import GivenStrategy
from fedlq_ray.tracking.log import Tracking


@ray.remote(num_cpus=0)
class Driver:
    """Handles two calls at once: the rounds or what follows, and a request to stop or to confirm that it is alive."""

    def __init__(self, folder: str) -> None:
        make_importable(folder)
        torch.set_num_threads(1)
        self.stopping = False

    def run(self, task: Task, given: GivenStrategy | None, tracking: Tracking | None, folder: Path) -> Iterator[Event]:
        started = time.perf_counter()
        kind, why = choose(task.clients, actor_bytes(task))
        pool = Pool(task, kind)
        host = RayHost(pool)
        if pool.not_forked:
            why += f"; {pool.not_forked} are processes of {ORDINARY_BYTES / 1e6:.0f} MB: the fork server did not start"
        yield Hosting(kind, why, len(pool.slots), time.perf_counter() - started)
        yield from drive(task, given, host, tracking, lambda: self.stopping, folder)

    def attach(self, task: Task, tracking: Tracking, folder: Path) -> Iterator[Event]:
        yield from attach(task, tracking, folder)

    def alive(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        """Ends the run after the current payload is folded."""
        self.stopping = True
