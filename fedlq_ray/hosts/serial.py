"""The host without Ray: runs everything in this process, one job after another."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedlq_ray.errors import ClientError, DivergedError
from fedlq_ray.federation.host import Answer
from fedlq_ray.federation.task import Job, Task, Worker, timed
from fedlq_ray.strategies import Probe


@dataclass(frozen=True)
class Done:
    """A future that already has its value."""

    value: Any

    def ready(self) -> bool:
        return True

    def result(self) -> Any:
        return self.value


class SerialHost:
    """Trains clients one after another in this process, when their results are asked for."""

    def __init__(self, task: Task) -> None:
        self.worker = Worker(task)
        self.clients = task.config.clients
        self.waiting: list[tuple[Job, Tensor, Tensor | None]] = []

    def recall(self, memories: Mapping[int, Any]) -> dict[int, Tensor]:
        return dict(memories)

    def remember(self, memories: Mapping[int, Tensor]) -> dict[int, Any]:
        return dict(memories)

    def publish(self, weights: Tensor) -> Tensor:
        return weights

    def submit(self, job: Job, weights: Tensor, memory: Tensor | None) -> None:
        self.waiting.append((job, weights, memory))

    def result(self) -> Answer:
        job, weights, memory = self.waiting.pop(0)
        return self._train(job, weights, memory, self.clients.retries)

    def withdraw(self, jobs: Iterable[Job]) -> None:
        keys = {job.key for job in jobs}
        self.waiting = [order for order in self.waiting if order[0].key not in keys]

    def _train(self, job: Job, weights: Tensor, memory: Tensor | None, retries: int) -> Answer:
        try:
            return Answer(job, *self.worker.train(job, weights, memory))
        except ClientError as exc:
            if retries and not isinstance(exc, DivergedError):
                return self._train(job, weights, memory, retries - 1)
            if self.clients.on_failure == "skip_client":
                return Answer(job, exc, None)
            raise

    def evaluate(self, weights: Tensor) -> Done:
        return Done(timed(self.worker.evaluate, weights))

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> Done:
        return Done(timed(self.worker.probe, probe, base, sent, round))
