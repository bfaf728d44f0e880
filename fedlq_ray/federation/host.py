"""Where clients live, as the rounds see it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fedlq_ray.errors import ClientError
from fedlq_ray.federation.task import Job
from fedlq_ray.strategies import Probe
from fedlq_ray.training.local import Reply


class Future(Protocol):
    """Something under way elsewhere."""

    def ready(self) -> bool: ...

    def result(self) -> Any: ...


class Host(Protocol):
    """Where clients live. `publish` makes weights known to all; the others take what it gave.

    `train` gives each job's reply, in any order, or why a client failed where the round may go on without it.
    The futures of `evaluate` and `probe` give a `Timed`. `memories` has what clients keep for error feedback, in the
    host's own form; `recall` gives it as tensors, and `remember` puts such tensors in its place.
    """

    memories: dict[int, Any]

    def recall(self, memories: Mapping[int, Any]) -> dict[int, Tensor]: ...

    def remember(self, memories: Mapping[int, Tensor]) -> None: ...

    def publish(self, weights: Tensor) -> Any: ...

    def train(self, jobs: Sequence[Job], weights: Mapping[int, Any]) -> Iterator[tuple[int, Reply | ClientError]]: ...

    def evaluate(self, weights: Any) -> Future: ...

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> Future: ...
