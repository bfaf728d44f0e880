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
        self.memories: dict[int, Any] = {}
        self.clients = task.config.clients

    def recall(self, memories: Mapping[int, Any]) -> dict[int, Tensor]:
        return dict(memories)

    def remember(self, memories: Mapping[int, Tensor]) -> None:
        self.memories = dict(memories)

    def publish(self, weights: Tensor) -> Tensor:
        return weights

    def train(self, jobs: Sequence[Job], weights: Mapping[int, Tensor]) -> Iterator[tuple[int, Reply | ClientError]]:
        for job in jobs:
            yield job.client, self._train(job, weights[job.client], self.clients.retries)

    def _train(self, job: Job, weights: Tensor, retries: int) -> Reply | ClientError:
        try:
            reply, kept = self.place.train(job, weights, self.memories.get(job.client))
        except ClientError as exc:
            if retries and not isinstance(exc, DivergedError):
                return self._train(job, weights, retries - 1)
            if self.clients.on_failure == "skip_client":
                return exc
            raise
        if job.plan.error_feedback:
            self.memories[job.client] = kept
        return reply

    def evaluate(self, weights: Tensor) -> Done:
        return Done(timed(self.place.evaluate, weights))

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> Done:
        return Done(timed(self.place.probe, probe, base, sent, round))
