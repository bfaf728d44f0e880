"""The host without Ray: runs everything in this process, one job after another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedlq_ray.errors import ClientError, DivergedError
from fedlq_ray.federation.task import Job, Task, Workplace, timed
from fedlq_ray.strategies import Probe
from fedlq_ray.training.local import Reply


@dataclass(frozen=True)
class Done:
    """A future that already has its value."""

    value: Any

    def ready(self) -> bool:
        return True

    def result(self) -> Any:
        return self.value


class SerialHost:
    """Trains clients one after another in this process."""

    def __init__(self, task: Task) -> None:
        self.place = Workplace(task)
        self.clients = task.config.clients

    def recall(self, memories: Mapping[int, Any]) -> dict[int, Tensor]:
        return dict(memories)

    def remember(self, memories: Mapping[int, Tensor]) -> dict[int, Any]:
        return dict(memories)

    def publish(self, weights: Tensor) -> Tensor:
        return weights

    def train(
        self, jobs: Sequence[Job], weights: Mapping[int, Tensor], memories: Mapping[int, Any]
    ) -> Iterator[tuple[int, Reply | ClientError, Any]]:
        for job in jobs:
            yield job.client, *self._train(job, weights[job.client], memories.get(job.client), self.clients.retries)

    def _train(
        self, job: Job, weights: Tensor, memory: Tensor | None, retries: int
    ) -> tuple[Reply | ClientError, Tensor | None]:
        try:
            return self.place.train(job, weights, memory)
        except ClientError as exc:
            if retries and not isinstance(exc, DivergedError):
                return self._train(job, weights, memory, retries - 1)
            if self.clients.on_failure == "skip_client":
                return exc, None
            raise

    def evaluate(self, weights: Tensor) -> Done:
        return Done(timed(self.place.evaluate, weights))

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> Done:
        return Done(timed(self.place.probe, probe, base, sent, round))
