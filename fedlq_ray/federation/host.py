"""The interface of a host, which runs clients for the rounds."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fedlq_ray.errors import ClientError
from fedlq_ray.federation.task import Job
from fedlq_ray.strategies import Probe
from fedlq_ray.training.local import Reply


class Answer(NamedTuple):
    """What became of a job.

    Attributes:
        reply: or why the client failed, if the round may continue without it.
        memory: the client's next memory, in the host's own form; None: unchanged.
    """

    job: Job
    reply: Reply | ClientError
    memory: Any


class Future(Protocol):
    """A result that is computed elsewhere."""

    def ready(self) -> bool: ...

    def result(self) -> Any: ...


class Host(Protocol):
    """Runs clients.

    A host keeps no memory of a client: an answer brings it, and the rounds commit it. Weights and memories are in the
    host's own form: `publish` and `remember` make them from tensors, and `recall` turns memories into tensors.
    """

    def submit(self, job: Job, weights: Any, memory: Any) -> None:
        """Queues a job; of one client only one at a time. `weights` are what `publish` returned."""
        ...

    def result(self) -> Answer:
        """Waits for the next answer, of any of the submitted jobs.

        Raises:
            ClientError: a client failed, and the configuration does not allow to skip it.
        """
        ...

    def withdraw(self, jobs: Iterable[Job]) -> None:
        """Takes jobs back: `result` never returns them. A job that is being trained ends unheard."""
        ...

    def publish(self, weights: Tensor) -> Any:
        """Makes weights (d,) available to all clients."""
        ...

    def remember(self, memories: Mapping[int, Tensor]) -> dict[int, Any]: ...

    def recall(self, memories: Mapping[int, Any]) -> dict[int, Tensor]: ...

    def evaluate(self, weights: Any) -> Future:
        """A `Timed` evaluation of published weights."""
        ...

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> Future:
        """A `Timed` measurement."""
        ...
