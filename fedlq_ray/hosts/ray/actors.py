"""The actors that run clients, and the bell that idle ones wait for."""

from fedlq_ray import startup  # noqa: F401  (before what a file of the user's could hide)

# isort: split
import asyncio
import contextlib
import os
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError
from torch import Tensor

from fedlq_ray.federation.task import Job, Task, Timed, Worker, timed
from fedlq_ray.hosts.ray import stub
from fedlq_ray.strategies import Probe
from fedlq_ray.training.device import reproducible
from fedlq_ray.training.local import Reply


def _tensor(array: NDArray[np.float32]) -> Tensor:
    """A shared, read-only array of the object store as a tensor of this process."""
    return torch.from_numpy(array.copy())


@ray.remote(num_cpus=0)
class ClientActor:
    """Hosts one client or many. A call's job names its client; the client's memory travels with the call."""

    def __init__(self, task: Task) -> None:
        self.settings = reproducible(task.config.train.device)
        self.settings.__enter__()  # for the lifetime of this process
        self.worker = Worker(task)

    def alive(self) -> bool:
        """Returns once the actor runs: whether it was forked."""
        return stub.FORKED in os.environ

    def rest(self, rung: list[Any]) -> None:
        """Wait until the bell rings or no longer exists."""
        with contextlib.suppress(RayError):
            ray.get(rung[0])

    def train(
        self, job: Job, weights: NDArray[np.float32], memory: NDArray[np.float32] | None
    ) -> tuple[Reply, NDArray[np.float32] | None]:
        reply, kept = self.worker.train(job, _tensor(weights), None if memory is None else _tensor(memory))
        return reply, None if kept is None else kept.numpy()

    def evaluate(self, weights: NDArray[np.float32]) -> Timed:
        return timed(self.worker.evaluate, _tensor(weights))

    def probe(self, probe: Probe, base: NDArray[np.float32], sent: NDArray[np.float32], round: int) -> Timed:
        return timed(self.worker.probe, probe, _tensor(base), _tensor(sent), round)


@ray.remote(num_cpus=0)
class Bell:
    """Dedicated actors wait on it between their jobs, each with its own ticket.

    An idle Ray process takes half a percent of a core. Two thirds of this are signal checks, 100 times per second. A
    process that waits in a call checks once per second.
    """

    def __init__(self) -> None:
        self.rung: dict[int, asyncio.Event] = {}

    async def wait(self, ticket: int) -> None:
        await self.rung.setdefault(ticket, asyncio.Event()).wait()
        del self.rung[ticket]

    async def ring(self, ticket: int) -> None:
        self.rung.setdefault(ticket, asyncio.Event()).set()
