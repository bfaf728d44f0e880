"""The interface of a host, which runs clients for the rounds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fedlq_ray.errors import ClientError
from fedlq_ray.federation.task import Job
from fedlq_ray.strategies import Probe
from fedlq_ray.training.local import Reply


class Future(Protocol):
    """A result that is computed elsewhere."""

    def ready(self) -> bool: ...

    def result(self) -> Any: ...


class Host(Protocol):
    """Runs clients. `publish` makes weights available to all; the other methods take what it returns.

    `train` yields each job's reply, in any order, with the client's next memory (None: unchanged), or why a client
    failed if the round may continue without it. A host keeps no memory: the rounds commit it with the round. The
    futures of `evaluate` and `probe` return a `Timed`. Memories are in the host's own form; `recall` turns them into
    tensors, and `remember` makes them from tensors.
    """

    def recall(self, memories: Mapping[int, Any]) -> dict[int, Tensor]: ...

    def remember(self, memories: Mapping[int, Tensor]) -> dict[int, Any]: ...

    def publish(self, weights: Tensor) -> Any: ...

    def train(
        self, jobs: Sequence[Job], weights: Mapping[int, Any], memories: Mapping[int, Any]
    ) -> Iterator[tuple[int, Reply | ClientError, Any]]: ...

    def evaluate(self, weights: Any) -> Future: ...

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> Future: ...
