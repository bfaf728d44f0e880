"""How long clients' flights are expected to take, as selections know it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.federation import cohorts
from fedlq_ray.federation.flight import FlightEnd
from fedlq_ray.federation.task import Task, Worker

Floats = NDArray[np.float64]
Sizes = tuple[float, float]  # bytes that a client sends and fetches


class Durations:
    """How long clients' flights are expected to take, by the means of their profiles.

    All are taken to send and fetch as many bytes as the flights that arrived last did on average.

    Attributes:
        initial: what they are taken to send and fetch before any has arrived: the model in float32.
    """

    def __init__(self, task: Task) -> None:
        clients, bills = range(task.clients.count), task.config.network.bill == "both"
        # Latency counts once per transfer, and a transfer of 0 bytes has none.
        members = [cohorts.member(task, client, 1) for client in clients]
        self._fixed_s = np.array([m.fixed_s for m in members])
        self._send_s = np.array([1 / m.uplink_bytes_per_s for m in members])
        self._fetch_s = np.array([bills / cohorts.downlink(task, client) for client in clients])
        worker = Worker(task)
        self.initial: Sizes = (float(worker.model_size()), float(worker.broadcast_size()))

    def __call__(self, sizes: Sizes) -> Floats:
        """Each client's expected seconds, (clients,)."""
        sent, fetched = sizes
        found: Floats = self._fixed_s + sent * self._send_s + (fetched - 1) * self._fetch_s
        return found


def sizes_of(ended: Sequence[FlightEnd], known: Sizes) -> Sizes:
    """Mean bytes of the flights that arrived; `known` if none did."""
    came = [e for e in ended if e.how == "arrived"]
    if not came:
        return known
    return sum(e.uplink_bytes for e in came) / len(came), sum(e.downlink_bytes for e in came) / len(came)
