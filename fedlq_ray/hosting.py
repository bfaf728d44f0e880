"""Clients as Ray actors: `dedicated`, an actor each, or `packed`, many in a few actors."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor

from fedlq_ray import forkserver
from fedlq_ray.config import ClientsConfig
from fedlq_ray.errors import ClientError, FedLQError
from fedlq_ray.strategies import Probe
from fedlq_ray.task import Job, Task, Timed, Workplace, timed
from fedlq_ray.training import Reply

# Private memory of an actor after training the small CNN, measured (ARCHITECTURE.md).
FORKED_BYTES, ORDINARY_BYTES = 90e6, 220e6
ACTORS_A_CORE = 8  # an actor takes about a second of a core to start


def _tensor(array: NDArray[np.float32]) -> Tensor:
    """A shared, read-only array of the object store as a tensor of this process."""
    return torch.from_numpy(array.copy())


@ray.remote(num_cpus=0)
class ClientActor:
    """Hosts one client or many: which one a call is about is in the job; what it remembers comes and goes with it."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(1)  # more threads would change sums, and fight over the cores
        self.place = Workplace(task)

    def alive(self) -> int:
        return os.getpid()

    def train(
        self, job: Job, weights: NDArray[np.float32], memory: NDArray[np.float32] | None
    ) -> tuple[Reply, NDArray[np.float32] | None]:
        reply, kept = self.place.train(job, _tensor(weights), None if memory is None else _tensor(memory))
        return reply, None if kept is None else kept.numpy()

    def evaluate(self, weights: NDArray[np.float32]) -> Timed:
        return timed(self.place.evaluate, _tensor(weights))

    def probe(self, probe: Probe, base: NDArray[np.float32], sent: NDArray[np.float32], round: int) -> Timed:
        return timed(self.place.probe, probe, _tensor(base), _tensor(sent), round)


@dataclass(frozen=True)
class RayFuture:
    """A result that is due from an actor."""

    ref: Any

    def ready(self) -> bool:
        return bool(ray.wait([self.ref], timeout=0)[0])

    def result(self) -> Any:
        try:
            return _get(self.ref)
        except RayActorError as exc:
            raise FedLQError(f"the actor that evaluates died ({type(exc).__name__}); too little memory?") from None


def _get(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as exc:
        cause = exc.cause
        raise (cause if isinstance(cause, FedLQError) else FedLQError(f"in an actor: {cause!r}")) from None


def fork_command() -> str | None:
    """How Ray is to start actors from the fork server; None where they start as ordinary processes.

    The command names files of this machine, so it serves a cluster of one node.
    """
    return forkserver.command() if len(ray.nodes()) == 1 else None


def choose(clients: ClientsConfig) -> tuple[str, str]:
    """`dedicated` or `packed`, and why, from the memory and the cores that Ray has free.

    Raises:
        FedLQError: `dedicated` is asked for, and the actors would not fit the memory.
    """
    free = ray.available_resources().get("memory", 0.0)
    cores = int(ray.cluster_resources().get("CPU", 1))
    need = clients.count * (FORKED_BYTES if fork_command() else ORDINARY_BYTES)
    figures = f"{clients.count} actors need about {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free, on {cores} cores"
    if clients.hosting == "dedicated" and need > free:
        raise FedLQError(f"clients.hosting=dedicated: {figures}; use packed, which hosts many clients in an actor")
    if clients.hosting != "auto":
        return clients.hosting, "as configured"
    if need > free / 2:
        return "packed", figures
    if clients.count > ACTORS_A_CORE * cores:
        return "packed", f"{figures}: starting them would take long"
    return "dedicated", figures


class RayHost:
    """Dispatches jobs to actors, the longest first, as many at a time as there are cores."""

    def __init__(self, task: Task, kind: str) -> None:
        self.kind, self.task = kind, task
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        packed = min(task.config.clients.actors or cores, task.config.clients.count)
        self.count = task.config.clients.count if kind == "dedicated" else packed
        self.depth = cores if kind == "dedicated" else 2 * packed  # packed: the next job waits at the actor
        shared = ray.put(task)
        forked = fork_command()
        actor = ClientActor.options(runtime_env={"py_executable": forked} if forked else None)  # type: ignore[attr-defined]
        self.actors = [actor.remote(shared) for _ in range(self.count)]
        self.evaluator = actor.remote(shared)
        try:
            ray.get([actor.alive.remote() for actor in [*self.actors, self.evaluator]])
        except RayActorError as exc:
            raise FedLQError(f"a client's actor did not start: {str(exc).splitlines()[0]}") from None
        self.memories: dict[int, Any] = {}

    def publish(self, weights: Tensor) -> Any:
        return ray.put(weights.numpy())

    def train(self, jobs: Sequence[Job], weights: Mapping[int, Any]) -> Iterator[tuple[int, Reply]]:
        waiting = sorted(jobs, key=lambda job: (job.samples, job.client))
        under_way: dict[Any, tuple[Job, int]] = {}
        load = [0] * self.count
        while waiting or under_way:
            while waiting and len(under_way) < self.depth:
                job = waiting.pop()
                at = job.client if self.kind == "dedicated" else min(range(self.count), key=load.__getitem__)
                load[at] += 1
                memory = self.memories.get(job.client)
                method = self.actors[at].train.options(num_returns=2)
                ref, kept = method.remote(job, weights[job.client], memory)
                under_way[ref] = job, at
                if job.plan.error_feedback:
                    self.memories[job.client] = kept
            done, _ = ray.wait(list(under_way), num_returns=1)
            job, at = under_way.pop(done[0])
            load[at] -= 1
            try:
                yield job.client, _get(done[0])
            except RayActorError as exc:
                raise ClientError(
                    f"its actor died ({type(exc).__name__}); too little memory? fewer clients.actors use less",
                    round=job.round,
                    client=job.client,
                ) from None

    def evaluate(self, weights: Any) -> RayFuture:
        return RayFuture(self.evaluator.evaluate.remote(weights))

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> RayFuture:
        return RayFuture(self.evaluator.probe.remote(probe, base.numpy(), sent.numpy(), round))
